"""Stage 1: pretrain the decoder on text, from scratch.

    python pretrain.py configs/demo/pretrain.py                        # a laptop, 2 minutes
    torchrun --standalone --nproc_per_node=8 pretrain.py configs/full/pretrain.py
    python sample.py out/demo/pretrain --prompt='Mia has'              # look at the result

Reads token shards (prepare.py text, or the public FineWeb-Edu ones); writes a decoder checkpoint
for sft.py. The settings of all stages, such as learning rates, are in common/config.py.
"""

from dataclasses import dataclass
from typing import Literal

from common import hub
from common.checkpoint import lineage
from common.config import TrainSettings, UserError, parse, run_main
from data import Text, check_kind, check_tokenizer
from inference.conversation import sample_texts
from model import GPT, GPTConfig
from train.loader import validation_loss
from train.optim import make_optimizer
from train.recipe import fill_in
from train.run import Run
from vision import describe, open_model


@dataclass
class Config(TrainSettings):
    # --- data
    # folder of .npy token shards with the word train or val in their names, or hf://OWNER/NAME for
    # those of a hub data set, which are downloaded during training
    data: str = "data/text"
    context: int = 1024  # tokens of a training row

    # --- model
    init_from: str = ""  # decoder checkpoint to continue with new data; empty: random weights
    n_layer: int = 20  # blocks
    n_head: int = 10  # attention heads
    n_embd: int = 1280  # width
    max_positions: int = 2048  # longest sequence of the decoder
    init: Literal["small", "torch"] = "small"  # small: model.py's; torch: PyTorch's defaults

    # --- optimization
    # tokens of the run per parameter of its blocks, 12 * n_layer * n_embd^2; 23 are 9 B tokens for
    # the default size. What is -1 follows from it and from the size (train/recipe.py)
    tokens_per_parameter: float = 23.0
    max_steps: int = -1  # optimizer steps of the run
    batch_tokens: int = -1  # tokens of a step, in all processes together
    embedding_lr: float = -1.0  # peak learning rate of token embeddings; 0 for the same as lr
    micro_rows: int = 32  # rows of a forward pass on one GPU: as many as fit its memory

    # --- run
    val_rows: int = 512  # rows of an evaluation, always the same ones

    def __post_init__(self):
        fill_in(self)

    def decoder(self, tokenizer):
        """The GPTConfig for these settings and a tokenizer."""
        if self.n_embd % (2 * self.n_head):
            raise UserError(f"--n_embd={self.n_embd} is not a multiple of 2 * --n_head="
                            f"{self.n_head}")
        return GPTConfig(tokenizer.n_vocab, self.n_layer, self.n_head, self.n_embd,
                         self.max_positions)


def main():
    cfg = parse(Config)
    run = Run(cfg, "pretrain")

    # Data: windows over all shards in a seeded order
    folder = hub.stream(cfg.data, run)
    check_kind(folder, "text")
    tokenizer = check_tokenizer(folder)
    train, val = (Text(folder, split, cfg.context, tokenizer.n_vocab) for split in ("train", "val"))

    # Model: all weights are new and trained
    if cfg.init_from:
        model, own_tokenizer, parent = open_model(cfg.init_from, run.device, kinds=("decoder",))
        check_tokenizer(folder, own_tokenizer)
        parents = lineage(parent)
    else:
        model, parents = GPT(cfg.decoder(tokenizer)), []
        if cfg.init == "torch":
            model.apply(lambda module: getattr(module, "reset_parameters", lambda: None)())
    model.to(run.device).train()
    loader = run.loader(train, run.rows(model.config.max_positions), cfg.micro_rows)
    optimizer = make_optimizer(model, cfg)
    net = run.start(model, optimizer, tokenizer, {**describe(model), "lineage": parents})

    for step in run.steps():
        for batch in loader.step(step):
            with run.forward(batch):
                loss = net(batch) / batch.n_targets  # summed over the step: nats per token
            run.backward(loss)
        run.optimizer_step(step)
        run.progress(step)
        if run.due(step, cfg.eval_every):
            run.record(step, val_loss=validation_loss(run.machine, val, cfg.micro_rows, model,
                                                      cfg.val_rows))
        if run.due(step, cfg.save_every):
            run.save(step)

    run.finish(lambda model: sample_texts(model, tokenizer, val), [folder])


if __name__ == "__main__":
    run_main(main)
