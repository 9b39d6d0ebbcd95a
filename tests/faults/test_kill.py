"""SIGKILL at any moment: the same command resumes, and makes the same bytes as without it."""

import functools
import json
import random
import shutil
import signal
import tempfile
import time
from functools import partial
from pathlib import Path
from threading import Event

import fake_hub
import pytest
import torch
from conftest import COMMON, DEMO, STAGES, TINY, log_rows, newest
from test_hub import NAMES, REPOSITORY, shards
from test_resumable import many_images, many_rows

from common import checkpoint
from faults.harness import FULL, assign, scale, session, start, start_together, until
from train.log import COSTS

LONG = ("--max_steps=24", "--save_every=3", "--eval_every=8")
TIMES = ("ms", "mfu", "dollars", "tok_per_s", "img_per_s")  # differ in every run


def as_text(state, apart_from=()):
    """Nested tensors and numbers, to the last bit."""
    state = {name: value for name, value in state.items() if name not in apart_from}
    return json.dumps(state, default=torch.Tensor.tolist)


def assert_same_run(folder, expected):
    """Both runs ended with the same weights, optimizer state, random numbers, metrics and log."""
    one, other = newest(folder), newest(expected)
    assert one.name == other.name
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    (one, _, state), (other, _, other_state) = (checkpoint.read(path, with_state=True)
                                                for path in (one, other))
    assert as_text(state) == as_text(other_state)
    assert as_text(one["metrics"], COSTS) == as_text(other["metrics"], COSTS)
    assert [as_text(row, TIMES) for row in log_rows(folder)] == [
        as_text(row, TIMES) for row in log_rows(expected)]
    assert not list(Path(folder).glob(".writing*")) + list(Path(folder).glob(".removing*"))


def assert_intact(folder):
    """Every checkpoint of a run can be read; returns the newest, or None."""
    found = list(checkpoint.steps_in(folder).values())
    for path in found:
        checkpoint.read(path, with_state=True)
    return found[-1] if found else None


@functools.cache
def undisturbed(ranks, *command):
    """(folder of a run without any fault, its seconds)."""
    began, folder = time.monotonic(), tempfile.mkdtemp(dir=session()[0])
    jobs = start_together(ranks, *command, f"--out={folder}")
    assert [job.wait() for job in jobs] == [0] * ranks, jobs[0].said + jobs[-1].said
    return folder, time.monotonic() - began


class Tries:
    """A stage that is started again and again, beside a run of it without any fault."""

    def __init__(self, pipeline, stage, ranks, folder, *more):
        self.ranks, self.out = ranks, folder / "run"
        self.command = [f"{stage}.py", *pipeline.flags(stage), *LONG, *more]
        self.expected, self.seconds = undisturbed(ranks, *self.command)

    def start(self, **more):
        return start_together(self.ranks, *self.command, f"--out={self.out}", **more)

    def kill(self, luck, while_saving):
        """Start, and kill at a random moment; "ended", "killed" or, in a save, "hit"."""
        before, jobs = assert_intact(self.out), self.start()

        def saves():
            return "to train" in jobs[0].said and list(self.out.glob(".writing-*"))

        if while_saving:
            until(lambda: jobs[0].poll() is not None or saves(), every=0.0005)
        time.sleep(luck.random() * (0.005 if while_saving else self.seconds))
        for job in jobs:
            job.kill(signal.SIGKILL)
        statuses = {job.wait() for job in jobs}
        assert statuses <= {0, -signal.SIGKILL}, jobs[0].said + jobs[-1].said
        self.check_resume(jobs, before)
        if -signal.SIGKILL in statuses:
            return "hit" if saves() else "killed"
        assert_same_run(self.out, self.expected)
        shutil.rmtree(self.out)
        self.seconds *= 0.8  # the machine is faster now
        return "ended"

    def check_resume(self, jobs, before, must=False):
        """They said that they resume from the checkpoint `before`, or had not come so far."""
        said = [line.split(";")[0].rpartition("/")[2] for job in jobs
                for line in job.said.splitlines() if line.startswith("resuming from")]
        assert said == ([before.name] if before else []) or not (said or must), said

    def finish(self):
        """Start once more, without a fault."""
        before, jobs = assert_intact(self.out), self.start()
        assert [job.wait() for job in jobs] == [0] * self.ranks, jobs[0].said + jobs[-1].said
        self.check_resume(jobs, before, must=True)
        assert_same_run(self.out, self.expected)


CASES = [(stage, ranks) for stage in STAGES for ranks in (1, 2)
         if FULL or (stage, ranks) in (("clip_pretrain", 1), ("pretrain", 1), ("vision_sft", 2))]


@pytest.mark.parametrize(("stage", "ranks"), CASES)
def test_a_stage_killed_repeatedly_ends_bit_identical(pipeline, stage, ranks, tmp_path):
    """Half of the kills are aimed at a save, half at random; at least one hits a save."""
    tries, luck = Tries(pipeline, stage, ranks, tmp_path), random.Random(f"{stage} {ranks}")
    ends = []
    while len(ends) - ends.count("ended") < scale(2, 20) or "hit" not in ends:
        assert len(ends) < 100, ends
        ends.append(tries.kill(luck, while_saving=len(ends) % 2 == 0))
    tries.finish()


def test_a_run_killed_at_any_change_of_a_file_ends_bit_identical(pipeline, tmp_path):
    """Before each file operation of a run with four saves, then soon after the next start."""
    tries = Tries(pipeline, "pretrain", 1, tmp_path, "--max_steps=12")
    [job] = tries.start(die_at=0)
    assert job.wait() == 0, job.said
    count = len(job.changes)
    assert count > 40
    for number in range(1, count, scale(24, 1)):
        shutil.rmtree(tries.out)
        for die_at in (number, number % 9 + 1):
            before = assert_intact(tries.out)
            [job] = tries.start(die_at=die_at)
            assert job.wait() == -signal.SIGKILL or len(job.changes) < die_at, job.said
            tries.check_resume([job], before)
        tries.finish()


OFTEN = (partial(assign, "prep.resumable.COMMIT_SECONDS", 0),  # as in long work
         partial(assign, "prep.resumable.BATCH_ROWS", 16))


def made(*argv, **more):
    """A Job of prepare.py that has ended well."""
    job = start(*argv, before=OFTEN, **more)
    assert job.wait() == 0, job.said
    return job


@pytest.mark.parametrize("kind", scale(["chat"], ["demo", "text", "chat", "images"]))
def test_prepare_killed_at_any_change_keeps_the_older_data_and_makes_the_same_bytes(
        kind, world_data, tmp_path):
    """And at random times, which also hits SQLite, whose changes Python does not see."""
    source, folder, out = tmp_path / "in", tmp_path / "data", tmp_path / "data/out"
    source.mkdir()
    files = (many_images(source, 60) if kind == "images" else
             many_rows(source / "rows.jsonl", 100))
    flags = [f"--tokenizer={world_data}/text", f"--files={files}"]
    flags += [f"--image_root={source}/images", "--image_size=32"] * (kind == "images")
    making = ["prepare.py", kind, *(DEMO if kind == "demo" else flags), f"--out={out}"]
    made(*making, "--seed=1")
    shutil.copytree(folder, tmp_path / "older")
    began = time.monotonic()
    changes, seconds = made(*making, die_at=0).changes, time.monotonic() - began
    new, older = checkpoint.sums(out), checkpoint.sums(tmp_path / "older/out")
    assert older != new
    luck = random.Random(kind)
    last = [number for number, change in enumerate(changes, 1)  # the new one takes its place
            if change.startswith("os.rename") or change.endswith(str(out))]
    sample = luck.sample(range(1, len(changes)), scale(1, min(20, len(changes) - 1)))
    for number in [*sorted({*sample, *last}), *[0] * scale(2, 6)]:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "older", folder)
        job = start(*making, before=OFTEN, die_at=number)
        if number == 0:
            time.sleep(luck.random() * seconds)
            job.kill(signal.SIGKILL)
        ended = job.wait() == 0 and len(job.changes) < (number or len(changes) + 1)
        assert ended or job.wait() == -signal.SIGKILL, job.said
        assert not out.exists() or checkpoint.sums(out) in (older, new), job.changes[-1]
        made(*making)
        assert checkpoint.sums(out) == new
        assert [path.name for path in folder.iterdir()] == ["out"]


def test_no_worker_outlives_a_killed_prepare(tmp_path):
    job = start("prepare.py", "demo", f"--out={tmp_path}/demo")

    def commands(workers):
        """Their command lines, which are empty when they have ended."""
        paths = [Path(f"/proc/{worker}/cmdline") for worker in workers]
        return [path.read_text() for path in paths if path.exists()]

    def children():
        paths = Path(f"/proc/{job.process.pid}/task").glob("*/children")
        return [worker for path in paths for worker in path.read_text().split()]

    until(children)
    time.sleep(0.5)  # all of them draw
    workers = children()
    job.kill(signal.SIGKILL)
    until(lambda: not any(commands(workers)), seconds=10)
    assert job.wait() == -signal.SIGKILL, job.said


def test_a_download_killed_in_the_middle_is_made_whole(tmp_path, monkeypatch):
    """By a run that fetches while it trains; killed once in every file."""
    def fetch():
        return start("pretrain.py", f"--data=hf://{REPOSITORY}", *TINY["pretrain"], *COMMON,
                     "--max_steps=16", "--out=run", folder=tmp_path, **hub.environment())

    def killed(complete):
        """Killed when some files are complete and one has been sent by half."""
        halves, over = [], Event()
        hub.halfway = lambda _: halves.append(1) or len(halves) <= complete or over.wait(60)
        job = fetch()
        until(lambda: len(halves) > complete)
        job.kill(signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL, job.said
        over.set()

    with fake_hub.running(monkeypatch) as hub:
        hub.repos["datasets", REPOSITORY] = files = shards()
        for number in range(scale(1, len(NAMES))):
            killed(complete=int(number > 0))  # the file of the kill before
        hub.halfway = lambda _: None
        job = fetch()
        assert job.wait() == 0, job.said
    found = {path.name: path.read_bytes() for path in tmp_path.rglob("*.npy")}
    assert found == {name: files[name] for name in NAMES}
    assert not list(tmp_path.rglob(".incoming*"))
