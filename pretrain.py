"""Stage 1: teach the decoder English, from nothing, on text.

    python pretrain.py configs/demo/pretrain.py                        # a laptop, 2 minutes
    torchrun --standalone --nproc_per_node=8 pretrain.py configs/full/pretrain.py
    python sample.py out/demo/pretrain --prompt='Mia has'              # look at the result

Reads token shards (prepare.py text, or the public FineWeb-Edu ones); writes a decoder checkpoint
that sft.py starts from.
"""

from dataclasses import dataclass
from typing import Literal

from common import hub
from common.config import TrainSettings, UserError, parse, run_main
from data import Text, check_tokenizer
from inference.conversation import sample_texts
from model import GPT, GPTConfig
from train.loader import Loader, validation_loss
from train.optim import make_optimizer
from train.run import Run
from vision import describe, open_model


@dataclass
class Config(TrainSettings):
    data: str = "data/text"  # folder of *train*.npy and *val*.npy token shards, or
    # hf://OWNER/NAME for those of a hub data set, fetched ahead of training
    init_from: str = ""  # a decoder checkpoint to go on from with new data; empty: from nothing

    n_layer: int = 20  # blocks
    n_head: int = 10  # attention heads
    n_embd: int = 1280  # width
    max_positions: int = 2048  # longest sequence the decoder will ever see
    init: Literal["small", "torch"] = "small"  # small: model.py's; torch: PyTorch's own defaults

    context: int = 1024  # tokens of a training row
    batch_tokens: int = 524_288  # tokens of a step in the whole job, whatever the number of GPUs
    micro_rows: int = 32  # rows a GPU takes at once: what fits its memory
    val_rows: int = 512  # validation windows, always the same ones

    def decoder(self, tokenizer):
        """The GPTConfig that these settings and a vocabulary make."""
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
    tokenizer = check_tokenizer(folder)
    train = Text(folder, "train", cfg.context, tokenizer.n_vocab)
    val = Text(folder, "val", cfg.context, tokenizer.n_vocab)

    # Model: everything is new and everything is trained
    if cfg.init_from:
        model, its_tokenizer, _ = open_model(cfg.init_from, run.device, kinds=("decoder",))
        check_tokenizer(folder, its_tokenizer)
    else:
        model = GPT(cfg.decoder(tokenizer))
        if cfg.init == "torch":
            model.apply(lambda module: getattr(module, "reset_parameters", lambda: None)())
    model.to(run.device).train()
    rows = run.rows(model.config.max_positions)
    loader = Loader(train, rows, cfg.micro_rows, run, cfg.seed)
    optimizer = make_optimizer(model, cfg)
    net = run.start(model, optimizer, tokenizer, describe(model), "tok", cfg.batch_tokens,
                    model.flops_per_token(cfg.context))

    for step in run.steps():
        for micro, batch in enumerate(loader.step(step)):
            with run.forward(micro):
                loss = net(batch.ids, batch.targets) / batch.n_targets
            run.backward(loss)
        run.update(step)
        run.progress(step)
        if run.due(step, cfg.eval_every):
            run.record(step, val_loss=validation_loss(
                run.machine, val, cfg.micro_rows, lambda b: model(b.ids, b.targets), cfg.val_rows))
        if run.due(step, cfg.save_every):
            run.save(step)

    run.finish(sample_texts(model, tokenizer, val), [folder])


if __name__ == "__main__":
    run_main(main)
