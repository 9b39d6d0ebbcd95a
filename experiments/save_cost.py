"""The cost of a checkpoint: the pause of training, the time of writing and of resuming.

    python experiments/save_cost.py configs/full/pretrain.py --optimizer=adamw --context=256 \\
        --batch_tokens=256
"""

import itertools
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import read_config
from benchmarks import REPEATS, WARM, elapsed
from benchmarks.training import STAGES, Training
from common import checkpoint
from common.config import run_main
from common.device import peak_memory_gb


def main():
    print(json.dumps(save_costs(Training(*read_config(sys.argv[1:], STAGES)))))


def save_costs(training):
    """{name: figure}, medians of five. next_step_delay is how much longer than usual the first step
    after a save takes, the pause included, while a thread writes the checkpoint."""
    run, numbers = training.run, itertools.count()
    seconds = {"pause": [], "next_step_delay": [], "written": []}

    def step():
        training.take([next(numbers)])

    usual = statistics.median([elapsed(step) for _ in range(WARM + REPEATS)][WARM:])
    run.saver.ended(wait=True)  # its memory is allocated, as long before the first save of a run
    for _ in range(REPEATS):
        began = time.perf_counter()
        seconds["pause"].append(elapsed(run.save, next(numbers)))
        step()
        seconds["next_step_delay"].append(time.perf_counter() - began - usual)
        run.end_saving()
        seconds["written"].append(time.perf_counter() - began)
    folder = list(checkpoint.steps_in(run.folder).values())[-1]
    seconds["resume"] = [elapsed(resume, run, folder) for _ in range(REPEATS)]
    return {"parameters_M": sum(p.numel() for p in training.model.parameters()) / 1e6,
            "checkpoint_gb": sum(p.stat().st_size for p in folder.rglob("*")) / 1e9,
            "step_s": usual, "host_gb": peak_memory_gb()[1],
            **{f"{name}_s": statistics.median(values) for name, values in seconds.items()}}


def resume(run, folder):
    """What resuming from a checkpoint does: verify its checksums, read it, load it."""
    _, weights, state = checkpoint.read(folder, with_state=True)
    checkpoint.load_weights(run.model, weights, folder)
    run.optimizer.load_state_dict(state["optimizer"])


if __name__ == "__main__":
    run_main(main)
