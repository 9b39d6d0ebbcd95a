"""Checkpoints are written while training continues, and a disk that is full or gone loses nothing
that was saved.

The disk is one in memory, in a name space of its own, that only the tests' processes see.
"""

import random
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from common import checkpoint
from faults.harness import join_namespace, scale, start_together, until, until_logged
from faults.test_kill import Tries, assert_same_run

MOUNT = 'mount -t tmpfs -o size=8m tmpfs "$0" && echo && exec sleep 1d'
FULL_DISK = "No space left on device"


@pytest.fixture
def disk(tmp_path):
    """A process with a disk of 8 MB at tmp_path, which others see that join its name space."""
    may = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False)
    if may.returncode:
        pytest.skip(f"no disk of its own: {may.stderr.decode()}")
    with subprocess.Popen(["unshare", "-rm", "bash", "-c", MOUNT, tmp_path],
                          stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        yield holder.pid
        holder.kill()


class OnDisk(Tries):
    """Tries of pretrain whose run is on the disk."""

    def __init__(self, pipeline, disk, place, ranks=1):
        self.disk, self.place = disk, place
        super().__init__(pipeline, "pretrain", ranks, Path(f"/proc/{disk}/root{place}"),
                         "--eval_every=0")

    def start(self):
        return start_together(self.ranks, *self.command, f"--out={self.place}/run",
                              before=[partial(join_namespace, self.disk)])

    def leave(self, kilobytes):
        """Fill the disk up to so much."""
        others = self.out.with_name("others")
        others.unlink(missing_ok=True)
        free = shutil.disk_usage(others.parent).free // 1000
        others.write_bytes(bytes(1000 * max(0, free - kilobytes)))


@pytest.mark.parametrize("fault", scale(["room for two", "full"], ["room for two", "full", "gone"]))
def test_older_checkpoints_make_room_or_the_folder_is_made_anew(pipeline, disk, tmp_path, fault):
    """A disk with room for two checkpoints, or one that fails in the middle of the run."""
    run = OnDisk(pipeline, disk, tmp_path)
    if fault == "room for two":
        run.leave(1700)
    [job] = run.start()
    if fault != "room for two":
        until_logged(run.out, random.Random(fault).randrange(4, 12))
        job.kill(signal.SIGSTOP)
        status = Path(f"/proc/{job.process.pid}/status")
        until(lambda: "T (stopped)" in status.read_text())
        run.leave(0) if fault == "full" else shutil.rmtree(run.out)
        job.kill(signal.SIGCONT)
    assert job.wait() == 0, job.said
    assert fault != "room for two" or "cannot write" not in job.said
    assert_same_run(run.out, run.expected)


@pytest.mark.parametrize("ranks", scale([1], [1, 2]))
def test_on_a_disk_with_room_for_one_checkpoint_that_one_stays(pipeline, disk, tmp_path, ranks):
    run = OnDisk(pipeline, disk, tmp_path, ranks)
    run.leave(1000)
    jobs = run.start()
    assert 0 not in {job.wait() for job in jobs}, jobs[0].said
    said, last = jobs[0].said, jobs[0].said.splitlines()[-1]
    assert last.startswith("error: cannot write the checkpoint of step 24 ") and FULL_DISK in last
    assert f"{FULL_DISK}; the one before is complete; training continues" in said
    assert said.count("error: ") == 1 and "Traceback" not in said
    assert list(checkpoint.steps_in(run.out)) == [3] and not list(run.out.glob(".writing*"))
    run.leave(8000)
    run.finish()


def test_training_continues_while_a_checkpoint_is_written(pipeline, tmp_path, monkeypatch):
    """Writing takes 0.5 seconds here; the next save and the end wait for it, the steps do not. What
    is written is the state at the save."""
    save, spans = checkpoint.save, []

    def slow(*args, **kwargs):
        began = time.monotonic()
        time.sleep(0.5)
        found = save(*args, **kwargs)
        spans.append((began, time.monotonic()))
        return found

    monkeypatch.setattr(checkpoint, "save", slow)
    said = pipeline.run_stage("pretrain", tmp_path / "run", "--save_every=4")
    assert len(spans) == 2 and spans[0][1] <= spans[1][0]  # one at a time
    assert "done: " in said
    for step in (4, 6):
        name = f"step_{step:08d}/model.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (
            pipeline.folder / "pretrain" / name).read_bytes()


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
