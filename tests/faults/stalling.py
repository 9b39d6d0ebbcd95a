"""A stage of which one process stalls at a step: python stalling.py RANK STEP stage.py ..."""

import os
import runpy
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import train.run  # noqa: E402
import train.watchdog  # noqa: E402

stalls, step, script = os.environ["RANK"] == sys.argv[1], int(sys.argv[2]), sys.argv[3]
train.run.peak_flops = lambda machine: 1e12
train.watchdog.ANSWER_SECONDS = 3.0
forward, least, batches = train.run.Run.forward, train.watchdog.least, []


def stalling_forward(run, batch):
    batches.append(batch)
    if stalls and len(batches) > step:
        time.sleep(1000)
    return forward(run, batch)


def late_least(found):
    """The stalled process ends first, which breaks the connections of the others."""
    time.sleep(0 if stalls else 1)
    return least(found)


train.run.Run.forward, train.watchdog.least = stalling_forward, late_least
sys.argv = sys.argv[3:]
runpy.run_path(str(ROOT / script), run_name="__main__")
