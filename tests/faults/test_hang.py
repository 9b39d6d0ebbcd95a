"""A process that stalls is named, and the job ends instead of costing money in silence."""

import signal
import time

import pytest
from conftest import log_rows

from faults.harness import server, until
from train.watchdog import STALLED, Watch, verdict

PATIENT = "--step_timeout=0.05"  # minutes
STALLING = "tests/faults/stalling.py"


@pytest.mark.parametrize("asleep", [0, 1])
def test_a_process_that_falls_asleep_is_named(pipeline, tmp_path, asleep):
    began = time.monotonic()
    jobs = server().start_together(2, STALLING, asleep, 3, "pretrain.py",
                                   *pipeline.flags("pretrain"), f"--out={tmp_path}/run", PATIENT)
    statuses = [job.wait() for job in jobs]
    said = jobs[0].said + jobs[1].said
    assert statuses == [STALLED, STALLED], said
    assert "Traceback" not in said  # of a connection that broke because the other had ended
    assert f"process {asleep} stalls after the start of step 3; the others wait for it" in said
    assert "no progress for 3 seconds" in said
    assert "time.sleep" in said or "sleepy_forward" in said  # where it sleeps, by its own stack
    assert log_rows(tmp_path / "run")[-1]["step"] == 2
    assert time.monotonic() - began < 60


def test_a_process_that_is_stopped_is_named(pipeline, tmp_path):
    jobs = server().start_together(2, STALLING, 7, 0, "pretrain.py", *pipeline.flags("pretrain"),
                                   f"--out={tmp_path}/run", "--max_steps=1000000", "--eval_every=0",
                                   "--save_every=0", PATIENT)
    log = tmp_path / "run" / "log.jsonl"
    try:
        until(lambda: log.exists() and log.read_text().count("\n") > 2, every=0.05)
        jobs[1].kill(signal.SIGSTOP)
        assert jobs[0].wait() == STALLED, jobs[0].said
    finally:
        jobs[1].kill(signal.SIGKILL)
    assert "process 1 does not answer: stopped, or its machine is gone" in jobs[0].said


def test_who_is_waited_for():
    def found(*counts):
        return {rank: {"count": count, "place": f"place {count}"}
                for rank, count in enumerate(counts) if count is not None}

    assert "process 2 stalls after place 4; the others" in verdict(found(5, 6, 4), 3, 9)
    assert "process 0, 1 stalls after place 4" in verdict(found(4, 4, 6), 3, 9)
    assert "process 1 does not answer" in verdict(found(5, None, 4), 3, 9)
    assert "same place (place 5): check the network" in verdict(found(5, 5), 2, 9)


def test_one_process_alone_is_not_watched(tmp_path):
    class Alone:
        ranks = 1

    watch = Watch(tmp_path, Alone(), 0.001, 0.001)
    watch.start()
    assert watch.thread is None
