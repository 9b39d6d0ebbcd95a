"""Scripts as processes that a test can kill at any moment, started in a tenth of a second.

A start of Python and PyTorch takes seconds, so multiprocessing's forkserver imports once what the
scripts need and forks a child for every start. The child runs the script as `python script.py ...`
would, in a session of its own.
"""

import atexit
import contextlib
import ctypes
import functools
import importlib
import itertools
import multiprocessing
import os
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

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = ("clip_pretrain", "pretrain", "sft", "vision_pretrain", "vision_sft", "prepare")
FULL = os.environ.get("FAULTS") == "full"
LAUNCHER = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "240"}  # as runs/*.sh set it


def scale(few, many):
    """How often to try: `few` among the other tests, `many` where FAULTS=full is set."""
    return many if FULL else few


def start(*argv, folder=ROOT, die_at=None, before=(), **environment):
    """A Job: `python argv...` in `folder`, with these variables besides.

    die_at: record every change of a file in Job.changes, and die instead of this one (0: none).
    before: functions of this file that the process calls first.
    """
    outputs, jobs = session()
    output = outputs / f"output_{len(jobs):04d}.txt"
    jobs.append(Job(output, [str(word) for word in argv], folder, die_at, before,
                    {name: str(value) for name, value in environment.items()}))
    return jobs[-1]


def start_together(ranks, *argv, **more):
    """`ranks` Jobs that are one training job, as torchrun would start them; RANK in an argument
    stands for the rank of the process."""
    if ranks == 1:
        return [start(*argv, **more)]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost",
              "MASTER_PORT": free_port(), **more}
    return [start(*(str(word).replace("RANK", str(rank)) for word in argv), **shared, RANK=rank,
                  LOCAL_RANK=rank) for rank in range(ranks)]


@functools.cache
def session():
    """(folder of the outputs, list of the Jobs) of this test session; starts the forkserver."""
    multiprocessing.set_forkserver_preload([*SCRIPTS, "matplotlib.figure", "faults.harness"])
    with pytest.MonkeyPatch.context() as patch:  # Python 3.11 does not hand on sys.path
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT}/tests")
        forkserver.ensure_running()
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
        self.process.join(seconds)
        if self.poll() is None:
            self.kill(signal.SIGKILL)
            raise AssertionError(f"still running after {seconds} s: {self.said}")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # workers that a killed process left
        return self.poll()

    def kill(self, number):
        """Send a signal, if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    @property
    def changes(self):
        """The changes that it made, one line for each."""
        return self.output.with_suffix(".changes").read_text(encoding="utf-8").splitlines()

    @property
    def said(self):
        return self.output.read_text(encoding="utf-8") if self.output.exists() else ""


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def torchrun(flags, *argv):
    """A running torchrun of a script: the real one, so a start takes seconds."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *flags, *map(str, argv)], text=True,
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **LAUNCHER})


def ended(launcher, seconds=400):
    """The output of a torchrun once it has ended."""
    try:
        return launcher.communicate(timeout=seconds)[0]
    finally:
        launcher.terminate()  # it then ends its processes; killed, it would leave them behind


def worker(launcher, rank):
    """The id of the process of this rank that a running torchrun has started."""
    found = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return next(int(pid) for pid in found
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


def until_logged(folder, step):
    """Wait until a run has logged a step."""
    log = folder / "log.jsonl"
    until(lambda: log.exists() and log.read_text().count("\n") > step)


def run_script(output, argv, folder, die_at, before, environment):
    """Become the process that `python argv...` would be."""
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    os.environ.update(environment)
    assign("common.device.peak_flops", lambda machine: 1e12)  # not measured
    for prepare in before:
        prepare()
    os.chdir(folder)
    if die_at is not None:
        record_changes(die_at, output.with_suffix(".changes"))
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

    Run.forward, watchdog.ANSWER_SECONDS = stalling_forward, 3.0
    if not stalls:  # the stalled process ends first, which breaks the connections of the others
        watchdog.least = lambda found: time.sleep(1) or least(found)


def record_changes(die_at, path):
    """Record every change of a file in `path` before Python makes it, or die at number die_at.

    A file that was to be replaced is then empty, as after a death between opening and writing.
    """
    notes, numbers = os.open(path, os.O_WRONLY | os.O_CREAT), itertools.count(1)

    def hook(event, args):
        writes = (event == "open" and not isinstance(args[0], int)
                  and args[2] & (os.O_WRONLY | os.O_RDWR))
        if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link"):
            os.write(notes, f"{event} {os.fsdecode(args[0])}\n".encode())
            if next(numbers) == die_at:
                if writes and args[2] & os.O_TRUNC and os.path.isfile(args[0]):
                    os.truncate(args[0], 0)
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
