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


def in_turn(prepares, repeats, warm):
    """{name: median seconds}: prepare(i) of every name, in turn, returns the function to time."""
    seconds = {name: [] for name in prepares}
    for i in range(warm + repeats):
        for name, prepare in prepares.items():
            seconds[name].append(elapsed(prepare(i)))
    return {name: statistics.median(times[warm:]) for name, times in seconds.items()}
