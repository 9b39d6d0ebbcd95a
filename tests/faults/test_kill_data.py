"""kill -9 in the middle of making or fetching data: the same command makes the same bytes."""

import shutil
import signal
import time
from collections import Counter
from threading import Semaphore

import fake_hub
import pytest
from conftest import COMMON, DEMO, TINY
from test_hub import NAMES, REPOSITORY, shards
from test_resumable import many_images, many_rows

from common import checkpoint
from faults.conftest import scale
from faults.harness import chance, server, until
from faults.test_kill import assert_same_run, plain

# ------------------------------------------------------------------------------------- prepare.py

OFTEN = (("prep.resumable.COMMIT_SECONDS", 0), ("prep.resumable.BATCH_ROWS", 16))  # as in long work


@pytest.fixture(params=scale(["chat"], ["demo", "text", "chat", "images"]))
def making(request, world_data, tmp_path):
    """A command of prepare.py, without --out."""
    if request.param == "demo":
        return ["prepare.py", "demo", *DEMO]
    (tmp_path / "in").mkdir()
    source = [many_rows(tmp_path / "in/rows.jsonl", 100)]
    if request.param == "images":
        source = [many_images(tmp_path / "in", 60), f"--image_root={tmp_path}/in/images",
                  "--image_size=32"]
    return ["prepare.py", request.param, f"--tokenizer={world_data}/text", f"--files={source[0]}",
            *source[1:]]


def made(*argv, **more):
    """A Job of prepare.py that has ended well."""
    job = server().start(*argv, settings=OFTEN, **more)
    assert job.wait() == 0, job.said
    return job


def test_prepare_killed_at_any_change_keeps_the_older_data_and_makes_the_same_bytes(
        making, tmp_path):
    folder, out = tmp_path / "data", tmp_path / "data/out"
    made(*making, "--seed=1", f"--out={out}")
    shutil.copytree(folder, tmp_path / "older")
    job = made(*making, f"--out={out}", below=folder)
    count, new = len(job.changes), checkpoint.sums(out)
    older = checkpoint.sums(tmp_path / "older/out")
    assert count > 10 and older != new
    last = [number for number, change in enumerate(job.changes, 1)  # the new one takes its place
            if " /out" in change or change.startswith("os.rename")]
    luck, died = chance(making[1]), Counter()
    for number in sorted({*luck.sample(range(1, count), min(scale(1, 30), count - 1)), *last}):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "older", folder)
        job = server().start(*making, f"--out={out}", settings=OFTEN, below=folder, die_at=number)
        assert job.wait() == -signal.SIGKILL or len(job.changes) < number, job.said
        died[plain(job.changes[-1])] += 1
        assert not out.exists() or checkpoint.sums(out) in (older, new), job.changes[-1]
        made(*making, f"--out={out}")
        assert checkpoint.sums(out) == new
        assert [path.name for path in folder.iterdir()] == ["out"]
    print(f"prepare.py {making[1]}: killed at {died.total()} of {count} changes: {dict(died)}")


def test_prepare_killed_at_any_time_makes_the_same_bytes(making, tmp_path):
    began = time.monotonic()
    made(*making, f"--out={tmp_path}/whole")
    seconds, luck, killed = time.monotonic() - began, chance(making[1], "time"), 0
    for number in range(scale(2, 20)):  # also inside SQLite, whose changes are not seen above
        job = server().start(*making, f"--out={tmp_path}/out", settings=OFTEN)
        time.sleep(luck.random() * seconds)
        job.kill(signal.SIGKILL)
        killed += job.wait() == -signal.SIGKILL
        if (tmp_path / "out").exists() or number % 5 == 4:
            made(*making, f"--out={tmp_path}/out")
            assert checkpoint.sums(tmp_path / "out") == checkpoint.sums(tmp_path / "whole")
            shutil.rmtree(tmp_path / "out")
    made(*making, f"--out={tmp_path}/out")
    assert checkpoint.sums(tmp_path / "out") == checkpoint.sums(tmp_path / "whole")
    print(f"prepare.py {making[1]}: killed {killed} times")


# -------------------------------------------------------------------------------------- downloads


@pytest.fixture
def slow_hub(monkeypatch):
    """A fake hub that sends half of each file, and the rest only if a test allows it."""
    with fake_hub.running(monkeypatch) as hub:
        hub.repos["datasets", REPOSITORY] = shards()
        hub.halves, hub.allowed = 0, Semaphore(0)

        def halfway(_):
            hub.halves += 1
            hub.allowed.acquire(timeout=60)

        hub.halfway = halfway
        yield hub
        hub.allowed.release(100)


FETCHING = {
    "prepare.py": ("fineweb", f"--repository={REPOSITORY}", "--shards=3", "--out=data"),
    "pretrain.py": (f"--data=hf://{REPOSITORY}", *TINY["pretrain"], *COMMON, "--max_steps=16",
                    "--out=run"),
}


@pytest.mark.parametrize("script", scale(["prepare.py"], FETCHING))
def test_a_download_killed_in_the_middle_is_made_whole(slow_hub, script, tmp_path):
    """By prepare.py fineweb, and by a run that fetches while it trains; once in every file."""
    environment = slow_hub.environment()
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    for number in range(scale(1, len(NAMES))):
        slow_hub.halves, slow_hub.allowed = 0, Semaphore(number > 0)
        job = server().start(script, *FETCHING[script], folder=tmp_path / "killed", **environment)
        until(lambda number=number: slow_hub.halves > (number > 0))
        job.kill(signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL, job.said
        slow_hub.allowed.release(100)
    slow_hub.allowed = Semaphore(100)
    for name in ("killed", "whole"):
        job = server().start(script, *FETCHING[script], folder=tmp_path / name, **environment)
        assert job.wait() == 0, job.said
    fetched = sorted((tmp_path / "killed").rglob("*.npy"))
    assert [path.name for path in fetched] == sorted(NAMES)
    for path in fetched:
        assert path.read_bytes() == slow_hub.repos["datasets", REPOSITORY][path.name]
    assert not list((tmp_path / "killed").rglob(".incoming*"))
    if script == "pretrain.py":
        assert_same_run(tmp_path / "killed/run", tmp_path / "whole/run")
