"""Stage 3: train the projector from CLIP's features to the decoder's embeddings, on captions.

    python vision_pretrain.py configs/demo/vision_pretrain.py
    python vision_pretrain.py configs/full/vision_pretrain.py
    python sample.py out/demo/vision_pretrain --image=FILE --prompt='Write a caption.'

CLIP and the decoder are frozen. Starts from an sft.py and a clip_pretrain.py checkpoint; writes a
vision checkpoint for vision_sft.py.
"""

from dataclasses import dataclass
from typing import Literal

from common.checkpoint import lineage
from common.config import TrainSettings, parse, run_main
from data import Chats, check_kind, check_tokenizer
from evals.image_ablation import ImageAblation, ignored_images_warning
from inference.conversation import sample_answers
from train.optim import make_optimizer
from train.packing import Packed
from train.run import Run
from vision import describe, join


@dataclass
class Config(TrainSettings):
    # --- data
    data: str = "data/captions"  # folder made by prepare.py images
    # how images become square: padded, as LLaVA does with OpenAI's CLIP, or cropped; empty for what
    # the CLIP was trained with, else pad
    fit: Literal["", "pad", "crop"] = ""
    context: int = 1024  # positions of a training row, image tokens included

    # --- model
    init_from: str = "out/sft"  # decoder checkpoint: a language model that can chat
    clip: str = "out/clip_pretrain"  # CLIP checkpoint, or one of the hub

    # --- optimization
    batch_tokens: int = 65_536  # positions of a step, in all processes together
    micro_rows: int = 16  # rows of a forward pass on one GPU: as many as fit its memory

    # --- run
    val_chats: int = 512  # validation chats of an evaluation, always the same ones

    # --- hardware
    workers: int = -1  # processes that decode images; -1: as many as there are spare cores


def main():
    cfg = parse(Config)
    check_kind(cfg.data, "images")
    run = Run(cfg, "vision_pretrain")

    # Model: the projector is new and trained; CLIP and the decoder are frozen
    model, tokenizer, parents = join(cfg.init_from, cfg.clip, cfg.fit)
    model.to(run.device).train()
    model.decoder.requires_grad_(False)
    rows = run.rows(model.config.max_positions)

    # Data: captions, packed into rows
    check_tokenizer(cfg.data, tokenizer)
    train = Packed([Chats(cfg.data, "train")], cfg.context, tokenizer, model.image_spec)
    val = Chats(cfg.data, "val")
    ablation = ImageAblation(val, cfg.val_chats, cfg.context, tokenizer, model.image_spec)
    loader = run.loader(train, rows, cfg.micro_rows)
    run.note(train.note())

    optimizer = make_optimizer(model, cfg)
    info = {**describe(model), "lineage": [line for p in parents for line in lineage(p)]}
    net = run.start(model, optimizer, tokenizer, info)

    for step in run.steps():
        for batch in loader.step(step):
            with run.forward(batch):
                loss = net(batch) / batch.n_targets  # sum over the step: nats per token
            run.backward(loss)
        run.optimizer_step(step)
        run.progress(step)
        if run.due(step, cfg.eval_every):
            losses = ablation.losses(run.machine, model, cfg.micro_rows)
            run.record(step, **losses)
            run.log.say(ignored_images_warning(losses))
        if run.due(step, cfg.save_every):
            run.save(step)

    run.finish(lambda model: sample_answers(model, tokenizer, val), [cfg.data])


if __name__ == "__main__":
    run_main(main)
