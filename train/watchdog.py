"""The watchdog: a process that stalls is named, and the job ends (--step_timeout).

Every process counts the places that it passes. One that passes none for too long writes its count
beside the checkpoints, where all can read it; the process with the lowest count, or with none, is
the one that the others wait for. As long as all goes well nothing is written or sent.
"""

import faulthandler
import functools
import json
import os
import sys
import threading
import time
from pathlib import Path

STALLED = 76  # exit status of a job with a stalled process
ANSWER_SECONDS = 30.0  # how long the processes have to write their counts


class Watch:
    """A thread that checks whether this process makes progress."""

    def __init__(self, folder, machine, minutes, long_minutes):
        self.folder, self.machine = Path(folder) / ".stalled", machine
        self.limits = {False: minutes * 60, True: long_minutes * 60}
        self.patient = False  # whether every place may take long, as in a step that compiles
        self.count, self.place, self.limit = 0, "the beginning", self.limits[True]
        self.since, self.ended = time.monotonic(), threading.Event()
        self.thread, self.deciding = None, False

    def start(self):
        """Begin to watch, if there are other processes and a limit."""
        if self.machine.ranks > 1 and self.limits[False] > 0:
            self.file(self.machine.rank).unlink(missing_ok=True)
            self.machine.barrier()
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
            sys.excepthook = functools.partial(self._failed, sys.excepthook)

    def passed(self, place, long=False):
        """This process has passed `place`; long: the next may take the long limit."""
        self.place, self.since = place, time.monotonic()
        self.limit = self.limits[long or self.patient]
        self.count += 1

    def file(self, rank):
        return self.folder / f"process_{rank:05d}.json"

    def _watch(self):
        while not self.ended.wait(min(1.0, self.limit / 10)):
            idle = time.monotonic() - self.since
            if idle > self.limit:
                self._stalled(self.count, idle)

    def _failed(self, usual, *error):
        """In place of sys.excepthook: show no error of a connection to a process that ended."""
        if self.deciding:
            self.thread.join()
        usual(*error)

    def _stalled(self, count, idle):
        """Name the process that is behind and end this one, unless it makes progress meanwhile."""
        self.deciding = True
        own, ranks = self.file(self.machine.rank), range(self.machine.ranks)
        own.parent.mkdir(exist_ok=True)
        fresh = own.with_suffix(".fresh")
        fresh.write_text(json.dumps({"count": count, "place": self.place}), encoding="utf-8")
        fresh.replace(own)
        found = {}
        deadline = time.monotonic() + max(ANSWER_SECONDS, self.limit / 4)
        while len(found) < len(ranks) and time.monotonic() < deadline:
            if self.count != count or self.ended.wait(0.5):
                own.unlink(missing_ok=True)
                self.deciding = False
                return
            found = {rank: json.loads(self.file(rank).read_text(encoding="utf-8"))
                     for rank in ranks if self.file(rank).is_file()}
        if self.machine.rank == min(found, default=self.machine.rank):
            print(verdict(found, len(ranks), idle), file=sys.stderr, flush=True)
        if found.get(self.machine.rank) == least(found):
            print(f"process {self.machine.rank} is here:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
        os._exit(STALLED)


def verdict(found, ranks, idle):
    """The error message about `found`, {process: its count and place}."""
    silent = [str(rank) for rank in range(ranks) if rank not in found]
    behind = [str(rank) for rank in found if found[rank] == least(found)]
    if silent:
        who = f"process {', '.join(silent)} does not answer: stopped, or its machine is gone"
    elif len(behind) == ranks:
        who = f"all processes wait after {found[0]['place']}: check the network between them"
    else:
        who = f"process {', '.join(behind)} stalls after {least(found)['place']}"
    return (f"error: no progress for {idle:.0f} seconds: {who}. The job ends; the same command "
            "resumes from the newest checkpoint")


def least(found):
    return min(found.values(), key=lambda entry: entry["count"], default=None)
