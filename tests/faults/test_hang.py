"""A process that stalls is named, and the job ends instead of costing money in silence."""

import os
import signal
import time

import pytest
from conftest import ROOT, log_rows
from test_distributed import finish, start

from common.watch import STALLED, Watch, verdict

PATIENT = "--step_timeout=0.05"  # minutes


@pytest.mark.parametrize("asleep", [0, 1])
def test_a_process_that_falls_asleep_is_named(pipeline, tmp_path, asleep):
    began = time.monotonic()
    jobs = start(2, ROOT / "tests" / "faults" / "stalling.py", asleep, 3, "pretrain.py",
                 *pipeline.flags("pretrain"), f"--out={tmp_path}/run", PATIENT)
    ended = finish(jobs)
    said = ended[0][0] + ended[1][0]
    assert [status for _, status in ended] == [STALLED, STALLED], said
    assert "Traceback" not in said  # of a connection that broke because the other had ended
    assert f"process {asleep} stalls behind the beginning of step 3; the others wait for it" in said
    assert "nothing has moved for 3 seconds" in said
    assert "time.sleep" in said or "sleepy_forward" in said  # where it sleeps, by its own stack
    assert log_rows(tmp_path / "run")[-1]["step"] == 2
    assert time.monotonic() - began < 60


def test_a_process_that_is_stopped_is_named(pipeline, tmp_path):
    jobs = start(2, ROOT / "tests" / "faults" / "stalling.py", 7, 0, "pretrain.py",
                 *pipeline.flags("pretrain"), f"--out={tmp_path}/run", "--max_steps=1000000",
                 "--eval_every=0", "--save_every=0", PATIENT)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "log.jsonl").is_file() or len(
                log_rows(tmp_path / "run")) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(jobs[1].pid, signal.SIGSTOP)
        said = jobs[0].communicate(timeout=60)[0]
    finally:
        jobs[1].kill()
    assert jobs[0].returncode == STALLED
    assert "process 1 does not answer: it is stopped, or its machine is gone" in said
    jobs[1].communicate()


def test_who_is_waited_for():
    def found(*counts):
        return {rank: {"count": count, "place": f"place {count}"}
                for rank, count in enumerate(counts) if count is not None}

    assert "process 2 stalls behind place 4; the others" in verdict(found(5, 6, 4), 3, 9)
    assert "process 0, 1 stalls behind place 4" in verdict(found(4, 4, 6), 3, 9)
    assert "process 1 does not answer" in verdict(found(5, None, 4), 3, 9)
    assert "same place (place 5): look at the network" in verdict(found(5, 5), 2, 9)


def test_one_process_alone_is_not_watched(tmp_path):
    class Alone:
        ranks = 1

    watch = Watch(tmp_path, Alone(), 0.001, 0.001)
    watch.start()
    assert watch.thread is None
