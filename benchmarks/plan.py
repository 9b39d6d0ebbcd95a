"""The time that the stages of a folder of configs will take on this machine.

    python bench.py plan configs/demo

Each stage takes one step on random data of its own sizes, after a step that is not counted.
"""

import contextlib
import dataclasses
import io
import tempfile
from pathlib import Path

from benchmarks import elapsed
from benchmarks.random_data import settings_of
from benchmarks.training import Training
from common.config import UserError
from tokenizer import SPECIALS, Tokenizer
from train.log import duration

STAGES = ("clip_pretrain", "pretrain", "sft", "vision_pretrain", "vision_sft")  # in working order
SLOW = 45 * 60  # seconds: about twice what the slowest processor in docs/processors.md needs


def plan(folder, vocabulary):
    """Print the minutes of each stage of `folder`; returns their sum in seconds.

    vocabulary: number of the tokenizer's ids, as the data may not be prepared yet.
    """
    stages = [stage for stage in STAGES if (Path(folder) / f"{stage}.py").is_file()]
    if not stages:
        raise UserError(f"{folder} has no config of a stage, like {folder}/pretrain.py")
    first = vocabulary - len(SPECIALS) + 1
    tokenizer = Tokenizer("random", None, None, first, first - 1, "")
    total = 0.0
    for stage in stages:
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            cfg = dataclasses.replace(settings_of(folder, stage), out=out, resume=False,
                                      tracker="none")
            training = Training(cfg, stage, folder, tokenizer)
            training.take([0])
            step = elapsed(training.take, [1])
            training.loader.close()
        seconds = step * cfg.max_steps
        print(f"{stage:16s} {cfg.max_steps:6,} steps of {step * 1e3:5,.0f} ms: "
              f"{duration(seconds)}", flush=True)
        total += seconds
    print(f"{'all stages':16s} about {duration(total)} on {training.run.machine.name} in "
          f"{str(training.run.machine.dtype)[6:]}; evaluations add about a tenth", flush=True)
    if total > SLOW:
        print("This machine is slower than any in docs/processors.md. A shorter run trains the "
              "same stages to lower scores: STEPS=0.2 make demo takes about "
              f"{duration(0.2 * total)}. A free GPU in the cloud trains configs/t4 in an evening.")
    return total
