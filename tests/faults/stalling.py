"""A stage of which one process falls asleep at a step: python stalling.py RANK STEP stage.py ..."""

import os
import runpy
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import train.run  # noqa: E402
import train.watchdog  # noqa: E402

rank, step, script = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
train.run.peak_flops = lambda machine: 1e12
train.watchdog.ANSWER_SECONDS = 3.0
forward, seen = train.run.Run.forward, []


def sleepy_forward(run, batch):
    seen.append(batch)
    if os.environ["RANK"] == str(rank) and len(seen) > step:
        time.sleep(1000)
    return forward(run, batch)


def late_least(found):
    """Whoever sleeps ends first, and so breaks the others' connections before they have ended."""
    if os.environ["RANK"] != str(rank):
        time.sleep(1)
    return least(found)


train.run.Run.forward = sleepy_forward
least, train.watchdog.least = train.watchdog.least, late_least
sys.argv = sys.argv[3:]
runpy.run_path(str(ROOT / script), run_name="__main__")
