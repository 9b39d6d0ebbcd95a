"""Processes that are asked to stop, die or stall.

A run asked to stop saves after the same step in all processes and exits with 75; the same command
resumes it. A process that dies is restarted by torchrun. A process that stalls is named, and the
job ends instead of costing money.
"""

import os
import random
import re
import signal
import time
from functools import partial

import pytest
from conftest import STAGES, log_rows, newest, run

from common import checkpoint
from faults import harness
from faults.harness import scale, until, until_logged
from faults.test_kill import Tries, assert_same_run
from train.run import STOPPED_EARLY
from train.watchdog import STALLED

LINES = re.compile(r"^step +\d+ \| loss", re.MULTILINE)
STOPPED = re.compile(r"^stopped after step (\d+) and saved", re.MULTILINE)


def stopped_after(out, said):
    """The step after which a run stopped: it said so once, and its newest checkpoint has it."""
    step = int(newest(out).name.removeprefix("step_"))
    assert STOPPED.findall(said) == [str(step - 1)], said
    assert list(checkpoint.steps_in(out))[-1] == step
    return step


CASES = scale(
    [("pretrain", 1, signal.SIGINT, None), ("vision_sft", 2, signal.SIGTERM, 1)],
    [(stage, *how) for stage in STAGES for how in (
        (1, signal.SIGTERM, None), (1, signal.SIGINT, None), (2, signal.SIGTERM, 0),
        (2, signal.SIGTERM, 1), (2, signal.SIGINT, None))])


@pytest.mark.parametrize(("stage", "ranks", "number", "rank"), CASES)
def test_a_signal_stops_all_processes_after_the_same_step(
        pipeline, stage, ranks, number, rank, tmp_path):
    """rank: the only one that is signalled; None: all are."""
    tries = Tries(pipeline, stage, ranks, tmp_path, "--save_every=0")
    jobs = tries.start()
    wanted = random.Random(f"{stage} {number} {rank}").randrange(1, 12)
    until(lambda: len(LINES.findall(jobs[0].said)) >= wanted or jobs[0].poll() is not None)
    for signalled, job in enumerate(jobs):
        if rank in (None, signalled):
            job.kill(number)
    assert [job.wait() for job in jobs] == [STOPPED_EARLY] * ranks, jobs[0].said
    assert wanted <= stopped_after(tries.out, "".join(job.said for job in jobs)) < 24
    tries.finish()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_start_into_a_live_run_is_refused(pipeline, ranks, tmp_path):
    """Even one that would begin anew. The first goes on, saves and can be resumed."""
    tries = Tries(pipeline, "pretrain", ranks, tmp_path, "--save_every=0")
    jobs = tries.start()
    until(lambda: LINES.search(jobs[0].said))
    for again in "True", "False":
        result = run(*tries.command, f"--out={tries.out}", f"--resume={again}")
        assert f"another process is training into --out={tries.out}" in result.refusal
    for job in jobs:
        job.kill(signal.SIGTERM)
    assert [job.wait() for job in jobs] == [STOPPED_EARLY] * ranks, jobs[0].said
    tries.finish()


def test_a_later_ctrl_c_exits_at_once_and_one_within_a_second_does_not(pipeline, tmp_path):
    """In a step of 100,000 rows, which takes minutes. Python handles a signal only when it returns
    from an operation of PyTorch."""
    job = harness.start("pretrain.py", *pipeline.flags("pretrain"), f"--out={tmp_path}/run",
                        "--batch_tokens=6400000")
    until(lambda: "M parameters to train" in job.said)
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        job.kill(number)
    time.sleep(1.2)
    assert job.poll() is None, job.said
    until(lambda: job.kill(signal.SIGINT) or job.poll() is not None, every=0.4)
    assert job.poll() == 128 + signal.SIGINT and "Traceback" not in job.said
    assert not STOPPED.search(job.said)


def test_the_time_limit_counts_from_the_start_of_torchrun(pipeline, tmp_path):
    """A process that torchrun restarts has no more time than the first. Here the forkserver starts
    the processes, and it is older than the limit."""
    limit = 2
    assert harness.start("prepare.py", "--help").wait() == 0
    time.sleep(limit)
    job = harness.start("pretrain.py", *pipeline.flags("pretrain"), f"--out={tmp_path}/run",
                        f"--time_limit={limit / 60}", "--max_steps=100000", "--save_every=0",
                        "--eval_every=0", TORCHELASTIC_RUN_ID="test")
    assert job.wait() == STOPPED_EARLY
    assert stopped_after(tmp_path / "run", job.said) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "ranks"), scale(
    [(signal.SIGKILL, (1,)), (signal.SIGTERM, (0,))],
    [(signal.SIGKILL, (0,)), (signal.SIGKILL, (1, 0)), (signal.SIGTERM, (0,)),
     (signal.SIGTERM, (1,)), (signal.SIGTERM, ()), (signal.SIGINT, ()), (None, ())]))
def test_torchrun_restarts_what_dies_but_not_what_was_asked_to_stop(
        pipeline, number, ranks, tmp_path):
    """ranks: the processes that get the signal, one after the other; (): torchrun. Without a signal
    it is the time limit."""
    tries = Tries(pipeline, "pretrain", 2, tmp_path)
    limit = [] if number else ["--time_limit=1e-9"]
    job = harness.torchrun(("--standalone", "--nproc_per_node=2", "--max-restarts=3"),
                           *tries.command, *limit, f"--out={tries.out}")
    for step, rank in zip((7, 13), ranks or [None] * bool(number), strict=False):
        until_logged(tries.out, step)
        os.kill(job.pid if rank is None else harness.worker(job, rank), number)
    said = harness.ended(job)
    if number == signal.SIGKILL:
        assert job.returncode == 0, said
        assert said.count(" on 2 x ") == 1 + len(ranks), said
        assert said.count(f"resuming from {tries.out}/step_") == len(ranks), said
        assert_same_run(tries.out, tries.expected)
    else:
        assert job.returncode == 1 and said.count(" on 2 x ") == 1, said
        assert re.search("exitcode  : 75|got signal: (15|2)", said), said
        assert stopped_after(tries.out, said) < 24
        tries.finish()


def stalling(pipeline, tmp_path, stalls, step, *more):
    """Two processes of a run; process `stalls` sleeps from `step` on."""
    return harness.start_together(
        2, "pretrain.py", *pipeline.flags("pretrain"), f"--out={tmp_path}/run",
        "--step_timeout=0.05", *more, before=[partial(harness.stall, stalls, step)])


@pytest.mark.parametrize("stalls", [0, 1])
def test_a_sleeping_process_is_named(pipeline, tmp_path, stalls):
    jobs = stalling(pipeline, tmp_path, stalls, 3)
    statuses = [job.wait(60) for job in jobs]
    said = jobs[0].said + jobs[1].said
    assert statuses == [STALLED, STALLED], said
    assert "Traceback" not in said  # of a connection that broke because the other had ended
    assert f"process {stalls} stalls after the start of step 3" in said and "3 seconds" in said
    assert "time.sleep" in said or "stalling_forward" in said  # from its own stack
    assert log_rows(tmp_path / "run")[-1]["step"] == 2


def test_a_stopped_process_is_named(pipeline, tmp_path):
    jobs = stalling(pipeline, tmp_path, 7, 0, "--max_steps=1000000", "--eval_every=0",
                    "--save_every=0")
    until_logged(tmp_path / "run", 2)
    jobs[1].kill(signal.SIGSTOP)
    assert jobs[0].wait() == STALLED, jobs[0].said
    jobs[1].kill(signal.SIGKILL)
    assert "process 1 does not answer" in jobs[0].said
