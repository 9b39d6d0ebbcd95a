"""SIGKILL at any moment: the same command resumes, and makes the same bytes as without it."""

import itertools
import shutil
import signal
import time
from functools import partial
from threading import Semaphore

import fake_hub
import pytest
import torch
from conftest import COMMON, DEMO, STAGES, TINY, log_rows, newest
from test_hub import NAMES, REPOSITORY, shards
from test_resumable import many_images, many_rows

from common import checkpoint
from faults.conftest import FULL, scale
from faults.harness import assign, chance, session, start, start_together, until
from train.log import COSTS

LONG = ("--max_steps=24", "--save_every=3", "--eval_every=8")
TIMES = ("ms", "mfu", "dollars", "tok_per_s", "img_per_s")  # differ in every run


def same(one, other):
    """Whether two nested values of tensors and numbers are bit-identical."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


def without(row, names):
    return {name: value for name, value in row.items() if name not in names}


def assert_same_run(folder, expected):
    """Both runs ended with the same weights, optimizer state, random numbers, metrics and log."""
    one, other = newest(folder), newest(expected)
    assert one.name == other.name
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    (one, _, state), (other, _, other_state) = (checkpoint.read(path, with_state=True)
                                                for path in (one, other))
    assert same(state, other_state)
    assert without(one["metrics"], COSTS) == without(other["metrics"], COSTS)
    assert [without(row, TIMES) for row in log_rows(folder)] == [
        without(row, TIMES) for row in log_rows(expected)]


def assert_intact(folder):
    """Every checkpoint of a run can be read; returns the newest, or None."""
    found = list(checkpoint.steps_in(folder).values())
    for path in found:
        checkpoint.read(path, with_state=True)
    return found[-1] if found else None


def resumed_from(jobs, before):
    """Whether a start has said from which checkpoint it resumes, which must be `before`."""
    said = [line.split(";")[0] for job in jobs for line in job.said.splitlines()
            if line.startswith("resuming from")]
    assert said in ([], [f"resuming from {before}"]), said
    return bool(said)


UNDISTURBED = {}  # command -> (folder of a run without any fault, its seconds)


class Tries:
    """A stage that is started again and again, beside a run of it without any fault."""

    def __init__(self, pipeline, stage, ranks, folder, *more):
        self.ranks, self.folder, self.round = ranks, folder, 0
        self.command = [f"{stage}.py", *pipeline.flags(stage), *LONG, *more]
        key = ranks, *self.command
        if key not in UNDISTURBED:
            began, expected = time.monotonic(), session()[0] / f"expected_{len(UNDISTURBED)}"
            self.ended(self.start(expected))
            UNDISTURBED[key] = expected, time.monotonic() - began
        self.expected, self.seconds = UNDISTURBED[key]
        self.fresh()

    def start(self, out, **more):
        return start_together(self.ranks, *self.command, f"--out={out}", **more)

    def ended(self, jobs):
        assert [job.wait() for job in jobs] == [0] * self.ranks, jobs[0].said + jobs[-1].said

    def fresh(self):
        self.round += 1
        self.out = self.folder / f"killed_{self.round}"

    def kill(self, when):
        """Start, call when(jobs), kill; False if all had ended by then."""
        before = assert_intact(self.out)
        jobs = self.start(self.out)
        when(jobs)
        for job in jobs:
            job.kill(signal.SIGKILL)
        statuses = {job.wait() for job in jobs}
        resumed_from(jobs, before)
        assert statuses <= {0, -signal.SIGKILL}, jobs[0].said + jobs[-1].said
        if -signal.SIGKILL not in statuses:
            self.compare()
            self.fresh()
            self.seconds *= 0.8  # the machine is faster now
        return -signal.SIGKILL in statuses

    def finish(self):
        """Start once more, without a fault."""
        before = assert_intact(self.out)
        jobs = self.start(self.out)
        self.ended(jobs)
        assert resumed_from(jobs, before) == (before is not None)
        self.compare()

    def compare(self):
        assert_same_run(self.out, self.expected)


def hold_in_a_save(luck, out, hits, jobs):
    """Stop the job soon after it began to write a checkpoint, and note whether it still does."""
    until(lambda: list(out.glob(".writing-*")) or all(job.poll() is not None for job in jobs),
          every=0.0005)
    time.sleep(luck.random() * 0.005)
    for job in jobs:
        job.hold()
    hits.append(bool(list(out.glob(".writing-*"))))


CASES = [(stage, ranks, "none") for stage in STAGES for ranks in (1, 2)
         if FULL or (stage, ranks) in (("clip_pretrain", 1), ("pretrain", 1), ("vision_sft", 2))]
CASES += scale([], [("pretrain", 2, "full"), ("vision_sft", 2, "full")])


@pytest.mark.parametrize(("stage", "ranks", "shard"), CASES)
def test_a_stage_killed_repeatedly_ends_bit_identical(pipeline, stage, ranks, shard, tmp_path):
    """Half of the kills are during a save, half at random; at least one hits a save."""
    tries = Tries(pipeline, stage, ranks, tmp_path, f"--shard={shard}")
    luck, killed, hits = chance(stage, ranks, shard), 0, []
    for number in itertools.count():
        enough = killed >= scale(2, 20)
        if enough and any(hits):
            break
        assert number < 100, "it ends before it can be killed"
        if enough or killed % 2 == 0:
            killed += tries.kill(partial(hold_in_a_save, luck, tries.out, hits))
        else:
            killed += tries.kill(lambda jobs: time.sleep(luck.random() * tries.seconds))
    tries.finish()


def test_a_run_killed_at_any_change_of_its_folder_ends_bit_identical(pipeline, tmp_path):
    """Before each file operation of a run with two saves and the end."""
    tries = Tries(pipeline, "pretrain", 1, tmp_path, "--max_steps=12")
    base = tmp_path / "base"
    [job] = tries.start(tries.out)
    until(lambda: max(checkpoint.steps_in(tries.out), default=0) == 6, every=0.0005)
    job.kill(signal.SIGKILL)
    job.wait()
    assert max(checkpoint.steps_in(tries.out)) == 6
    shutil.copytree(tries.out, base)
    [job] = tries.start(tries.out, below=tries.out)
    tries.ended([job])
    count = len(job.changes)
    assert count > 40
    for number in sorted({2, *range(1, count, scale(16, 1))}):  # 2: log.jsonl is rewritten
        shutil.rmtree(tries.out)
        shutil.copytree(base, tries.out)
        before = assert_intact(tries.out)
        [job] = tries.start(tries.out, below=tries.out, die_at=number)
        assert job.wait() == -signal.SIGKILL or len(job.changes) < number, job.said
        resumed_from([job], before)
        tries.finish()


# ------------------------------------------------------------------------------------- prepare.py

OFTEN = (partial(assign, "prep.resumable.COMMIT_SECONDS", 0),  # as in long work
         partial(assign, "prep.resumable.BATCH_ROWS", 16))


@pytest.fixture(params=scale(["chat"], ["demo", "text", "chat", "images"]))
def making(request, world_data, tmp_path):
    """A command of prepare.py, without --out."""
    if request.param == "demo":
        return ["prepare.py", "demo", *DEMO]
    (tmp_path / "in").mkdir()
    source = [many_rows(tmp_path / "in/rows.jsonl", 100)]
    if request.param == "images":
        source = [many_images(tmp_path / "in", 60), f"--image_root={tmp_path}/in/images",
                  "--image_size=32"]
    return ["prepare.py", request.param, f"--tokenizer={world_data}/text", f"--files={source[0]}",
            *source[1:]]


def made(*argv, **more):
    """A Job of prepare.py that has ended well."""
    job = start(*argv, before=OFTEN, **more)
    assert job.wait() == 0, job.said
    return job


def test_prepare_killed_at_any_change_keeps_the_older_data_and_makes_the_same_bytes(
        making, tmp_path):
    """And at random times, which also hits SQLite, whose changes Python does not see."""
    folder, out = tmp_path / "data", tmp_path / "data/out"
    making = [*making, f"--out={out}"]
    made(*making, "--seed=1")
    shutil.copytree(folder, tmp_path / "older")
    began = time.monotonic()
    job = made(*making, below=folder)
    seconds, count, luck = time.monotonic() - began, len(job.changes), chance(making[1])
    new, older = checkpoint.sums(out), checkpoint.sums(tmp_path / "older/out")
    assert count > 10 and older != new
    last = [number for number, change in enumerate(job.changes, 1)  # the new one takes its place
            if " /out" in change or change.startswith("os.rename")]
    sample = luck.sample(range(1, count), min(scale(1, 20), count - 1))
    for number in [*sorted({*sample, *last}), *[0] * scale(2, 6)]:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "older", folder)
        job = start(*making, before=OFTEN, below=folder, die_at=number)
        if number == 0:
            time.sleep(luck.random() * seconds)
            job.kill(signal.SIGKILL)
        ended = job.wait() == 0 and len(job.changes) < (number or count + 1)
        assert ended or job.wait() == -signal.SIGKILL, job.said
        assert not out.exists() or checkpoint.sums(out) in (older, new), job.changes[-1]
        made(*making)
        assert checkpoint.sums(out) == new
        assert [path.name for path in folder.iterdir()] == ["out"]


# -------------------------------------------------------------------------------------- downloads


@pytest.fixture
def slow_hub(monkeypatch):
    """A fake hub that sends half of each file, and the rest only if a test allows it."""
    with fake_hub.running(monkeypatch) as hub:
        hub.repos["datasets", REPOSITORY] = shards()
        hub.halves, hub.allowed = [], Semaphore(0)
        hub.halfway = lambda _: hub.halves.append(1) or hub.allowed.acquire(timeout=60)
        yield hub
        hub.allowed.release(100)


FETCHING = {
    "prepare.py": ("fineweb", f"--repository={REPOSITORY}", "--shards=3", "--out=data"),
    "pretrain.py": (f"--data=hf://{REPOSITORY}", *TINY["pretrain"], *COMMON, "--max_steps=16",
                    "--out=run"),
}


@pytest.mark.parametrize("script", scale(["prepare.py"], FETCHING))
def test_a_download_killed_in_the_middle_is_made_whole(slow_hub, script, tmp_path):
    """By prepare.py fineweb, and by a run that fetches while it trains; once in every file."""
    def fetch(name):
        (tmp_path / name).mkdir(exist_ok=True)
        return start(script, *FETCHING[script], folder=tmp_path / name, **slow_hub.environment())

    for number in range(scale(1, len(NAMES))):
        slow_hub.halves, slow_hub.allowed = [], Semaphore(number > 0)
        job = fetch("killed")
        until(lambda number=number: len(slow_hub.halves) > (number > 0))
        job.kill(signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL, job.said
        slow_hub.allowed.release(100)
    slow_hub.allowed = Semaphore(100)
    for name in ("killed", "whole"):
        job = fetch(name)
        assert job.wait() == 0, job.said
    fetched = sorted((tmp_path / "killed").rglob("*.npy"))
    assert [path.name for path in fetched] == sorted(NAMES)
    for path in fetched:
        assert path.read_bytes() == slow_hub.repos["datasets", REPOSITORY][path.name]
    assert not list((tmp_path / "killed").rglob(".incoming*"))
    if script == "pretrain.py":
        assert_same_run(tmp_path / "killed/run", tmp_path / "whole/run")
