"""A run asked to stop saves after the same step in all processes and exits with 75; the same
command resumes it.

Asked by a signal to one process, to torchrun, to one of torchrun's processes, or by --time_limit.
torchrun itself exits with 1, and with --max-restarts it must not restart what was asked to stop.
"""

import os
import re
import signal
import time

import pytest
from conftest import STAGES, newest

from common import checkpoint
from faults.conftest import scale
from faults.harness import chance, ended, server, torchrun, until, worker
from faults.test_kill import Tries
from train.run import STOPPED_EARLY

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
    [(stage, 1, number, None) for stage in STAGES for number in (signal.SIGTERM, signal.SIGINT)]
    + [(stage, 2, number, rank) for stage in STAGES for number, rank in
       ((signal.SIGTERM, 0), (signal.SIGTERM, 1), (signal.SIGINT, None))])


@pytest.mark.parametrize(("stage", "ranks", "number", "rank"), CASES)
def test_a_signal_stops_all_processes_after_the_same_step(
        pipeline, stage, ranks, number, rank, tmp_path):
    """rank: the only one that is signalled; None: all are."""
    tries = Tries(pipeline, stage, ranks, tmp_path, "--save_every=0")
    jobs = tries.start(tries.out)
    wanted = chance(stage, number, rank).randrange(1, 12)
    until(lambda: len(LINES.findall(jobs[0].said)) >= wanted or jobs[0].poll() is not None)
    for signalled, job in enumerate(jobs):
        if rank in (None, signalled):
            job.kill(number)
    assert [job.wait() for job in jobs] == [STOPPED_EARLY] * ranks, jobs[0].said
    assert wanted <= stopped_after(tries.out, "".join(job.said for job in jobs)) < 24
    tries.finish()


def test_a_later_ctrl_c_exits_at_once_and_one_within_a_second_does_not(pipeline, tmp_path):
    """In a step of 100,000 rows, which takes minutes. Python handles a signal only when it returns
    from an operation of PyTorch."""
    job = server().start("pretrain.py", *pipeline.flags("pretrain"), f"--out={tmp_path}/run",
                         "--batch_tokens=6400000")
    try:
        until(lambda: "M parameters to train" in job.said)
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            job.kill(number)
        time.sleep(1.2)
        assert job.poll() is None, job.said
        for _ in range(20):
            if job.poll() is None:
                job.kill(signal.SIGINT)
                time.sleep(0.4)
        assert job.poll() == 128 + signal.SIGINT and "Traceback" not in job.said
        assert not STOPPED.search(job.said)
    finally:
        job.kill(signal.SIGKILL)


def test_the_time_limit_counts_from_the_start_of_torchrun(pipeline, tmp_path):
    """A process that torchrun restarts has no more time than the first. Here the server starts the
    processes, and it is older than the limit."""
    limit = 2
    time.sleep(max(0, limit + 0.5 - (time.monotonic() - server().began)))
    job = server().start("pretrain.py", *pipeline.flags("pretrain"), f"--out={tmp_path}/run",
                         f"--time_limit={limit / 60}", "--max_steps=100000", "--save_every=0",
                         "--eval_every=0", TORCHELASTIC_RUN_ID="test")
    assert job.wait() == STOPPED_EARLY
    assert stopped_after(tmp_path / "run", job.said) == 1


@pytest.mark.parametrize("how", scale([], ["time", "SIGTERM", "SIGINT", "rank0", "rank1"]))
def test_torchrun_does_not_restart_what_was_asked_to_stop(pipeline, how, tmp_path):
    tries = Tries(pipeline, "pretrain", 2, tmp_path, "--save_every=0")
    limit = ["--time_limit=1e-9"] if how == "time" else []
    job = torchrun(("--standalone", "--nproc_per_node=2", "--max-restarts=3"),
                   {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}, *tries.command, *limit,
                   f"--out={tries.out}")
    log = tries.out / "log.jsonl"
    until(lambda: log.exists() and log.read_text().count("\n") >= 1)
    if how.startswith("rank"):
        os.kill(worker(job, how[-1]), signal.SIGTERM)
    elif how != "time":
        job.send_signal(signal.Signals[how])
    said = ended(job)
    assert job.returncode == 1, said
    assert "exitcode  : 75" in said or "got signal: 15" in said or "got signal: 2" in said, said
    assert said.count(" on 2 x ") == 1, said
    assert stopped_after(tries.out, said) < 24
    tries.finish()
