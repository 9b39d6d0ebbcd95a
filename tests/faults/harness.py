"""Processes that a test can kill at any moment, started in a tenth of a second.

A start of Python and PyTorch takes seconds. So one process, the server, imports what the scripts
need and forks a child for every start. The child is a process like any other: it has its own
session and runs the script as `python script.py ...` would.

    python harness.py          # the server: answers lines of JSON on its standard input
"""

import atexit
import contextlib
import functools
import importlib
import itertools
import json
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
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent.parent


class Server:
    """The process that forks. `start` gives a Job for each script.

    folder: for the children's output; prefix: the beginning of a command that starts the server.
    """

    def __init__(self, folder, prefix=()):
        self.folder, self.count, self.began = Path(folder), 0, time.monotonic()
        self.process = subprocess.Popen(
            [*prefix, sys.executable, HERE], text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.ask()

    def ask(self, **question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, *argv, folder=ROOT, below="", die_at=0, settings=(), **environment):
        """A Job: `python argv...` in `folder`, with these variables besides.

        below: a folder of which every change is recorded in Job.changes; at change number die_at
        the process kills itself. settings: ("module.NAME", value) pairs to set beforehand.
        """
        self.count += 1
        output = self.folder / f"output_{self.count:04d}.txt"
        pid = self.ask(argv=[str(word) for word in argv], output=str(output), folder=str(folder),
                       below=os.path.realpath(below) if below else "", die_at=die_at,
                       settings=list(settings),
                       environment={name: str(value) for name, value in environment.items()})
        return Job(self, pid, output)

    def start_together(self, ranks, *argv, **environment):
        """`ranks` Jobs that are one training job, as torchrun would start them."""
        if ranks == 1:
            return [self.start(*argv, **environment)]
        shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost",
                  "MASTER_PORT": free_port(), **environment}
        return [self.start(*argv, **shared, RANK=rank, LOCAL_RANK=rank) for rank in range(ranks)]

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


@dataclass
class Job:
    """A started script."""

    server: Server
    pid: int
    output: Path
    status: int | None = None  # as subprocess gives it: negative for the number of a signal

    def poll(self):
        """Its status, or None while it runs."""
        if self.status is None:
            self.status = self.server.ask(poll=self.pid)
        return self.status

    def wait(self, seconds=120):
        """Its status when it has ended."""
        try:
            until(lambda: self.poll() is not None, seconds, 0.005)
        except AssertionError:
            self.kill(signal.SIGKILL)
            raise AssertionError(f"still running after {seconds} s: {self.said}") from None
        return self.status

    def kill(self, number):
        """Send a signal, if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def hold(self):
        """Stop it, and wait until each of its threads is stopped."""
        self.kill(signal.SIGSTOP)
        until(lambda: self.poll() is not None or self.thread_states() <= {"T"})

    def thread_states(self):
        found = set()
        for path in Path(f"/proc/{self.pid}/task").glob("*/stat"):
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


@functools.cache
def server():
    """The one Server of this test session."""
    folder = tempfile.mkdtemp()
    found = Server(folder)
    atexit.register(lambda: (found.close(), shutil.rmtree(folder)))
    return found


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


# ---- the server ---------------------------------------------------------------------------------


def serve():
    """Fork a child for every line that names a script, and tell how each ended."""
    sys.path.insert(0, str(ROOT))
    import_all()
    running, ended = set(), {}
    while line := sys.stdin.readline():
        question, answer = json.loads(line), None
        if "argv" in question:
            answer = fork(**question)
            running.add(answer)
        elif question:
            ended |= {pid: status for pid in running if (status := status_of(pid)) is not None}
            running -= ended.keys()
            answer = ended.get(question["poll"])
        print(json.dumps(answer), flush=True)
    for pid in running:  # the tests are over
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def import_all():
    """Import what the scripts need; no other thread may be running afterwards."""
    for name in ("clip_pretrain", "pretrain", "sft", "vision_pretrain", "vision_sft", "prepare",
                 "matplotlib.figure"):
        importlib.import_module(name)
    import train.run

    train.run.peak_flops = lambda machine: 1e12  # not measured, as in the other tests
    with contextlib.suppress(FileNotFoundError):
        assert len(os.listdir("/proc/self/task")) == 1  # or a forked process would be incomplete


def status_of(pid):
    """How a child ended, or None while it runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def fork(argv, output, folder, below, die_at, settings, environment):
    """The id of a new process, in which this raises SystemExit when its script has ended."""
    if pid := os.fork():
        return pid
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, handle in enumerate((os.open(os.devnull, os.O_RDONLY), file, file)):
        os.dup2(handle, number)
    os.environ.update(environment)
    os.chdir(folder)
    for name, value in settings:
        module, _, name = name.rpartition(".")
        setattr(importlib.import_module(module), name, value)
    if below:
        record_changes(below, die_at, Path(output).with_suffix(".changes"))
    sys.argv = [str(ROOT / argv[0]), *argv[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit(0)


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


if __name__ == "__main__":
    serve()
