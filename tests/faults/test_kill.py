"""kill -9 at any moment, in any stage: the same command goes on, and nothing is lost."""

import itertools
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from conftest import ROOT, STAGES, log_rows, newest

from common import checkpoint
from faults.conftest import FULL, scale
from faults.harness import chance, server, until
from train.log import COSTS

LONG = ("--max_steps=24", "--save_every=3", "--eval_every=8")
CLOCK = ("ms", "mfu", "dollars", "tok_per_s", "img_per_s")  # figures of a row that no run repeats


# -------------------------------------------------------------------------------------- comparing


def same(one, other):
    """Whether two values of dicts, lists, tensors and numbers are the same to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


def figures(folder):
    """The rows of log.jsonl without what the clock says."""
    return [{key: value for key, value in row.items() if key not in CLOCK}
            for row in log_rows(folder)]


def assert_same_run(folder, whole):
    """Both ended with the same weights, optimizer, random numbers, metrics and logged figures."""
    one, other = newest(folder), newest(whole)
    assert one.name == other.name
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    (one, _, state), (other, _, expected) = (checkpoint.read(path, with_state=True)
                                             for path in (one, other))
    assert same(state, expected)
    assert {name: value for name, value in one["metrics"].items() if name not in COSTS} == {
        name: value for name, value in other["metrics"].items() if name not in COSTS}
    assert figures(folder) == figures(whole)


def assert_whole(folder):
    """Every checkpoint that counts as one can be read; returns the newest, or None."""
    found = list(checkpoint.steps_in(folder).values())
    for path in found:
        checkpoint.read(path, with_state=True)
    return found[-1] if found else None


def goes_on_from(jobs, before):
    """Check that a start said from which checkpoint it goes on, if it came that far."""
    said = [line.split(";")[0] for job in jobs for line in job.said.splitlines()
            if line.startswith("resuming from")]
    assert said in ([], [f"resuming from {before}"]), said
    return bool(said)


# ----------------------------------------------------------------------------------------- stages


WHOLE = {}  # command -> what Tries.undisturbed gave


class Tries:
    """A stage that is started again and again, with a run of it that nobody disturbed."""

    def __init__(self, pipeline, stage, ranks, folder, *more):
        self.ranks, self.folder, self.round = ranks, folder, 0
        self.command = [f"{stage}.py", *pipeline.flags(stage), *LONG, *more]
        self.whole, self.seconds = self.undisturbed()
        self.fresh()

    def undisturbed(self):
        """The folder of a run that nobody disturbed, and how many seconds it took."""
        key = self.ranks, *self.command
        if key not in WHOLE:
            began, folder = time.monotonic(), server().folder / f"whole_{len(WHOLE)}"
            self.ended(self.start(folder))
            WHOLE[key] = folder, time.monotonic() - began
        return WHOLE[key]

    def start(self, out, **more):
        return server().start_together(self.ranks, *self.command, f"--out={out}", **more)

    def ended(self, jobs):
        assert [job.wait() for job in jobs] == [0] * self.ranks, jobs[0].said + jobs[-1].said

    def fresh(self):
        self.round += 1
        self.out = self.folder / f"killed_{self.round}"

    def kill(self, when):
        """Start, call when(jobs), kill; False if all had ended by then."""
        before = assert_whole(self.out)
        jobs = self.start(self.out)
        when(jobs)
        for job in jobs:
            job.kill(signal.SIGKILL)
        statuses = [job.wait() for job in jobs]
        goes_on_from(jobs, before)
        assert set(statuses) <= {0, -signal.SIGKILL}, jobs[0].said + jobs[-1].said
        if -signal.SIGKILL not in statuses:
            self.compare()
            self.fresh()
            self.seconds *= 0.8  # the machine is quicker now
            return False
        return True

    def finish(self):
        """One more start, which nobody disturbs."""
        before = assert_whole(self.out)
        jobs = self.start(self.out)
        self.ended(jobs)
        assert goes_on_from(jobs, before) == (before is not None)
        self.compare()

    def compare(self):
        assert_same_run(self.out, self.whole)


def at_random(luck, seconds):
    return lambda jobs: time.sleep(luck.random() * seconds)


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
         if ranks == 1 or FULL or stage in ("pretrain", "vision_sft")]
CASES += scale([], [("pretrain", 2, "full"), ("vision_sft", 2, "full")])


@pytest.mark.parametrize(("stage", "ranks", "shard"), CASES)
def test_a_stage_killed_again_and_again_ends_with_the_same_bits(
        pipeline, stage, ranks, shard, tmp_path):
    """Every other time in the middle of a save, else at any time between start and end; until
    there were enough, and one that did hit a save."""
    tries = Tries(pipeline, stage, ranks, tmp_path, f"--shard={shard}")
    luck = chance(stage, ranks, shard)
    killed, hits = 0, []
    for number in itertools.count():
        enough = killed >= scale(2, 20)
        if enough and any(hits):
            break
        assert number < 100, "it ends before it can be killed"
        aimed = in_a_save(luck, tries.out, hits) if enough or killed % 2 == 0 else at_random(
            luck, tries.seconds)
        killed += tries.kill(aimed)
    tries.finish()
    print(f"{stage}, {ranks} processes, --shard={shard}: killed {killed} times, "
          f"{sum(hits)} of them in a save, {tries.round} runs finished")


@pytest.mark.parametrize("stage", scale([], STAGES))  # among the others, test_distributed.py does
def test_a_script_started_by_python_and_killed_goes_on_to_the_same_bits(pipeline, stage, tmp_path):
    tries = Tries(pipeline, stage, 1, tmp_path)
    rows = chance(stage).randrange(4, 20)
    log = tries.out / "log.jsonl"
    with subprocess.Popen([sys.executable, ROOT / tries.command[0], *tries.command[1:],
                           f"--out={tries.out}"], stdout=subprocess.DEVNULL) as job:
        until(lambda: log.exists() and log.read_text().count("\n") > rows)
        job.kill()
    assert job.returncode == -signal.SIGKILL and assert_whole(tries.out)
    tries.finish()


def killed_at_change(tries, base, number):
    """Go on from a copy of `base` up to change `number`, then from there; says which that was."""
    shutil.rmtree(tries.out)
    shutil.copytree(base, tries.out)
    before = assert_whole(tries.out)
    job, = tries.start(tries.out, below=tries.out, die_at=number)
    assert job.wait() == -signal.SIGKILL or len(job.changes) < number, job.said
    goes_on_from([job], before)
    tries.finish()
    return job.changes[-1]


def test_a_run_killed_at_any_change_of_its_folder_ends_with_the_same_bits(pipeline, tmp_path):
    """A file opened, renamed, removed: before each of them, in a run with two saves and the end."""
    tries = Tries(pipeline, "pretrain", 1, tmp_path, "--max_steps=12")
    base = tmp_path / "base"
    job, = tries.start(tries.out)
    until(lambda: newest_step(tries.out) == 6, every=0.0005)
    job.kill(signal.SIGKILL)
    job.wait()
    assert newest_step(tries.out) == 6
    shutil.copytree(tries.out, base)
    job, = tries.start(tries.out, below=tries.out)
    tries.ended([job])
    count = len(job.changes)
    assert count > 40
    numbers = sorted({2, *range(1, count, scale(16, 1))})  # 2: log.jsonl is written anew
    died = [killed_at_change(tries, base, number) for number in numbers]
    print(f"killed at {len(died)} of {count} changes: {dict(Counter(map(plain, died)))}")


def newest_step(folder):
    return max(checkpoint.steps_in(folder), default=0)


def plain(change):
    return re.sub(r"\d+", "N", change)
