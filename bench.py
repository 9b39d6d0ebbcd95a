"""The speed of training steps.

    python bench.py configs/full/pretrain.py                     # a training step of any stage
    torchrun --standalone --nproc_per_node=8 bench.py configs/full/sft.py --micro_rows=16
    python bench.py plan configs/full                            # before anything is rented

plan lists what every stage needs, with hours and dollars on several GPUs (plan --help). Otherwise
the output ends with the figures of the step as JSON, and settings of the config's stage can be
given too. The data are random, but packed and decoded like real ones. More: docs/performance.md.
"""

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks import plan
from benchmarks.training import STAGES, Training, random_tokenizer, step_speed
from common.config import UserError, parse, parse_checkpoint, run_main
from tokenizer import SPECIALS


@dataclass
class Config:
    # --- measurement
    steps: int = 4  # steps of a measurement; there are five measurements, after two warm-up steps


def main():
    argv = sys.argv[1:]
    if argv[:1] == ["plan"]:
        folder, cfg = parse_checkpoint(plan.Config, argv[1:], "configs/demo", "plan FOLDER")
        if not len(SPECIALS) < cfg.vocabulary <= 65536:
            raise UserError(f"--vocabulary must be above {len(SPECIALS)} and at most 65536")
        return plan.plan(folder, cfg, random_tokenizer(cfg.vocabulary))
    own = ("--help", "--steps=")
    bench = parse(Config, [flag for flag in argv if flag.startswith(own)], "CONFIG")
    if bench.steps < 1:
        raise UserError("--steps must be at least 1")
    training = Training(*read_config([flag for flag in argv if not flag.startswith(own)], STAGES))
    figures = step_speed(training, bench.steps)
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
