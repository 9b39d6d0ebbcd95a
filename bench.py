"""The speed of training steps.

    python bench.py configs/full/pretrain.py                     # a training step of any stage
    torchrun --standalone --nproc_per_node=8 bench.py configs/full/sft.py --micro_rows=16
    python bench.py plan configs/demo                            # minutes of every stage

More commands are in docs/performance.md. The data are random, but packed and decoded like real
ones. Settings of the config's stage can be given too. Except for plan, the output ends with the
figures as JSON.
"""

import dataclasses
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.training import STAGES, Training, plan, profile, step_speed
from common.config import UserError, parse, run_main
from tokenizer import SPECIALS


@dataclass
class Config:
    # --- measurement
    steps: int = 4  # steps of a measurement; there are five measurements, after two warm-up steps
    profile: bool = False  # print the most expensive operations of a step instead
    vocabulary: int = 50304  # number of the tokenizer's ids, for plan


def main():
    argv = sys.argv[1:]
    planning = argv[:1] == ["plan"]
    own = ("--help", *(f"--{field.name}=" for field in dataclasses.fields(Config)))
    bench = parse(Config, [flag for flag in argv if flag.startswith(own)], "[plan] CONFIG")
    argv = [flag for flag in argv[planning:] if not flag.startswith(own)]
    if bench.steps < 1 or bench.vocabulary <= len(SPECIALS):
        raise UserError(f"--steps must be at least 1, --vocabulary above {len(SPECIALS)}")
    if planning:
        plan(argv[0] if argv else "configs/demo", bench.vocabulary)
    else:
        training = Training(*read_config(argv, STAGES))
        figures = (profile if bench.profile else step_speed)(training, bench.steps)
        if training.run.machine.is_main:
            show(figures)
        training.run.machine.leave()


def read_config(argv, stages):
    """(settings, stage, folder of the config) of the command line of a stage."""
    path = Path(argv[0] if argv else "")
    if path.stem not in stages:
        raise UserError("which config? For example configs/full/vision_pretrain.py; here its name "
                        f"must be one of the stages {', '.join(stages)}")
    return parse(importlib.import_module(path.stem).Config, argv), path.stem, path.parent


def show(figures):
    """Print the figures, rounded, as JSON with one of them per line."""
    rounded = {name: float(f"{value:.4g}") if isinstance(value, float) else value
               for name, value in figures.items()}
    print("\n" + json.dumps(rounded, indent=1))


if __name__ == "__main__":
    run_main(main)
