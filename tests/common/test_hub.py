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


def test_a_file_is_complete_and_undamaged_or_absent(server, tmp_path, monkeypatch):
    for library in "file_download", "utils._http":
        monkeypatch.setattr(f"huggingface_hub.{library}.time.sleep", lambda seconds: None)
    remote = hub.listing(REPOSITORY)[0]
    path, content = tmp_path / remote.name, server.files[remote.name]
    server.damaged.add(remote.name)
    with pytest.raises(UserError, match=rf"{remote.name} of {REPOSITORY}: it arrived damaged"):
        hub.fetch(REPOSITORY, remote, tmp_path)
    assert not path.exists()
    server.damaged.clear()
    server.truncated[remote.name] = 5000  # a broken transfer, which is resumed
    for n_sent in (3, 3):  # the second time it is there
        assert hub.fetch(REPOSITORY, remote, tmp_path) == path
        assert path.read_bytes() == content and len(server.sent) == n_sent
    path.write_bytes(content[:-1] + b"x")
    hub.fetch(REPOSITORY, remote, tmp_path)
    assert path.read_bytes() == content and len(server.sent) == 4
    server.close()
    with pytest.raises(UserError, match="cannot list the data set some/one"):
        hub.listing("some/one")


@pytest.mark.parametrize("name, split", [
    ("a_train_000001.npy", "train"), ("pretrain/val_000.npy", "val"), ("val/train0.npy", "train"),
    ("train_medieval_001.npy", "train"), ("Validation-00.npy", "val"), ("test_000.npy", "test"),
    ("train/000.npy", ""), ("pretrain_interval.npy", "")])
def test_a_whole_word_of_its_own_name_decides_the_split_of_a_shard(name, split):
    assert hub.Remote(name, 10, "").split == split


@pytest.mark.parametrize("names, said", [
    (("train/000.npy", "val/000.npy"), "two files of the same name, train/000.npy and val/000.npy"),
    (("a/x_train.npy", "b/x_train.npy", "val.npy"), "a/x_train.npy and b/x_train.npy; rename"),
    (("a/train_0.npy", "train_val_0.npy"), "train_val_0.npy has the words of two splits"),
    (("val_0.npy", "train/0.npy"), "no .npy file with the word train in its name")])
def test_shards_that_cannot_be_told_apart_are_refused_by_name(names, said, server):
    server.repos["datasets", REPOSITORY] = dict.fromkeys(names, server.files[NAMES[0]])
    with pytest.raises(UserError, match=said):
        hub.listing(REPOSITORY)


def test_background_downloads_outlast_failures(server, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("common.hub.time.sleep", lambda seconds: server.damaged.clear())
    server.damaged.add(NAMES[1])
    hub.fetch_all(REPOSITORY, hub.listing(REPOSITORY), tmp_path, said.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)
    assert len(said) == 1 and "trying again" in said[0]


def test_training_starts_with_the_first_shard(server, tmp_path, monkeypatch):
    """The weights are those of a run that has all shards from the start."""
    say = Log.say

    def heard(log, text):
        say(log, text)
        if text.startswith("waiting for"):
            server.gate.set()

    monkeypatch.setattr(Log, "say", heard)
    server.gate.clear()
    printed, weights = [], []
    for name in ("slow", "fast"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        result = run("pretrain.py", *STREAMING)
        assert result.status == 0, result.err
        printed.append(result.out)
        weights.append((newest("out") / "model.safetensors").read_bytes())
    assert printed[0].index("step     0") < printed[0].index("waiting for")
    assert "waiting for" not in printed[1] and weights[0] == weights[1]


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
