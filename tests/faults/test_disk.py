"""A disk that is full, read-only, or gone: what was saved stays, and the same command goes on.

The disk is one in memory, in a name space of its own, that only the tests' processes see.
"""

import contextlib
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import log_rows, newest

from common import checkpoint
from faults.conftest import FULL, scale
from faults.harness import Server, chance, until
from faults.test_kill import Tries, assert_intact, assert_same_run

SIZE = 8  # MB
MOUNT = f'mount -t tmpfs -o size={SIZE}m tmpfs "$0" && exec "$@"'
FULL_DISK = "No space left on device"


class Disk:
    """A small disk, and a Server whose processes see it."""

    def __init__(self, folder):
        self.place = folder / "disk"  # for the processes
        self.place.mkdir()
        self.server = Server(folder, ["unshare", "-rm", "bash", "-c", MOUNT, self.place])
        self.here = Path(f"/proc/{self.server.process.pid}/root{self.place}")  # for the tests

    def clear(self):
        for path in self.here.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def leave(self, kilobytes):
        """Fill the disk up to so much."""
        (self.here / "others").write_bytes(bytes(1000 * max(0, self.free() - kilobytes)))

    def free(self):
        return shutil.disk_usage(self.here).free // 1000

    def remount(self, how):
        subprocess.run(["nsenter", "-t", str(self.server.process.pid), "-U", "-m",
                        "--preserve-credentials", "mount", "-o", f"remount,{how}", self.place],
                       check=True, capture_output=True)


@pytest.fixture(scope="module")
def the_disk(tmp_path_factory):
    may = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False)
    if may.returncode:
        pytest.skip(f"no disk of its own: {may.stderr.decode()}")
    disk = Disk(tmp_path_factory.mktemp("disks"))
    yield disk
    disk.server.close()


@pytest.fixture
def disk(the_disk):
    yield the_disk
    the_disk.remount("rw")
    the_disk.clear()


class OnDisk(Tries):
    """A stage whose run is on the disk."""

    def __init__(self, pipeline, disk, ranks=1, stage="pretrain"):
        self.disk = disk
        super().__init__(pipeline, stage, ranks, disk.here, "--eval_every=0")

    def begin(self, *more):
        """Jobs of the run on the disk."""
        return self.disk.server.start_together(
            self.ranks, *self.command, f"--out={self.disk.place}/run", *more)

    def fresh(self):
        self.out = self.disk.here / "run"

    def goes_on(self, step):
        """Start once more, on a disk that is in order: from this step, to the same bits."""
        jobs = self.begin()
        self.ended(jobs)
        said = f"resuming from {self.disk.place}/run/step_{step:08d}"
        assert (said in jobs[0].said) == (step > 0), jobs[0].said
        self.compare()


def refusal(job, words):
    """The one sentence that a job ended with; no traceback."""
    assert job.wait() == 1, job.said
    lines = [line for line in job.said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and job.said.splitlines()[-1] == lines[0], job.said
    assert re.search(words, lines[0]) and "Traceback" not in job.said, job.said
    return lines[0]


def stopped_at(jobs, out, step):
    """Hold the jobs as soon as the run has logged a step."""
    log = out / "log.jsonl"
    until(lambda: log.exists() and log.read_text().count("\n") > step)
    for job in jobs:
        job.hold()


def read_only(disk, jobs):
    """Make the disk read-only under stopped jobs, when they have no file open."""
    for _ in range(100):
        with contextlib.suppress(subprocess.CalledProcessError):
            return disk.remount("ro")
        go_on(jobs)
        time.sleep(0.005)
        for job in jobs:
            job.hold()
    raise AssertionError("they write all the time")


def go_on(jobs):
    for job in jobs:
        job.kill(signal.SIGCONT)


def test_on_a_disk_with_room_for_two_checkpoints_the_older_makes_room(pipeline, disk):
    run = OnDisk(pipeline, disk)
    disk.leave(1700)
    jobs = run.begin()
    run.ended(jobs)
    assert "cannot write" not in jobs[0].said
    run.compare()


@pytest.mark.parametrize("ranks", scale([1], [1, 2]))
def test_on_a_disk_with_room_for_one_checkpoint_that_one_stands(pipeline, disk, ranks):
    run = OnDisk(pipeline, disk, ranks)
    disk.leave(1000)
    jobs = run.begin()
    statuses = [job.wait() for job in jobs]
    assert all(statuses), jobs[0].said
    refusal(jobs[0], f"cannot write the checkpoint of step 24 .*{FULL_DISK}.*the one before is "
                     "complete")
    assert f"{FULL_DISK}; the one before is complete; training continues" in jobs[0].said
    assert list(checkpoint.steps_in(run.out)) == [3] and not list(run.out.glob(".writing*"))
    disk.leave(SIZE * 1000)
    run.goes_on(3)


@pytest.mark.skipif(not FULL, reason="the processes may have to be waited for")
def test_all_processes_know_that_a_save_failed(pipeline, disk):
    """Asked to stop at the step of a save that fails."""
    run = OnDisk(pipeline, disk, 2)
    disk.leave(100)
    jobs = run.begin("--save_every=1", "--time_limit=1e-9")
    assert all(job.wait(60) for job in jobs)
    refusal(jobs[0], f"cannot write the checkpoint of step 1 .*{FULL_DISK}")
    disk.leave(SIZE * 1000)
    run.goes_on(0)


@pytest.mark.parametrize("what", scale(["full"], ["full", "read-only", "gone"]))
def test_a_disk_that_fails_in_the_middle_of_a_run_loses_nothing(pipeline, disk, what):
    """Filled, made read-only, or the folder removed. Where older checkpoints can make room, or the
    folder can be made anew, the run ends as if nothing had been."""
    run = OnDisk(pipeline, disk)
    jobs = run.begin()
    stopped_at(jobs, run.out, chance(what).randrange(4, 12))
    before = list(checkpoint.steps_in(run.out))[-1:]
    if what == "gone":
        shutil.rmtree(run.out)
    else:
        disk.leave(0) if what == "full" else read_only(disk, jobs)
    go_on(jobs)
    if what != "read-only":
        run.ended(jobs)
        return run.compare()
    refusal(jobs[0], "cannot write .*Read-only file system")
    assert "log.jsonl: " in jobs[0].said and list(checkpoint.steps_in(run.out))[-1] >= before[0]
    disk.remount("rw")
    run.goes_on(list(checkpoint.steps_in(run.out))[-1])


def test_a_folder_that_cannot_be_written_is_refused(pipeline, disk):
    run = OnDisk(pipeline, disk)
    disk.remount("ro")
    refusal(run.begin()[0], f"--out={disk.place}/run cannot be made a folder.*Read-only")
    disk.remount("rw")
    jobs = run.begin()
    stopped_at(jobs, run.out, 6)
    jobs[0].kill(signal.SIGKILL)
    jobs[0].wait()
    disk.remount("ro")
    refusal(run.begin()[0], "cannot be .*written into: Read-only")
    disk.remount("rw")
    run.goes_on(list(checkpoint.steps_in(run.out))[-1])


def test_a_log_that_was_cut_in_the_middle_of_a_line_is_mended(pipeline, disk):
    run = OnDisk(pipeline, disk)
    jobs = run.begin()
    stopped_at(jobs, run.out, 10)
    jobs[0].kill(signal.SIGKILL)
    jobs[0].wait()
    step = int(assert_intact(run.out).name[-8:])
    log = run.out / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    assert len(lines) > step
    log.write_text("".join(lines[:step]) + lines[step][:9])
    run.goes_on(step)
    assert [row["step"] for row in log_rows(run.out)][:24] == list(range(24))
    assert_same_run(run.out, run.expected)
    assert newest(run.out).name == "step_00000024"
