"""Being asked to stop: SIGTERM, Ctrl-C, and --time_limit."""

import os
import signal
import time

STOPPED_EARLY = 75  # exit status of a run that saved and can go on (EX_TEMPFAIL of sysexits.h)


class Stopping:
    """Whether this process should stop after the step it is in.

    torchrun and batch systems send one wish to stop several times over, so a second SIGTERM, or a
    SIGINT within a second, is not another wish; a later Ctrl-C ends the process at once.
    """

    def __init__(self, minutes):
        self.minutes, self.began, self.asked = minutes, time.monotonic(), None
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
