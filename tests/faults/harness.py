"""Processes that a test may kill at any moment, started in a tenth of a second.

A start of Python and PyTorch takes seconds. So one process, the server, imports what the scripts
need and forks a child for every start. The child is a process as any other: it is alone in its
session, runs the script as `python script.py ...` would, and SIGKILL is SIGKILL.

    python harness.py          # the server: answers lines of JSON on its standard input
"""

import contextlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent.parent


class Server:
    """The process that forks. `start` gives a Job for each script."""

    def __init__(self, folder):
        """folder: where the children's output goes."""
        self.folder, self.count = Path(folder), 0
        self.process = subprocess.Popen(
            [sys.executable, HERE], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.ask(None)

    def ask(self, question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, *argv, **environment):
        """A Job: `python argv...` with these variables besides."""
        self.count += 1
        output = self.folder / f"said_{self.count:04d}.txt"
        pid = self.ask({"argv": [str(word) for word in argv], "output": str(output),
                        "environment": {name: str(value) for name, value in environment.items()}})
        return Job(self, pid, output)

    def start_together(self, ranks, *argv, **environment):
        """`ranks` Jobs that are one job, as torchrun would start them."""
        shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost",
                  "MASTER_PORT": free_port(), **environment} if ranks > 1 else environment
        numbers = [{"RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {} for rank in range(ranks)]
        return [self.start(*argv, **shared, **number) for number in numbers]

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
            self.status = self.server.ask({"poll": self.pid})
        return self.status

    def wait(self, seconds=120):
        """Its status when it has ended."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill(signal.SIGKILL)
                raise AssertionError(f"it has not ended in {seconds} s; it said: {self.said}")
            time.sleep(0.005)
        return self.status

    def kill(self, number):
        """Send a signal; to one that has ended already, none."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    @property
    def said(self):
        return self.output.read_text(encoding="utf-8")


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def until(condition, seconds=60, every=0.002):
    """Wait until condition() is true; returns what it gave, AssertionError after so long."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(every)
    return found


def chance(*seed):
    """Random numbers that are the same at every run of the tests."""
    return random.Random("-".join(map(str, seed)))


# ------------------------------------------------------------------------------------ the server


def serve():
    """Fork a child for every line that names a script, and say of each how it ended."""
    sys.path.insert(0, str(ROOT))
    import_all()
    running, ended = set(), {}
    while line := sys.stdin.readline():
        question, answer = json.loads(line), None
        if question and "argv" in question:
            answer = fork(question)
            running.add(answer)
        elif question:
            ended |= {pid: status for pid in running if (status := status_of(pid)) is not None}
            running -= ended.keys()
            answer = ended.get(question["poll"])
        print(json.dumps(answer), flush=True)
    for pid in running:  # who asked has gone
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def import_all():
    """What the scripts import, so that a child need not; no thread may be running after."""
    import clip_pretrain  # noqa: F401
    import common.run
    import matplotlib.figure  # noqa: F401
    import prepare  # noqa: F401
    import pretrain  # noqa: F401
    import sft  # noqa: F401
    import tyro  # noqa: F401
    import vision_pretrain  # noqa: F401
    import vision_sft  # noqa: F401

    common.run.peak_flops = lambda machine: 1e12  # not measured, as in the other tests
    with contextlib.suppress(FileNotFoundError):
        assert len(os.listdir("/proc/self/task")) == 1  # or a fork would not be a whole process


def status_of(pid):
    """How a child ended, or None while it runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def fork(question):
    """The id of a new process that runs a script and never returns here."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.setsid()
        output = os.open(question["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(question["environment"])
        status = run_script(question["argv"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_script(argv):
    """Run it as Python would; returns its exit status."""
    sys.argv = [str(ROOT / argv[0]), *argv[1:]]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT
                      else signal.SIG_DFL)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    serve()
