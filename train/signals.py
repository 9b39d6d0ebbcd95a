"""Being asked to stop: SIGTERM, Ctrl-C, and --time_limit."""

import contextlib
import os
import signal
import time
from pathlib import Path

STOPPED_EARLY = 75  # exit status of a run that saved and can go on (EX_TEMPFAIL of sysexits.h)


class Stopping:
    """Whether this process should stop after the step it is in.

    torchrun and batch systems send one wish to stop several times over, so a second SIGTERM, or a
    SIGINT within a second, is not another wish; a later Ctrl-C ends the process at once.
    """

    def __init__(self, minutes):
        self.minutes, self.asked = minutes, None
        self.began = time.monotonic() - torchrun_before()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def __call__(self):
        minutes = (time.monotonic() - self.began) / 60
        return self.asked is not None or 0 < self.minutes < minutes

    def _on_signal(self, number, frame):
        if self.asked is None:
            self.asked = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.asked > 1:
            os._exit(128 + number)


def torchrun_before():
    """Seconds that torchrun was there before this process (0 without it, and without /proc).

    torchrun starts a process that died again, and a time limit is the job's, not the process's.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with contextlib.suppress(OSError):
            mine, its = (begun(process) for process in ("self", os.getppid()))
            return max(0, mine - its) / os.sysconf("SC_CLK_TCK")
    return 0.0


def begun(process):
    """When a process began, in ticks of the system's clock."""
    status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    return int(status.rpartition(")")[2].split()[19])


def end_torchrun():
    """Ask torchrun to stop: with --max-restarts it would take processes that stopped early for
    dead ones, and start them again."""
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if os.environ.get("LOCAL_RANK") == "0" and restarts > "0":
        os.kill(os.getppid(), signal.SIGTERM)
