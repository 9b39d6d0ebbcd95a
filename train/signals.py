"""Requests to stop: SIGTERM, Ctrl-C, and --time_limit."""

import contextlib
import os
import signal
import time
from pathlib import Path

STOPPED_EARLY = 75  # exit status of a run that saved and can resume (EX_TEMPFAIL of sysexits.h)


class StopSignal:
    """An instance, called, returns whether to stop: Run.steps asks after each step, then saves.

    torchrun and batch systems send a signal several times, so only a SIGINT more than a second
    after the first one ends the process at once.
    """

    def __init__(self, minutes):
        self.minutes, self.received = minutes, None  # when the first signal came
        self.began = time.monotonic() - torchrun_seconds()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def __call__(self):
        minutes = (time.monotonic() - self.began) / 60
        return self.received is not None or 0 < self.minutes < minutes

    def _on_signal(self, number, frame):
        if self.received is None:
            self.received = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.received > 1:
            os._exit(128 + number)


def torchrun_seconds():
    """How long torchrun, which restarts processes that died, ran before this one began (0 without
    it, and without /proc)."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with contextlib.suppress(OSError):
            ticks = [int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
                     for process in ("self", os.getppid())]  # their start times
            return max(0, ticks[0] - ticks[1]) / os.sysconf("SC_CLK_TCK")
    return 0.0


def end_torchrun():
    """Stop torchrun: with --max-restarts it would restart processes that stopped early."""
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if os.environ.get("LOCAL_RANK") == "0" and restarts > "0":
        os.kill(os.getppid(), signal.SIGTERM)
