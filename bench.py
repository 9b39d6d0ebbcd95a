"""How fast: a training step of any stage, decoding, and other people's steps beside ours.

    python bench.py configs/full/pretrain.py                     # any stage's config and settings
    torchrun --standalone --nproc_per_node=8 bench.py configs/full/sft.py --micro_rows=16
    python bench.py plan configs/demo                            # minutes of every stage, here
    python bench.py decode configs/full/vision_sft.py            # how fast it talks
    python bench.py save configs/full/pretrain.py                # what a checkpoint costs
    python bench.py decode configs/small/pretrain.py --peer=transformers
    python bench.py configs/full/sft.py --profile=True           # what a step spends its time on
    python bench.py --peer=nanoGPT/model.py                      # its model.py and ours, in turn
    python bench.py configs/full/vision_pretrain.py --peer=transformers

The data are random but go the whole way: packed into rows, pictures decoded. The last line is JSON.
"""

import dataclasses
import functools
import importlib
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.baselines import beside_nanogpt, beside_transformers
from benchmarks.decoding import decode_speeds
from benchmarks.plan import plan
from benchmarks.saving import save_costs
from benchmarks.training import Training, profile, sibling, timing, tokenizer_of
from common.config import UserError, parse, run_main

STAGES = ("pretrain", "sft", "vision_pretrain", "vision_sft", "clip_pretrain")


@dataclass
class Config:
    """What bench.py lets you set beside the stage's own settings."""

    steps: int = 4  # steps of a measurement; there are five, after two steps that do not count
    profile: bool = False  # print the operations that take the most time of a step instead
    vocabulary: int = 50304  # ids of the tokenizer that a plan counts with
    peer: str = ""  # path of nanoGPT's model.py, or transformers: measure its step beside ours


def main():
    own = [f"--{field.name}" for field in dataclasses.fields(Config)]
    argv = sys.argv[1:]
    decode, save = argv[:1] == ["decode"], argv[:1] == ["save"]
    mine = [flag for flag in argv if flag.split("=")[0] in own or flag == "--help"]
    theirs = [flag for flag in argv[decode or save:] if flag not in mine]
    bench = parse(Config, mine)
    if argv[:1] == ["plan"]:
        folder = next((word for word in theirs[1:] if word[0] != "-"), "configs/demo")
        plan(folder, bench.vocabulary, Training)
        return
    if bench.peer not in ("", "transformers"):
        return show(**beside_nanogpt(bench.peer))
    stages = [stage for stage in STAGES if (stage != "clip_pretrain" if decode else
                                            not bench.peer or stage.startswith("vision"))]
    if not theirs or Path(theirs[0]).stem not in stages:
        raise UserError("say which config to time, like configs/full/vision_pretrain.py; its name "
                        f"must be a stage's: {', '.join(stages)}")
    stage, folder = Path(theirs[0]).stem, Path(theirs[0]).parent
    cfg = parse(importlib.import_module(stage).Config, theirs)
    if decode:
        return show(**talking(cfg, stage, folder, bench.peer))
    with tempfile.TemporaryDirectory() as out:
        cfg = dataclasses.replace(cfg, out=out, resume=False, tracker="none")
        if bench.peer:
            return show(**beside_transformers(functools.partial(Training, cfg, stage, folder)))
        training = Training(cfg, stage, folder)
        if save:
            figures = save_costs(training)
        else:
            figures = (profile if bench.profile else timing)(training, bench.steps)
        if training.run.machine.is_main:
            show(**figures)
        training.run.machine.leave()


def talking(cfg, stage, folder, peer):
    """The figures of bench_decode for the model of a stage's config."""
    tokenizer = tokenizer_of(cfg)
    sizes = cfg if stage == "pretrain" else sibling(folder, "pretrain")
    clip = sibling(folder, "clip_pretrain").clip(tokenizer) if stage.startswith("vision") else None
    return decode_speeds(sizes.decoder(tokenizer), clip, tokenizer, cfg, peer)


def show(**figures):
    """One line for people, one of JSON."""
    rounded = {name: float(f"{value:.4g}") if isinstance(value, float) else value
               for name, value in figures.items()}
    print(" | ".join(f"{name} {value:,}" if isinstance(value, (int, float)) else f"{name} {value}"
                     for name, value in rounded.items()))
    print(json.dumps(rounded))


if __name__ == "__main__":
    run_main(main)
