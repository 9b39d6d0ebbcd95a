"""kill -9 at any moment, in any stage: the same command goes on, and nothing is lost."""

import itertools
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, STAGES, log_rows, newest

from common import checkpoint
from common.log import COSTS
from faults.conftest import FULL, scale
from faults.harness import chance, server, until

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
    said = [line for job in jobs for line in job.said.splitlines()
            if line.startswith("going on from")]
    assert said in ([], [f"going on from {before}"]), said
    return bool(said)


# ----------------------------------------------------------------------------------------- stages


class Tries:
    """A stage that is started again and again, with a run of it that nobody disturbed."""

    def __init__(self, pipeline, stage, ranks, folder):
        self.ranks, self.folder, self.round = ranks, folder, 0
        self.command = [f"{stage}.py", *pipeline.flags(stage), *LONG]
        began = time.monotonic()
        self.ended(self.start(folder / "whole"))
        self.seconds = time.monotonic() - began  # how long a whole run takes
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
        assert_same_run(self.out, self.folder / "whole")


def at_random(luck, seconds):
    return lambda jobs: time.sleep(luck.random() * seconds)


def in_a_save(luck, out, hits):
    """Stop the job soon after it began to write a checkpoint, and note whether it still does."""

    def when(jobs):
        until(lambda: list(out.glob(".writing-*")) or all(job.poll() is not None for job in jobs),
              every=0.0005)
        time.sleep(luck.random() * 0.005)
        for job in jobs:
            job.kill(signal.SIGSTOP)
        hits.append(bool(list(out.glob(".writing-*"))))

    return when


CASES = [(stage, ranks) for stage in STAGES for ranks in (1, 2)
         if ranks == 1 or FULL or stage in ("pretrain", "vision_sft")]


@pytest.mark.parametrize(("stage", "ranks"), CASES)
def test_a_stage_killed_again_and_again_ends_with_the_same_bits(pipeline, stage, ranks, tmp_path):
    """Every other time in the middle of a save, else at any time between start and end."""
    tries, luck = Tries(pipeline, stage, ranks, tmp_path), chance(stage, ranks)
    killed, hits = 0, []
    for number in itertools.count():
        if killed == scale(2, 20):
            break
        assert number < 100, "it ends before it can be killed"
        aimed = in_a_save(luck, tries.out, hits) if killed % 2 == 0 else at_random(
            luck, tries.seconds)
        killed += tries.kill(aimed)
    tries.finish()
    print(f"{stage}, {ranks} processes: killed {killed} times, {sum(hits)} of them in a save, "
          f"{tries.round} runs finished")
    assert any(hits)  # or the tests of a save test nothing


@pytest.mark.parametrize("stage", scale(["vision_sft"], STAGES))
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


def test_a_run_killed_at_any_change_of_its_folder_ends_with_the_same_bits(pipeline, tmp_path):
    """Each start dies one change later than the one before: a file opened, renamed, removed."""
    tries = Tries(pipeline, "pretrain", 1, tmp_path)
    job, = tries.start(tmp_path / "counted", below=tmp_path / "counted")
    tries.ended([job])
    count, died = len(job.changes), set()
    assert count > 100
    for number in range(1, count, scale(17, 1)):
        before = assert_whole(tries.out)
        job, = tries.start(tries.out, below=tries.out, die_at=number)
        if job.wait() == 0:
            goes_on_from([job], before)
            tries.compare()
            tries.fresh()
            continue
        assert job.status == -signal.SIGKILL, job.said
        died.add(job.changes[-1])
    tries.finish()
    print(f"killed at {len(died)} different changes, {tries.round} runs finished")
