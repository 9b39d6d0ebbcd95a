"""A process that stalls is named, and the job ends instead of costing money."""

import signal
from types import SimpleNamespace

import pytest
from conftest import log_rows

from faults.harness import server, until
from train.watchdog import STALLED, Watch, verdict


def start(pipeline, tmp_path, stalls, step, *more):
    """Two processes of a run; process `stalls` sleeps from `step` on."""
    return server().start_together(
        2, "tests/faults/stalling.py", stalls, step, "pretrain.py", *pipeline.flags("pretrain"),
        f"--out={tmp_path}/run", "--step_timeout=0.05", *more)


@pytest.mark.parametrize("stalls", [0, 1])
def test_a_sleeping_process_is_named(pipeline, tmp_path, stalls):
    jobs = start(pipeline, tmp_path, stalls, 3)
    statuses = [job.wait(60) for job in jobs]
    said = jobs[0].said + jobs[1].said
    assert statuses == [STALLED, STALLED], said
    assert "Traceback" not in said  # of a connection that broke because the other had ended
    assert f"process {stalls} stalls after the start of step 3" in said
    assert "3 seconds" in said
    assert "time.sleep" in said or "stalling_forward" in said  # from its own stack
    assert log_rows(tmp_path / "run")[-1]["step"] == 2


def test_a_stopped_process_is_named(pipeline, tmp_path):
    jobs = start(pipeline, tmp_path, 7, 0, "--max_steps=1000000", "--eval_every=0",
                 "--save_every=0")
    log = tmp_path / "run" / "log.jsonl"
    try:
        until(lambda: log.exists() and log.read_text().count("\n") > 2, every=0.05)
        jobs[1].kill(signal.SIGSTOP)
        assert jobs[0].wait() == STALLED, jobs[0].said
    finally:
        jobs[1].kill(signal.SIGKILL)
    assert "process 1 does not answer" in jobs[0].said


@pytest.mark.parametrize(("counts", "expected"), [
    ((5, 6, 4), "process 2 stalls after place 4; the others"),
    ((4, 4, 6), "process 0, 1 stalls after place 4"),
    ((5, None, 4), "process 1 does not answer"),
    ((5, 5), "same place (place 5): check the network"),
])
def test_the_process_behind_the_others_is_named(counts, expected):
    found = {rank: {"count": count, "place": f"place {count}"}
             for rank, count in enumerate(counts) if count is not None}
    assert expected in verdict(found, len(counts), 9)


def test_a_single_process_is_not_watched(tmp_path):
    watch = Watch(tmp_path, SimpleNamespace(ranks=1), 0.001, 0.001)
    watch.start()
    assert watch.thread is None
