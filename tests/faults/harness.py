"""Scripts as processes that a test can kill at any moment, started in a tenth of a second.

A start of Python and PyTorch takes seconds, so multiprocessing's forkserver imports once what the
scripts need and forks a child for every start. The child is a process like any other: it has its
own session and runs the script as `python script.py ...` would.
"""

import atexit
import contextlib
import ctypes
import functools
import importlib
import itertools
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = ("clip_pretrain", "pretrain", "sft", "vision_pretrain", "vision_sft", "prepare")


def start(*argv, folder=ROOT, below="", die_at=0, before=(), **environment):
    """A Job: `python argv...` in `folder`, with these variables besides.

    below: a folder of which every change is recorded in Job.changes; at change number die_at the
    process kills itself. before: functions of this file that the process calls first.
    """
    outputs, jobs = session()
    output = outputs / f"output_{len(jobs):04d}.txt"
    jobs.append(Job(output, [str(word) for word in argv], folder, below and os.path.realpath(below),
                    die_at, before, {name: str(value) for name, value in environment.items()}))
    return jobs[-1]


def start_together(ranks, *argv, **more):
    """`ranks` Jobs that are one training job, as torchrun would start them."""
    if ranks == 1:
        return [start(*argv, **more)]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost",
              "MASTER_PORT": free_port(), **more}
    return [start(*argv, **shared, RANK=rank, LOCAL_RANK=rank) for rank in range(ranks)]


@functools.cache
def session():
    """(folder of the outputs, list of the Jobs) of this test session; starts the forkserver."""
    multiprocessing.set_forkserver_preload([*SCRIPTS, "matplotlib.figure", "faults.harness"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT}/tests"  # Python 3.11 does not hand on sys.path
    forkserver.ensure_running()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    folder, jobs = Path(tempfile.mkdtemp()), []
    atexit.register(lambda: ([job.kill(signal.SIGKILL) for job in jobs], shutil.rmtree(folder)))
    return folder, jobs


class Job:
    """A started script."""

    def __init__(self, output, *more):
        self.output = output
        self.process = multiprocessing.get_context("forkserver").Process(
            target=run_script, args=(output, *more))
        self.process.start()

    def poll(self):
        """Its status, negative for the number of a signal; None while it runs."""
        return self.process.exitcode

    def wait(self, seconds=120):
        """Its status when it has ended."""
        try:
            until(lambda: self.poll() is not None, seconds, 0.005)
        except AssertionError:
            self.kill(signal.SIGKILL)
            raise AssertionError(f"still running after {seconds} s: {self.said}") from None
        return self.poll()

    def kill(self, number):
        """Send a signal, if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def hold(self):
        """Stop it, and wait until each of its threads is stopped."""
        self.kill(signal.SIGSTOP)
        until(lambda: self.poll() is not None or self.thread_states() <= {"T"})

    def thread_states(self):
        found = set()
        for path in Path(f"/proc/{self.process.pid}/task").glob("*/stat"):
            with contextlib.suppress(OSError):  # that thread has ended
                found.add(path.read_text().rpartition(")")[2].split()[0])
        return found

    @property
    def changes(self):
        """What it changed in the folder `below`, one line per change."""
        path = self.output.with_suffix(".changes")
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    @property
    def said(self):
        return self.output.read_text(encoding="utf-8") if self.output.exists() else ""


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def torchrun(flags, environment, *argv):
    """A running torchrun of a script: the real one, so a start takes seconds."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *flags, *map(str, argv)], text=True,
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def ended(job, seconds=400):
    """The output of a torchrun once it has ended; none of its processes may be left."""
    left = workers_of(job)
    try:
        said = job.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        job.send_signal(signal.SIGTERM)
        raise AssertionError(f"it did not end: {job.communicate(timeout=60)[0]}") from None
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in left))
    return said


def workers_of(job):
    """The ids of the processes that a running torchrun has started."""
    path = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def worker(job, rank):
    """The id of the process of this rank."""
    return next(pid for pid in workers_of(job)
                if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes())


def until(condition, seconds=60, every=0.002):
    """Wait until condition() is true and return its value; AssertionError after so long.

    Counts checks instead of reading the clock, so that a suspended machine fails no test.
    """
    for _ in range(round(seconds / every)):
        if found := condition():
            return found
        time.sleep(every)
    raise AssertionError("waited in vain")


def chance(*seed):
    """Random numbers that are the same in every run of the tests."""
    return random.Random("-".join(map(str, seed)))


# ---- in the child ------------------------------------------------------------------------------


def run_script(output, argv, folder, below, die_at, before, environment):
    """Become the process that `python argv...` would be."""
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    os.environ.update(environment)
    assign("train.run.peak_flops", lambda machine: 1e12)  # not measured
    for prepare in before:
        prepare()
    os.chdir(folder)
    if below:
        record_changes(below, die_at, output.with_suffix(".changes"))
    sys.argv = [str(ROOT / argv[0]), *argv[1:]]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())  # which the watchdog replaces and multiprocessing ignores
        sys.exit(1)


def assign(name, value):
    """Set "module.NAME" to a value."""
    module, _, name = name.rpartition(".")
    setattr(importlib.import_module(module), name, value)


def join_namespace(pid):
    """See the disks that process `pid` sees."""
    handles = [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY) for kind in ("user", "mnt")]
    for handle in handles:
        assert ctypes.CDLL(None).setns(handle, 0) == 0


def stall(rank, step):
    """Let the process of this rank sleep at a step, and all report stalls after 3 seconds."""
    from train import watchdog
    from train.run import Run

    stalls, forward, least = os.environ["RANK"] == str(rank), Run.forward, watchdog.least
    steps = itertools.count(1)

    def stalling_forward(run, batch):
        if stalls and next(steps) > step:
            time.sleep(1000)
        return forward(run, batch)

    def late_least(found):
        """The stalled process ends first, which breaks the connections of the others."""
        time.sleep(0 if stalls else 1)
        return least(found)

    Run.forward, watchdog.least, watchdog.ANSWER_SECONDS = stalling_forward, late_least, 3.0


# Python's audit events of changes, and which argument is the folder that the name is relative to
CHANGES = {"open": None, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 2,
           "os.link": 2, "os.truncate": None}


def record_changes(below, die_at, path):
    """Record every change that Python makes in the folder `below` in `path`, before it is made; at
    number die_at die instead. A file that was to be replaced is then empty, as after a death
    between opening and writing."""
    notes = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    numbers, dying = itertools.count(1), []

    def hook(event, args):
        if event not in CHANGES or dying or not (name := place(event, args)).startswith(below):
            return
        number = next(numbers)
        os.write(notes, f"{event} {name.removeprefix(below)}\n".encode())
        if number == die_at:
            dying.append(number)
            if event == "open" and args[2] & os.O_TRUNC and os.path.isfile(name):
                os.truncate(name, 0)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def place(event, args):
    """The absolute path of what an event changes, "" if it changes nothing."""
    if isinstance(args[0], int) or (
            event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR)):
        return ""
    folder = args[CHANGES[event]] if CHANGES[event] else -1
    start = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else os.getcwd()
    return os.path.realpath(os.path.join(start, os.fsdecode(args[0])))
