"""Timing of programs that take turns, so that what disturbs one disturbs the others too."""

import statistics

from benchmarks import elapsed


def in_turn(functions, repeats, warm):
    """{name: median seconds} of functions that are called in turn, `warm` times uncounted."""
    seconds = {name: [] for name in functions}
    for _ in range(warm + repeats):
        for name, function in functions.items():
            seconds[name].append(elapsed(function))
    return {name: statistics.median(times[warm:]) for name, times in seconds.items()}
