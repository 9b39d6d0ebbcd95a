"""Processes that are asked to stop, die or stall.

A run asked to stop saves after the same step in all processes and exits with 75; the same command
resumes it. A process that dies is restarted by torchrun. A process that stalls is named, and the
job ends instead of costing money.
"""

import os
import re
import signal
import time
from functools import partial

import pytest
from conftest import ROOT, STAGES, log_rows, newest

from common import checkpoint
from faults import harness
from faults.conftest import scale
from faults.test_kill import Tries
from train.run import STOPPED_EARLY
from train.watchdog import STALLED, verdict

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
    wanted = harness.chance(stage, number, rank).randrange(1, 12)
    harness.until(lambda: len(LINES.findall(jobs[0].said)) >= wanted or jobs[0].poll() is not None)
    for signalled, job in enumerate(jobs):
        if rank in (None, signalled):
            job.kill(number)
    assert [job.wait() for job in jobs] == [STOPPED_EARLY] * ranks, jobs[0].said
    assert wanted <= stopped_after(tries.out, "".join(job.said for job in jobs)) < 24
    tries.finish()


def test_a_later_ctrl_c_exits_at_once_and_one_within_a_second_does_not(pipeline, tmp_path):
    """In a step of 100,000 rows, which takes minutes. Python handles a signal only when it returns
    from an operation of PyTorch."""
    job = harness.start("pretrain.py", *pipeline.flags("pretrain"), f"--out={tmp_path}/run",
                "--batch_tokens=6400000")
    try:
        harness.until(lambda: "M parameters to train" in job.said)
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


@pytest.mark.parametrize("how", scale([], ["time", "SIGTERM", "SIGINT", "rank0", "rank1"]))
def test_torchrun_does_not_restart_what_was_asked_to_stop(pipeline, how, tmp_path):
    tries = Tries(pipeline, "pretrain", 2, tmp_path, "--save_every=0")
    limit = ["--time_limit=1e-9"] if how == "time" else []
    job = harness.torchrun(("--standalone", "--nproc_per_node=2", "--max-restarts=3"),
                   {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}, *tries.command, *limit,
                   f"--out={tries.out}")
    log = tries.out / "log.jsonl"
    harness.until(lambda: log.exists() and log.read_text().count("\n") >= 1)
    if how.startswith("rank"):
        os.kill(harness.worker(job, how[-1]), signal.SIGTERM)
    elif how != "time":
        job.send_signal(signal.Signals[how])
    said = harness.ended(job)
    assert job.returncode == 1, said
    assert "exitcode  : 75" in said or "got signal: 15" in said or "got signal: 2" in said, said
    assert said.count(" on 2 x ") == 1, said
    assert stopped_after(tries.out, said) < 24
    tries.finish()


# ---------------------------------------------------------------------------------------- restarts


ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "240"}
LAUNCHERS = {"full.sh": ["--standalone", "--nproc_per_node=2", "--max-restarts=3"],
             "slurm.sh": ["--nnodes=1", "--nproc_per_node=2", "--rdzv_backend=c10d",
                          "--rdzv_endpoint=localhost:29500", "--rdzv_id=7", "--max-restarts=3"]}


def test_every_launcher_restarts_dead_processes():
    """With the flags and the environment that the tests below try."""
    scripts = {path.name: path.read_text() for path in (ROOT / "runs").iterdir()
               if re.search(r"^[^#]*torchrun ", path.read_text(), re.MULTILINE)}
    assert scripts.keys() == {*LAUNCHERS, "sky.yaml"}
    for name, source in scripts.items():
        assert "--max-restarts=3" in source, name
        for variable, value in ENVIRONMENT.items():
            assert re.search(rf"export .*\b{variable}={value}\b", source), (name, variable)


RESTARTS = scale([("full.sh", [1])], [("full.sh", [0]), ("full.sh", [1, 0]), ("slurm.sh", [1])])


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "killed"), RESTARTS)
def test_a_killed_process_is_restarted_and_the_run_ends_bit_identical(
        pipeline, launcher, killed, tmp_path):
    """killed: the ranks of the processes that are killed, one after the other."""
    tries = Tries(pipeline, "pretrain", 2, tmp_path)
    flags = [flag.replace("29500", str(harness.free_port())) for flag in LAUNCHERS[launcher]]
    job = harness.torchrun(flags, ENVIRONMENT, *tries.command, f"--out={tries.out}")
    log = tries.out / "log.jsonl"
    for step, rank in zip((7, 13), killed, strict=False):
        harness.until(lambda step=step: log.exists() and log.read_text().count("\n") > step)
        os.kill(harness.worker(job, rank), signal.SIGKILL)
    said = harness.ended(job)
    assert job.returncode == 0, said
    assert said.count(" on 2 x ") == 1 + len(killed), said
    assert said.count(f"resuming from {tries.out}/step_") == len(killed), said
    tries.compare()


# ---------------------------------------------------------------------------------------- stalls


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
    assert f"process {stalls} stalls after the start of step 3" in said
    assert "3 seconds" in said
    assert "time.sleep" in said or "stalling_forward" in said  # from its own stack
    assert log_rows(tmp_path / "run")[-1]["step"] == 2


def test_a_stopped_process_is_named(pipeline, tmp_path):
    jobs = stalling(pipeline, tmp_path, 7, 0, "--max_steps=1000000", "--eval_every=0",
                 "--save_every=0")
    log = tmp_path / "run" / "log.jsonl"
    try:
        harness.until(lambda: log.exists() and log.read_text().count("\n") > 2, every=0.05)
        jobs[1].kill(signal.SIGSTOP)
        assert jobs[0].wait() == STALLED, jobs[0].said
    finally:
        jobs[1].kill(signal.SIGKILL)
    assert "process 1 does not answer" in jobs[0].said


@pytest.mark.parametrize(("counts", "expected"), [
    ((4, 4, 6), "process 0, 1 stalls after place 4"),
    ((5, 5), "after place 5: check the network"),
])
def test_the_process_behind_the_others_is_named(counts, expected):
    found = {rank: {"count": n, "place": f"place {n}"} for rank, n in enumerate(counts)}
    assert expected in verdict(found, len(counts), 9)
