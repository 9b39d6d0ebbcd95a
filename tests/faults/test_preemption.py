"""Asked to stop, all processes save after the same step and end with 75; the same command goes on.

By a signal to one process, to torchrun, to one of torchrun's processes, or by --time_limit.
torchrun itself ends with 1, and with --max-restarts it must not start again what was asked to stop.
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
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def n_steps(said):
    return len(LINES.findall(said))


def stopped_after(out, said):
    """Check that a run said that it stopped, once, after the step of its newest checkpoint."""
    found = re.findall(r"^stopped after step (\d+) and saved; the same command resumes$", said,
                       re.MULTILINE)
    step = int(newest(out).name.removeprefix("step_"))
    assert found == [str(step - 1)], said
    assert list(checkpoint.steps_in(out))[-1] == step
    return step


# ------------------------------------------------------------------------------ without torchrun


CASES = scale(
    [("pretrain", 1, signal.SIGINT, None), ("vision_sft", 2, signal.SIGTERM, 1)],
    [(stage, 1, number, None) for stage in STAGES for number in SIGNALS]
    + [(stage, 2, number, rank) for stage in STAGES for number, rank in
       ((signal.SIGTERM, 0), (signal.SIGTERM, 1), (signal.SIGINT, None))])


@pytest.mark.parametrize(("stage", "ranks", "number", "rank"), CASES)
def test_a_signal_stops_all_processes_after_the_same_step(
        pipeline, stage, ranks, number, rank, tmp_path):
    """rank: the only one that is told; None: all are."""
    tries = Tries(pipeline, stage, ranks, tmp_path, "--save_every=0")
    jobs = tries.start(tries.out)
    wanted = chance(stage, number, rank).randrange(1, 12)
    until(lambda: n_steps(jobs[0].said) >= wanted or jobs[0].poll() is not None)
    for told, job in enumerate(jobs):
        if rank in (None, told):
            job.kill(number)
    assert [job.wait() for job in jobs] == [STOPPED_EARLY] * ranks, jobs[0].said
    assert wanted <= stopped_after(tries.out, "".join(job.said for job in jobs)) < 24
    tries.finish()


def test_a_later_ctrl_c_leaves_at_once_and_one_within_a_second_does_not(pipeline, tmp_path):
    """In a step of 100,000 rows, which takes minutes. Python hears a signal when it comes back from
    what it computes, so it may take one more."""
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
        assert "stopped after" not in job.said
    finally:
        job.kill(signal.SIGKILL)


def test_the_time_limit_counts_from_the_start_of_torchrun(pipeline, tmp_path):
    """A process that torchrun starts anew has no more time than the first; here the server is what
    starts processes, and it is older than the limit."""
    limit = 2
    time.sleep(max(0, limit + 0.5 - server().age()))
    job = server().start("pretrain.py", *pipeline.flags("pretrain"), f"--out={tmp_path}/run",
                         f"--time_limit={limit / 60}", "--max_steps=100000", "--save_every=0",
                         "--eval_every=0", TORCHELASTIC_RUN_ID="test")
    assert job.wait() == STOPPED_EARLY
    assert stopped_after(tmp_path / "run", job.said) == 1


# ------------------------------------------------------------------------------------- torchrun


FLAGS = ("--standalone", "--nproc_per_node=2", "--max-restarts=3")
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
TOLD = scale([], ["time", "SIGTERM", "SIGINT", "rank0", "rank1"])


@pytest.mark.parametrize("how", TOLD)
def test_torchrun_does_not_start_again_what_was_asked_to_stop(pipeline, how, tmp_path):
    tries = Tries(pipeline, "pretrain", 2, tmp_path, "--save_every=0")
    limit = ["--time_limit=1e-9"] if how == "time" else []
    job = torchrun(FLAGS, ENVIRONMENT, *tries.command, *limit, f"--out={tries.out}")
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
