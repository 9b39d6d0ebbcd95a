"""Timing, for bench.py."""

import time

REPEATS = 5  # measurements of which a figure is the median
WARM = 2  # uncounted steps before them


def elapsed(function, *args):
    """The seconds that function(*args) takes."""
    began = time.perf_counter()
    function(*args)
    return time.perf_counter() - began
