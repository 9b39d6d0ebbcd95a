"""Checkpoints are written while training continues, and a disk that is full, read-only or gone
loses nothing that was saved.

The disk is one in memory, in a name space of its own, that only the tests' processes see.
"""

import re
import shutil
import signal
import subprocess
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import log_rows
from test_stages import assert_same_weights

from common import checkpoint
from faults.conftest import scale
from faults.harness import chance, join_namespace, start_together, until
from faults.test_kill import Tries, assert_intact
from train.async_save import Saver

SIZE = 8  # MB
MOUNT = f'mount -t tmpfs -o size={SIZE}m tmpfs "$0" && echo && exec sleep 1d'
FULL_DISK = "No space left on device"


class Disk:
    """A small disk that processes see that have joined the name space of `holder`."""

    def __init__(self, folder):
        self.place = folder / "disk"  # for the processes
        self.place.mkdir()
        self.holder = subprocess.Popen(["unshare", "-rm", "bash", "-c", MOUNT, self.place],
                                       stdout=subprocess.PIPE)
        self.holder.stdout.readline()
        self.here = Path(f"/proc/{self.holder.pid}/root{self.place}")  # for the tests

    def leave(self, kilobytes):
        """Fill the disk up to so much."""
        (self.here / "others").unlink(missing_ok=True)
        free = shutil.disk_usage(self.here).free // 1000
        (self.here / "others").write_bytes(bytes(1000 * max(0, free - kilobytes)))

    def remount(self, how):
        subprocess.run(["nsenter", "-t", str(self.holder.pid), "-U", "-m",
                        "--preserve-credentials", "mount", "-o", f"remount,{how}", self.place],
                       check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path):
    may = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False)
    if may.returncode:
        pytest.skip(f"no disk of its own: {may.stderr.decode()}")
    disk = Disk(tmp_path)
    yield disk
    disk.holder.kill()
    disk.holder.communicate()


class OnDisk(Tries):
    """A stage whose run is on the disk."""

    def __init__(self, pipeline, disk, ranks=1, stage="pretrain"):
        self.disk = disk
        super().__init__(pipeline, stage, ranks, disk.here, "--eval_every=0")

    def begin(self, *more):
        """Jobs of the run on the disk."""
        return start_together(
            self.ranks, *self.command, f"--out={self.disk.place}/run", *more,
            before=[partial(join_namespace, self.disk.holder.pid)])

    def fresh(self):
        self.out = self.disk.here / "run"

    def resumes_from(self, step):
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


def killed_at(run, step):
    """Kill the run soon after it has logged a step."""
    jobs = run.begin()
    stopped_at(jobs, run.out, step)
    jobs[0].kill(signal.SIGKILL)
    jobs[0].wait()


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
    run.resumes_from(3)


@pytest.mark.parametrize("what", scale(["full"], ["full", "gone"]))
def test_a_disk_that_fails_in_the_middle_of_a_run_loses_nothing(pipeline, disk, what):
    """Older checkpoints make room, or the folder is made anew."""
    run = OnDisk(pipeline, disk)
    jobs = run.begin()
    stopped_at(jobs, run.out, chance(what).randrange(4, 12))
    disk.leave(0) if what == "full" else shutil.rmtree(run.out)
    jobs[0].kill(signal.SIGCONT)
    run.ended(jobs)
    run.compare()


def test_a_folder_that_cannot_be_written_is_refused(pipeline, disk):
    run = OnDisk(pipeline, disk)
    disk.remount("ro")
    refusal(run.begin()[0], f"--out={disk.place}/run .*Read-only")
    disk.remount("rw")
    killed_at(run, 6)
    disk.remount("ro")
    refusal(run.begin()[0], f"--out={disk.place}/run .*Read-only")
    disk.remount("rw")
    run.resumes_from(list(checkpoint.steps_in(run.out))[-1])


def test_a_log_that_was_cut_in_the_middle_of_a_line_is_mended(pipeline, disk):
    run = OnDisk(pipeline, disk)
    killed_at(run, 10)
    step = int(assert_intact(run.out).name[-8:])
    log = run.out / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    assert len(lines) > step
    log.write_text("".join(lines[:step]) + lines[step][:9])
    run.resumes_from(step)
    assert [row["step"] for row in log_rows(run.out)][:24] == list(range(24))


# ------------------------------------------------------------------------------- on a working disk


def test_the_state_at_the_save_is_written_whatever_happens_later():
    saver, resumed, written = Saver(), threading.Event(), []
    state = {"a": torch.ones(3), "deep": [{"b": torch.arange(4), "n": 7}]}

    def write(copy):
        resumed.wait()
        written.extend([copy["a"].tolist(), copy["deep"][0]["b"].tolist(), copy["deep"][0]["n"]])

    saver.start(write, saver.copy(state))
    state["a"].fill_(9)
    state["deep"][0]["b"].fill_(9)
    assert saver.ended() is None  # it is still writing
    resumed.set()
    assert saver.ended(wait=True) is None
    assert written == [[1, 1, 1], [0, 1, 2, 3], 7]
    assert saver.copy(state)["a"].data_ptr() == saver.copy(state)["a"].data_ptr()
    saver.start(int, "no number")
    assert isinstance(saver.ended(wait=True), ValueError)
    assert saver.ended(wait=True) is None  # an error is reported once


def test_training_continues_while_a_checkpoint_is_written(pipeline, tmp_path, monkeypatch):
    """Writing takes 0.5 seconds here; the next save and the end wait for it, the steps do not."""
    save, spans = checkpoint.save, []

    def slow(*args, **kwargs):
        began = time.monotonic()
        time.sleep(0.5)
        found = save(*args, **kwargs)
        spans.append((began, time.monotonic()))
        return found

    monkeypatch.setattr(checkpoint, "save", slow)
    said = pipeline.run_stage("pretrain", tmp_path / "run", "--save_every=3")
    assert len(spans) == 2 and spans[0][1] <= spans[1][0]  # one at a time
    assert "done: " in said
    assert_same_weights(tmp_path / "run", pipeline.folder / "pretrain")


def test_every_nth_checkpoint_is_kept(pipeline, tmp_path):
    pipeline.run_stage("pretrain", tmp_path / "run", "--save_every=1", "--keep_every=3",
                       "--max_steps=9", "--eval_every=0")
    assert list(checkpoint.steps_in(tmp_path / "run")) == [3, 6, 8, 9]


def test_a_checkpoint_that_is_being_read_is_not_removed(pipeline, tmp_path):
    run = shutil.copytree(pipeline.folder / "pretrain", tmp_path / "run")
    first, second = checkpoint.steps_in(run).values()
    with checkpoint.locked(first):
        assert not checkpoint.remove(first) and first.is_dir()
        with checkpoint.locked(first):  # many may read
            pass
    assert checkpoint.remove(first) and not first.is_dir()
    assert list(run.glob(".removing*")) == [] and second.is_dir()


def test_resume_skips_a_damaged_checkpoint_and_removes_unfinished_ones(pipeline, tmp_path):
    run = shutil.copytree(pipeline.folder / "pretrain", tmp_path / "run")
    for name in (".writing-step_00000003", ".removing-step_00000001"):
        (run / name / "state").mkdir(parents=True)
    before, last = checkpoint.steps_in(run).values()
    weights = last / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    said = pipeline.run_stage("pretrain", run)
    assert f"{weights} is damaged" in said and str(before) in said
    assert_same_weights(run, pipeline.folder / "pretrain")
    assert not list(run.glob(".writing*")) + list(run.glob(".removing*"))
