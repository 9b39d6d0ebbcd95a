"""Stage 4: teach the model to talk about pictures. Projector and decoder learn, CLIP does not.

    python vision_sft.py configs/demo/vision_sft.py
    torchrun --standalone --nproc_per_node=8 vision_sft.py configs/full/vision_sft.py
    python sample.py out/demo/vision_sft --image=FILE                  # talk about a picture

Reads conversations about pictures, with some chats about text mixed in so that the model does not
forget how to talk without one, and with --replay plain text, so that it does not forget to write.
Starts from vision_pretrain.py's checkpoint.
"""

from dataclasses import dataclass

from common.checkpoint import lineage
from common.config import TrainSettings, parse, run_main
from data import Chats, Documents, Share, check_tokenizer
from evals.image_ablation import Looking, blind
from inference.conversation import sample_answers
from train.loader import Loader, validation_loss
from train.optim import make_optimizer
from train.packing import Packed
from train.run import Run
from vision import describe, open_model


@dataclass
class Config(TrainSettings):
    init_from: str = "out/vision_pretrain"  # the vision checkpoint to start from
    data: str = "data/images"  # folder made by prepare.py images: conversations about pictures
    text_data: str = ""  # folder made by prepare.py chat: chats about text; empty for none
    text_share: float = 0.1  # chats about text for every conversation about a picture
    replay: str = ""  # folder of token shards to go on reading, or plain text is forgotten
    replay_share: float = 0.05  # windows of a quarter of a row for every conversation

    context: int = 1024  # positions of a training row, image tokens included
    batch_tokens: int = 65_536  # positions of a step in the whole job
    micro_rows: int = 16  # rows a GPU takes at once: what fits its memory
    val_chats: int = 512  # held-out chats of an evaluation, always the same ones
    workers: int = -1  # processes that decode pictures; -1 for the cores that a GPU leaves over
    projector_lr: float = 1.0  # the projector's learning rates, as a multiple of the decoder's


def main():
    cfg = parse(Config)
    run = Run(cfg, "vision_sft")

    # Model: all but CLIP learns
    model, tokenizer, info = open_model(cfg.init_from, run.device, kinds=("vision",))
    model.train()
    rows = run.rows(model.config.max_positions)

    # Data: chats about pictures, and some without
    check_tokenizer(cfg.data, tokenizer)
    sources, val_text = [Chats(cfg.data, "train")], None
    if cfg.text_data:
        check_tokenizer(cfg.text_data, tokenizer)
        texts = Chats(cfg.text_data, "train")
        sources.append(Share(texts, round(len(sources[0]) * cfg.text_share), cfg.seed))
        val_text = Packed([Chats(cfg.text_data, "val")], cfg.context, tokenizer)
    if cfg.replay:
        check_tokenizer(cfg.replay, tokenizer)
        documents = Documents(cfg.replay, "train", cfg.context // 4, tokenizer)
        sources.append(Share(documents, round(len(sources[0]) * cfg.replay_share), cfg.seed))
    train = Packed(sources, cfg.context, tokenizer, *model.pictures)
    val = Chats(cfg.data, "val")
    looking = Looking(val, cfg.val_chats, cfg.context, tokenizer, *model.pictures)
    loader = Loader(train, rows, cfg.micro_rows, run, cfg.seed, run.workers())
    run.note(*train.notes())

    optimizer = make_optimizer(model, cfg, {"projector.": cfg.projector_lr})
    net = run.start(model, optimizer, tokenizer, {**describe(model), "lineage": lineage(info)},
                    "tok", cfg.batch_tokens, model.decoder.flops_per_token(cfg.context))

    for step in run.steps():
        for micro, batch in enumerate(loader.step(step)):
            with run.forward(micro):
                loss = net(batch) / batch.n_targets
            run.backward(loss)
        run.update(step)
        run.progress(step)
        if run.due(step, cfg.eval_every):
            losses = looking.losses(run.machine, model, cfg.micro_rows)
            if val_text:
                losses["val_text_loss"] = validation_loss(run.machine, val_text, cfg.micro_rows,
                                                          model, 64)
            run.record(step, **losses)
            run.log.say(blind(losses))
        if run.due(step, cfg.save_every):
            run.save(step)

    run.finish(sample_answers(model, tokenizer, val), [cfg.data, cfg.text_data, cfg.replay])


if __name__ == "__main__":
    run_main(main)
