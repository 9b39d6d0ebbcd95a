"""Who the others wait for: a process that stalls is named, and the job ends.

Every process counts the places it passes. One that has not passed any for too long writes down how
far it came, beside the checkpoints, where all can read it; the one that came least far, or wrote
nothing, is what the others wait for. While all goes well nothing is written or sent.
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
OTHERS = 30.0  # seconds that the processes have to write down how far they came


class Watch:
    """A thread that looks whether this process still gets on."""

    def __init__(self, folder, machine, minutes, long_minutes):
        self.folder, self.machine = Path(folder) / ".stalled", machine
        self.limits = {False: minutes * 60, True: long_minutes * 60}
        self.patient = False  # whether all takes long for now, as in a step that compiles
        self.count, self.place, self.limit = 0, "the beginning", self.limits[True]
        self.since, self.ended = time.monotonic(), threading.Event()
        self.thread, self.deciding = None, False

    def start(self):
        """Begin to watch, if there are others who could wait and a limit is set."""
        if self.machine.ranks > 1 and self.limits[False] > 0:
            self.file(self.machine.rank).unlink(missing_ok=True)
            self.machine.barrier()
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
            sys.excepthook = functools.partial(self._failed, sys.excepthook)

    def stop(self):
        self.ended.set()

    def passed(self, place, long=False):
        """This process has come to `place`, from where the next may take long."""
        self.place, self.since = place, time.monotonic()
        self.limit = self.limits[long or self.patient]
        self.count += 1

    def waits(self):
        """This process waits for what no other process is to blame for."""
        self.since = time.monotonic()

    def file(self, rank):
        return self.folder / f"process_{rank:05d}.json"

    def _watch(self):
        while not self.ended.wait(min(1.0, self.limit / 10)):
            idle = time.monotonic() - self.since
            if idle > self.limit:
                self._stalled(self.count, idle)

    def _failed(self, usual, *error):
        """In place of sys.excepthook: the connection to one that has ended is no error to show."""
        if self.deciding:
            self.thread.join()
        usual(*error)

    def _stalled(self, count, idle):
        """Name the process that is least far, and end this one, unless it got on meanwhile."""
        self.deciding = True
        write(self.file(self.machine.rank), {"count": count, "place": self.place})
        others = {}
        deadline = time.monotonic() + max(OTHERS, self.limit / 4)
        while len(others) < self.machine.ranks and time.monotonic() < deadline:
            if self.count != count or self.ended.wait(0.5):
                self.file(self.machine.rank).unlink(missing_ok=True)
                self.deciding = False
                return
            others = {rank: read(self.file(rank)) for rank in range(self.machine.ranks)
                      if self.file(rank).is_file()}
        if self.machine.rank == min(others, default=self.machine.rank):
            print(verdict(others, self.machine.ranks, idle), file=sys.stderr, flush=True)
        if others.get(self.machine.rank) == least(others):
            print(f"process {self.machine.rank} is here:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
        os._exit(STALLED)


def verdict(found, ranks, idle):
    """The sentence about {process: how far it came} of those that wrote it down."""
    silent = [str(rank) for rank in range(ranks) if rank not in found]
    if silent:
        who = f"process {', '.join(silent)} does not answer: it is stopped, or its machine is gone"
    elif len({some["count"] for some in found.values()}) == 1:
        who = (f"all processes wait in the same place ({found[0]['place']}): look at the network "
               "between them")
    else:
        behind = [rank for rank in found if found[rank] == least(found)]
        who = (f"process {', '.join(map(str, behind))} stalls behind {least(found)['place']}; the "
               "others wait for it")
    return (f"error: nothing has moved for {idle:.0f} seconds: {who}. The job ends; the same "
            "command goes on from the newest checkpoint")


def least(found):
    return min(found.values(), key=lambda some: some["count"], default=None)


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    fresh = path.with_suffix(".fresh")
    fresh.write_text(json.dumps(content), encoding="utf-8")
    fresh.replace(path)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))
