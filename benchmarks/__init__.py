"""Timing, for bench.py: every figure is a median, and what is compared takes turns."""

import time

REPEATS = 5  # measurements of which a figure is the median
WARM = 2  # uncounted steps before them


def elapsed(function, *args):
    """The seconds that function(*args) takes."""
    began = time.perf_counter()
    function(*args)
    return time.perf_counter() - began


def in_turn(prepares, repeats=REPEATS, warm=WARM):
    """{name: seconds of each repeat}: prepare(i) of every name, in turn, returns what is timed."""
    seconds = {name: [] for name in prepares}
    for i in range(warm + repeats):
        for name, prepare in prepares.items():
            taken = elapsed(prepare(i))
            if i >= warm:
                seconds[name].append(taken)
    return seconds
