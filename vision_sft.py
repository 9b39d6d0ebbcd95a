"""Stage 4: supervised fine-tuning on chats about images. Projector and decoder are trained.

    python vision_sft.py configs/demo/vision_sft.py
    torchrun --standalone --nproc_per_node=8 vision_sft.py configs/full/vision_sft.py
    python sample.py out/demo/vision_sft --image=FILE                  # chat about an image

Reads chats about images, mixed with text-only chats and with --replay also plain text, against
catastrophic forgetting. CLIP is frozen. Starts from a vision_pretrain.py checkpoint.
"""

from dataclasses import dataclass

from common.checkpoint import lineage
from common.config import TrainSettings, parse, run_main
from data import Chats, Documents, Share, check_kind, check_tokenizer
from evals.image_ablation import ImageAblation, ignored_images_warning
from inference.conversation import sample_answers
from train.loader import validation_loss
from train.optim import make_optimizer
from train.packing import Packed
from train.run import Run
from vision import describe, open_model


@dataclass
class Config(TrainSettings):
    # --- data
    data: str = "data/images"  # folder made by prepare.py images: chats about images
    text_data: str = ""  # folder made by prepare.py chat: text-only chats; empty for none
    text_share: float = 0.1  # text-only chats for every chat about an image
    replay: str = ""  # folder of token shards, against forgetting plain text; empty for none
    replay_share: float = 0.05  # windows of a quarter of a row for every chat about an image
    context: int = 1024  # positions of a training row, image tokens included

    # --- model
    init_from: str = "out/vision_pretrain"  # vision checkpoint to start from

    # --- optimization
    projector_lr: float = 4.0  # the projector's learning rates, as a multiple of the decoder's
    batch_tokens: int = 65_536  # positions of a step, in all processes together
    micro_rows: int = 16  # rows of a forward pass on one GPU: as many as fit its memory

    # --- run
    val_chats: int = 512  # validation chats of an evaluation, always the same ones

    # --- hardware
    workers: int = -1  # processes that decode images; -1: as many as there are spare cores


def sources_of(cfg, tokenizer):
    """Training data: chats about images, and shares of text-only chats and of plain text."""
    sources = [Chats(cfg.data, "train")]
    if cfg.text_data:
        check_tokenizer(cfg.text_data, tokenizer)
        n = round(len(sources[0]) * cfg.text_share)
        sources.append(Share(Chats(cfg.text_data, "train"), n, cfg.seed))
    if cfg.replay:
        check_tokenizer(cfg.replay, tokenizer)
        documents = Documents(cfg.replay, "train", cfg.context // 4, tokenizer)
        sources.append(Share(documents, round(len(sources[0]) * cfg.replay_share), cfg.seed))
    return sources


def main():
    cfg = parse(Config)
    check_kind(cfg.data, "images")
    check_kind(cfg.text_data, "chats", setting="--text_data=")
    check_kind(cfg.replay, "text", setting="--replay=")
    run = Run(cfg, "vision_sft")

    # Model: all weights but CLIP's are trained
    model, tokenizer, info = open_model(cfg.init_from, run.device, kinds=("vision",))
    model.train()
    rows = run.rows(model.config.max_positions)

    # Data: chats about images, text-only chats, plain text
    check_tokenizer(cfg.data, tokenizer)
    sources, val_text = sources_of(cfg, tokenizer), None
    if cfg.text_data:
        val_text = Packed([Chats(cfg.text_data, "val")], cfg.context, tokenizer)
    train = Packed(sources, cfg.context, tokenizer, model.image_spec)
    val = Chats(cfg.data, "val")
    ablation = ImageAblation(val, cfg.val_chats, cfg.context, tokenizer, model.image_spec)
    loader = run.loader(train, rows, cfg.micro_rows)
    run.note(train.note())

    optimizer = make_optimizer(model, cfg, {"projector.": cfg.projector_lr}, new=False)
    net = run.start(model, optimizer, tokenizer, {**describe(model), "lineage": lineage(info)})

    for step in run.steps():
        for batch in loader.step(step):
            with run.forward(batch):
                loss = net(batch) / batch.n_targets  # sum over the step: nats per token
            run.backward(loss)
        run.optimizer_step(step)
        run.progress(step)
        if run.due(step, cfg.eval_every):
            losses = ablation.losses(run.machine, model, cfg.micro_rows)
            if val_text:
                losses["val_text_loss"] = validation_loss(run.machine, val_text, cfg.micro_rows,
                                                          model, 64)
            run.record(step, **losses)
            run.log.say(ignored_images_warning(losses))
        if run.due(step, cfg.save_every):
            run.save(step)

    run.finish(lambda model: sample_answers(model, tokenizer, val),
               [cfg.data, cfg.text_data, cfg.replay])


if __name__ == "__main__":
    run_main(main)
