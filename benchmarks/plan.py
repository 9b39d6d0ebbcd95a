"""How long the stages of a folder of configs will take on this machine, measured beforehand.

    python bench.py plan configs/demo

Every stage takes a step on random data of its own sizes, after one that does not count. A machine
that would need hours is told so, and what to do instead.
"""

import contextlib
import dataclasses
import importlib
import io
import tempfile
import time
from pathlib import Path

from common.config import UserError, parse
from tokenizer import SPECIALS, Tokenizer
from train.log import duration

STAGES = ("clip_pretrain", "pretrain", "sft", "vision_pretrain", "vision_sft")  # in their order
SLOW = 45 * 60  # seconds: about twice what the slowest processor in docs/processors.md needs


def plan(folder, vocabulary, make_training):
    """Print the minutes of each stage of `folder`; returns their sum in seconds.

    vocabulary: ids of the tokenizer, as the data may not be there yet; make_training(cfg, stage,
    folder, tokenizer) gives a bench.Training.
    """
    stages = [stage for stage in STAGES if (Path(folder) / f"{stage}.py").is_file()]
    if not stages:
        raise UserError(f"{folder} has no config of a stage, like {folder}/pretrain.py")
    first = vocabulary - len(SPECIALS) + 1
    tokenizer = Tokenizer("random", None, None, first, first - 1, "")
    total = 0.0
    for stage in stages:
        cfg = parse(importlib.import_module(stage).Config, [f"{folder}/{stage}.py"])
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            cfg = dataclasses.replace(cfg, out=out, resume=False, tracker="none")
            training = make_training(cfg, stage, Path(folder), tokenizer)
            training.take([0])
            began = time.perf_counter()
            training.take([1])
            step = time.perf_counter() - began
            training.loader.close()
        seconds = step * cfg.max_steps
        print(f"{stage:16s} {cfg.max_steps:6,} steps of {step * 1e3:5,.0f} ms: "
              f"{duration(seconds)}", flush=True)
        total += seconds
    print(f"{'all stages':16s} about {duration(total)} on {training.run.machine.name} in "
          f"{str(training.run.machine.dtype)[6:]}; evaluations add about a tenth", flush=True)
    if total > SLOW:
        print(f"This machine is slower than any in docs/processors.md. A shorter run shows the "
              f"same road with lower scores: STEPS=0.2 make demo takes about "
              f"{duration(0.2 * total)}. A free GPU in the cloud trains configs/t4 in an evening.")
    return total
