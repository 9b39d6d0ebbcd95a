"""SIGKILL at any moment, in any stage: the same command resumes, and the run ends bit-identical."""

import itertools
import re
import shutil
import signal
import time
from collections import Counter

import pytest
import torch
from conftest import STAGES, log_rows, newest

from common import checkpoint
from faults.conftest import FULL, scale
from faults.harness import chance, server, until
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


def figures(folder):
    """The rows of log.jsonl without times."""
    return [{key: value for key, value in row.items() if key not in TIMES}
            for row in log_rows(folder)]


def assert_same_run(folder, expected):
    """Both runs ended with the same weights, optimizer state, random numbers, metrics and log."""
    one, other = newest(folder), newest(expected)
    assert one.name == other.name
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    (one, _, state), (other, _, other_state) = (checkpoint.read(path, with_state=True)
                                                for path in (one, other))
    assert same(state, other_state)
    assert {name: value for name, value in one["metrics"].items() if name not in COSTS} == {
        name: value for name, value in other["metrics"].items() if name not in COSTS}
    assert figures(folder) == figures(expected)


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
            began, expected = time.monotonic(), server().folder / f"expected_{len(UNDISTURBED)}"
            self.ended(self.start(expected))
            UNDISTURBED[key] = expected, time.monotonic() - began
        self.expected, self.seconds = UNDISTURBED[key]
        self.fresh()

    def start(self, out, **more):
        return server().start_together(self.ranks, *self.command, f"--out={out}", **more)

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


def in_a_save(luck, out, hits):
    """Stop the job soon after it began to write a checkpoint, and note whether it still does."""

    def when(jobs):
        until(lambda: list(out.glob(".writing-*")) or all(job.poll() is not None for job in jobs),
              every=0.0005)
        time.sleep(luck.random() * 0.005)
        for job in jobs:
            job.hold()
        hits.append(bool(list(out.glob(".writing-*"))))

    return when


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
            killed += tries.kill(in_a_save(luck, tries.out, hits))
        else:
            killed += tries.kill(lambda jobs: time.sleep(luck.random() * tries.seconds))
    tries.finish()
    print(f"{stage}, {ranks} processes, --shard={shard}: killed {killed} times, "
          f"{sum(hits)} of them during a save, {tries.round} runs finished")


def killed_at_change(tries, base, number):
    """Resume a copy of `base` up to change `number`, then from there; returns that change."""
    shutil.rmtree(tries.out)
    shutil.copytree(base, tries.out)
    before = assert_intact(tries.out)
    [job] = tries.start(tries.out, below=tries.out, die_at=number)
    assert job.wait() == -signal.SIGKILL or len(job.changes) < number, job.said
    resumed_from([job], before)
    tries.finish()
    return job.changes[-1]


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
    numbers = sorted({2, *range(1, count, scale(16, 1))})  # 2: log.jsonl is rewritten
    died = [killed_at_change(tries, base, number) for number in numbers]
    print(f"killed at {len(died)} of {count} changes: {dict(Counter(map(plain, died)))}")


def plain(change):
    return re.sub(r"\d+", "N", change)
