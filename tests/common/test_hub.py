"""The claims of common/hub.py, against a fake hub that can break in the middle of a file."""

import io
import os
import subprocess
import sys
import threading

import fake_hub
import numpy as np
import pytest
from conftest import COMMON, ROOT, TINY, newest, run

from common import hub
from common.config import UserError
from train.log import Log

REPOSITORY = "someone/Some-Tokens"
NAMES = ("a_val_000000.npy", "a_train_000001.npy", "a_train_000002.npy", "a_train_000003.npy")
STREAMING = (f"--data=hf://{REPOSITORY}", "--out=out", *TINY["pretrain"], *COMMON,
             "--max_steps=16", "--save_every=0", "--eval_every=0")


def shards():
    """{name: content} of the files in the fake hub's data set."""
    generator, files = np.random.default_rng(0), {"README.md": b"tokens"}
    for name in NAMES:
        content = io.BytesIO()
        np.save(content, generator.integers(0, 50257, 4001).astype(np.uint16))
        files[name] = content.getvalue()
    return files


@pytest.fixture
def server(monkeypatch):
    """A fake hub with REPOSITORY. While its `gate` is closed, it sends half of the later shards."""
    with fake_hub.running(monkeypatch) as server:
        server.repos["datasets", REPOSITORY] = server.files = shards()
        server.gate = threading.Event()
        server.gate.set()
        server.halfway = lambda name: name in NAMES[:2] or server.gate.wait(60)
        yield server
        server.gate.set()


@pytest.fixture
def remote(server):
    return hub.listing(REPOSITORY)[0]


def test_a_file_is_downloaded_once_and_again_if_damaged_on_disk(server, remote, tmp_path):
    path = hub.fetch(REPOSITORY, remote, tmp_path)
    assert path.read_bytes() == server.files[path.name]
    assert hub.fetch(REPOSITORY, remote, tmp_path) == path and len(server.sent) == 1
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    hub.fetch(REPOSITORY, remote, tmp_path)
    assert path.read_bytes() == server.files[path.name] and len(server.sent) == 2


def test_a_broken_transfer_is_resumed(server, remote, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    server.truncated[remote.name] = 5000
    path = hub.fetch(REPOSITORY, remote, tmp_path)
    assert path.read_bytes() == server.files[path.name] and len(server.sent) == 2


def test_a_file_that_arrives_damaged_is_not_kept(server, remote, tmp_path):
    server.damaged.add(remote.name)
    with pytest.raises(UserError, match=rf"{remote.name} of {REPOSITORY}: it arrived damaged"):
        hub.fetch(REPOSITORY, remote, tmp_path)
    assert not (tmp_path / remote.name).exists()
    server.damaged.clear()
    path = hub.fetch(REPOSITORY, remote, tmp_path)
    assert path.read_bytes() == server.files[path.name]


def test_background_downloads_outlast_failures(server, remote, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("common.hub.time.sleep", lambda seconds: server.damaged.clear())
    server.damaged.add(remote.name)
    hub.fetch_all(REPOSITORY, hub.listing(REPOSITORY), tmp_path, said.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)
    assert len(said) == 1 and "trying again" in said[0]


def test_an_unreachable_hub_is_named(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    server.close()
    with pytest.raises(UserError, match="cannot list the data set some/one"):
        hub.listing("some/one")


def test_fineweb_downloads_shards_once_and_the_folder_trains(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        result = run("prepare.py", "fineweb", f"--repository={REPOSITORY}", "--shards=2",
                     "--out=tokens")
        assert result.status == 0, result.err
    assert sorted(server.sent) == sorted(NAMES[:3])
    flags = ("--data=tokens", "--out=out", *TINY["pretrain"], *COMMON)
    assert run("pretrain.py", *flags).status == 0


def test_training_starts_with_the_first_shard_and_gives_the_same_weights(
    server, tmp_path, monkeypatch
):
    """As when all shards are there from the start."""
    say = Log.say

    def heard(log, text):
        say(log, text)
        if text.startswith("waiting for"):
            server.gate.set()

    monkeypatch.setattr(Log, "say", heard)
    weights = []
    for name in ("slow", "fast"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "slow":
            server.gate.clear()
        result = run("pretrain.py", *STREAMING)
        assert result.status == 0, result.err
        assert ("waiting for" in result.out) == (name == "slow"), result.out
        if name == "slow":
            assert result.out.index("step     0") < result.out.index("waiting for")
        weights.append((newest("out") / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_run_that_waits_for_data_can_be_stopped_and_resumed(server, tmp_path):
    server.gate.clear()
    environment = {**os.environ, **server.environment()}
    command = [sys.executable, ROOT / "pretrain.py", *STREAMING]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
                               text=True)
    for line in process.stdout:
        if line.startswith("waiting for"):
            break
    process.terminate()
    assert process.wait(30) == 75
    server.gate.set()
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "step_" in result.stdout.split("step ")[0]  # the checkpoint it resumes from
