"""Stage 2: teach the decoder to chat, on conversations.

    python sft.py configs/demo/sft.py
    torchrun --standalone --nproc_per_node=8 sft.py configs/full/sft.py
    python sample.py out/demo/sft                                      # chat with it

Chats are packed whole into rows and see only themselves; the loss is on what the assistant says.
Starts from pretrain.py's checkpoint; vision_pretrain.py goes on from here.
"""

from dataclasses import dataclass

from common.checkpoint import lineage
from common.config import TrainSettings, parse, run_main
from data import Chats, check_tokenizer
from inference.conversation import sample_answers
from train.loader import Loader, validation_loss
from train.optim import make_optimizer
from train.packing import Packed
from train.run import Run
from vision import describe, open_model


@dataclass
class Config(TrainSettings):
    init_from: str = "out/pretrain"  # the decoder checkpoint to start from
    data: str = "data/chat"  # folder made by prepare.py chat

    context: int = 1024  # tokens of a training row
    batch_tokens: int = 65_536  # tokens of a step in the whole job, whatever the number of GPUs
    micro_rows: int = 32  # rows a GPU takes at once: what fits its memory
    val_rows: int = 256  # validation rows, always the same ones


def main():
    cfg = parse(Config)
    run = Run(cfg, "sft")

    # Model: all of the pretrained decoder goes on learning
    model, tokenizer, info = open_model(cfg.init_from, run.device, kinds=("decoder",))
    model.train()
    rows = run.rows(model.config.max_positions)

    # Data: whole chats packed into rows
    check_tokenizer(cfg.data, tokenizer)
    train = Packed([Chats(cfg.data, "train")], cfg.context, tokenizer)
    val = Packed([Chats(cfg.data, "val")], cfg.context, tokenizer)
    loader = Loader(train, rows, cfg.micro_rows, run, cfg.seed)
    run.note(*train.notes())

    optimizer = make_optimizer(model, cfg)
    net = run.start(model, optimizer, tokenizer, {**describe(model), "lineage": lineage(info)},
                    "tok", cfg.batch_tokens, model.flops_per_token(cfg.context))

    for step in run.steps():
        for micro, batch in enumerate(loader.step(step)):
            with run.forward(micro):
                loss = net(*batch.inputs()) / batch.n_targets
            run.backward(loss)
        run.update(step)
        run.progress(step)
        if run.due(step, cfg.eval_every):
            run.record(step, val_loss=validation_loss(
                run.machine, val, cfg.micro_rows, lambda b: model(*b.inputs()), cfg.val_rows))
        if run.due(step, cfg.save_every):
            run.save(step)

    run.finish(sample_answers(model, tokenizer, val.sources[0]), [cfg.data])


if __name__ == "__main__":
    run_main(main)
