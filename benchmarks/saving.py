"""What a checkpoint costs: how long training stands still for it, how long writing and going on
take. `python bench.py save CONFIG` prints it.

    python bench.py save configs/full/pretrain.py --optimizer=adamw --context=256 --batch_tokens=256
"""

import statistics
import time

from benchmarks.baselines import REPEATS, WARM
from common import checkpoint
from common.device import peak_memory_gb


def save_costs(training):
    """{name: figure}, medians of five. Delays are of a step right behind a save, and of all steps
    while it is being written, against what these steps take otherwise."""
    run, step, plain = training.run, WARM, []
    training.take(range(WARM))
    for _ in range(REPEATS):
        plain.append(timed(lambda step=step: training.take([step])))
        step += 1
    run.saver.ended(wait=True)  # it has allocated memory, as long before the first save of a run
    usual, found = statistics.median(plain), {"written": [], "still": [], "next": [], "all": []}
    for _ in range(REPEATS):
        began = time.perf_counter()
        run.save(step)
        found["still"].append(time.perf_counter() - began)
        run.end_saving()
        found["written"].append(time.perf_counter() - began)
        step += 1
    for _ in range(REPEATS):
        began, first = time.perf_counter(), step
        run.save(step)
        while step == first or not run.saver.job.done():
            step += 1
            training.take([step])
            if step == first + 1:
                found["next"].append(time.perf_counter() - began - usual)
        found["all"].append(time.perf_counter() - began - (step - first) * usual)
        run.end_saving()
        step += 1
    folder = list(checkpoint.steps_in(run.folder).values())[-1]
    run.saver.memory.clear()
    going_on = [timed(lambda: go_on(run, folder)) for _ in range(REPEATS)]
    written = statistics.median(found["written"])
    return {"parameters_M": sum(p.numel() for p in training.model.parameters()) / 1e6,
            "checkpoint_gb": sum(p.stat().st_size for p in folder.rglob("*")) / 1e9,
            "step_s": usual, "written_s": written,
            "stands_still_s": statistics.median(found["still"]),
            "next_step_delay_s": statistics.median(found["next"]),
            "next_step_delay_of_written": statistics.median(found["next"]) / written,
            "all_steps_delay_s": statistics.median(found["all"]),
            "going_on_s": statistics.median(going_on), "host_gb": peak_memory_gb()[1]}


def timed(what):
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


def go_on(run, folder):
    """What a start has to do to go on from a checkpoint: check its sums, read it, take it over."""
    _, weights, state = checkpoint.read(folder, with_state=True)
    checkpoint.load_weights(run.model, weights, folder)
    run.optimizer.load_state_dict(state["optimizer"])
