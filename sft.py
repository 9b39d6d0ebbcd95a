"""Stage 2: supervised fine-tuning of the decoder on chats.

    python sft.py configs/demo/sft.py
    torchrun --standalone --nproc_per_node=8 sft.py configs/full/sft.py
    python sample.py out/demo/sft                                      # chat with it

Chats are packed into rows and attend only to themselves; the loss is on the assistant's turns.
Starts from a pretrain.py checkpoint; writes a decoder checkpoint for vision_pretrain.py.
"""

from dataclasses import dataclass

from common.checkpoint import lineage
from common.config import TrainSettings, parse, run_main
from data import Chats, check_kind, check_tokenizer
from inference.conversation import sample_answers
from train.loader import validation_loss
from train.optim import make_optimizer
from train.packing import Packed
from train.run import Run
from vision import describe, open_model


@dataclass
class Config(TrainSettings):
    # --- data
    data: str = "data/chat"  # folder made by prepare.py chat
    context: int = 1024  # tokens of a training row

    # --- model
    init_from: str = "out/pretrain"  # decoder checkpoint to start from

    # --- optimization
    batch_tokens: int = 65_536  # tokens of a step, in all processes together
    micro_rows: int = 32  # rows of a forward pass on one GPU: as many as fit its memory

    # --- run
    val_rows: int = 256  # rows of an evaluation, always the same ones


def main():
    cfg = parse(Config)
    check_kind(cfg.data, "chats")
    run = Run(cfg, "sft")

    # Model: all weights of the pretrained decoder are trained
    model, tokenizer, info = open_model(cfg.init_from, run.device, kinds=("decoder",))
    model.train()
    rows = run.rows(model.config.max_positions)

    # Data: complete chats packed into rows
    check_tokenizer(cfg.data, tokenizer)
    train, val = (Packed([Chats(cfg.data, split)], cfg.context, tokenizer)
                  for split in ("train", "val"))
    loader = run.loader(train, rows, cfg.micro_rows)
    run.note(train.note())

    optimizer = make_optimizer(model, cfg, new=False)
    net = run.start(model, optimizer, tokenizer, {**describe(model), "lineage": lineage(info)})

    for step in run.steps():
        for batch in loader.step(step):
            with run.forward(batch):
                loss = net(batch) / batch.n_targets  # sum over the step: nats per token
            run.backward(loss)
        run.optimizer_step(step)
        run.progress(step)
        if run.due(step, cfg.eval_every):
            run.record(step, val_loss=validation_loss(run.machine, val, cfg.micro_rows, model,
                                                      cfg.val_rows))
        if run.due(step, cfg.save_every):
            run.save(step)

    run.finish(lambda model: sample_answers(model, tokenizer, val.sources[0]), [cfg.data])


if __name__ == "__main__":
    run_main(main)
