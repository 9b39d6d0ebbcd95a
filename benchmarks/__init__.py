"""Timing, for bench.py: every figure is a median, and what is compared takes turns."""

import statistics
import time

REPEATS = 5  # measurements of which a figure is the median
WARM = 2  # uncounted steps before them


def elapsed(function, *args):
    """The seconds that function(*args) takes."""
    began = time.perf_counter()
    function(*args)
    return time.perf_counter() - began


def in_turn(functions, repeats, warm):
    """{name: median seconds} of functions that are called in turn, `warm` times uncounted."""
    seconds = {name: [] for name in functions}
    for _ in range(warm + repeats):
        for name, function in functions.items():
            seconds[name].append(elapsed(function))
    return {name: statistics.median(times[warm:]) for name, times in seconds.items()}
