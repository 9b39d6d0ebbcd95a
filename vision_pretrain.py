"""Stage 3: give the decoder eyes. Only the projector learns, on captions.

    python vision_pretrain.py configs/demo/vision_pretrain.py
    python vision_pretrain.py configs/full/vision_pretrain.py
    python sample.py out/demo/vision_pretrain --image=FILE --prompt='Write a caption.'

CLIP and the decoder are frozen: the projector learns to say in the decoder's language what CLIP
sees. Starts from an sft.py and a clip_pretrain.py checkpoint; vision_sft.py goes on from here.
"""

from dataclasses import dataclass
from typing import Literal

from common.checkpoint import lineage
from common.config import TrainSettings, parse, run_main
from data import Chats, check_tokenizer
from evals.image_ablation import Looking, blind
from inference.conversation import sample_answers
from train.loader import Loader
from train.optim import make_optimizer
from train.packing import Packed
from train.run import Run
from vision import describe, join


@dataclass
class Config(TrainSettings):
    init_from: str = "out/sft"  # the decoder checkpoint: a language model that can chat
    clip: str = "out/clip_pretrain"  # the CLIP checkpoint
    data: str = "data/captions"  # folder made by prepare.py images
    fit: Literal["", "pad", "crop"] = ""  # pictures into squares: padded, as LLaVA does with
    # OpenAI's CLIP, or their middle; empty for what the CLIP was trained with, or pad

    context: int = 1024  # positions of a training row, image tokens included
    batch_tokens: int = 65_536  # positions of a step in the whole job
    micro_rows: int = 16  # rows a GPU takes at once: what fits its memory
    val_chats: int = 512  # held-out chats of an evaluation, always the same ones
    workers: int = -1  # processes that decode pictures; -1 for the cores that a GPU leaves over


def main():
    cfg = parse(Config)
    run = Run(cfg, "vision_pretrain")

    # Model: the projector is new and learns; CLIP and decoder stand still
    model, tokenizer, parents = join(cfg.init_from, cfg.clip, cfg.fit)
    model.to(run.device).train()
    model.decoder.requires_grad_(False)
    rows = run.rows(model.config.max_positions)

    # Data: captions, packed into rows
    check_tokenizer(cfg.data, tokenizer)
    train = Packed([Chats(cfg.data, "train")], cfg.context, tokenizer, *model.pictures)
    val = Chats(cfg.data, "val")
    looking = Looking(val, cfg.val_chats, cfg.context, tokenizer, *model.pictures)
    loader = Loader(train, rows, cfg.micro_rows, run, cfg.seed, run.workers())
    run.note(*train.notes())

    optimizer = make_optimizer(model, cfg)
    info = {**describe(model), "lineage": [line for p in parents for line in lineage(p)]}
    net = run.start(model, optimizer, tokenizer, info, "tok", cfg.batch_tokens,
                    model.decoder.flops_per_token(cfg.context) * 2 / 3)  # no weight gradients

    for step in run.steps():
        for micro, batch in enumerate(loader.step(step)):
            with run.forward(micro):
                loss = net(batch) / batch.n_targets
            run.backward(loss)
        run.update(step)
        run.progress(step)
        if run.due(step, cfg.eval_every):
            losses = looking.losses(run.machine, model, cfg.micro_rows)
            run.record(step, **losses)
            run.log.say(blind(losses))
        if run.due(step, cfg.save_every):
            run.save(step)

    run.finish(sample_answers(model, tokenizer, val), [cfg.data])


if __name__ == "__main__":
    run_main(main)
