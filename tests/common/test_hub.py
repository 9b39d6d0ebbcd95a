"""The claims of common/hub.py, against a little hub of our own that can break in the middle."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import COMMON, ROOT, TINY, newest, run

from common import hub
from common.config import UserError
from train.log import Log

REPOSITORY = "someone/Some-Tokens"
NAMES = ("a_val_000000.npy", "a_train_000001.npy", "a_train_000002.npy", "a_train_000003.npy")


class Hub(http.server.ThreadingHTTPServer):
    """Speaks as much of the Hugging Face hub's protocol as listing and fetching files takes."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.sent = folder, []  # (name, first byte) of every transfer
        self.cut, self.spoil, self.hold = {}, set(), threading.Event()
        self.hold.set()  # cleared: files but the first two wait
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        if "/api/datasets/" in self.path:
            entries = []
            for path in sorted(self.server.folder.iterdir()):
                content = path.read_bytes()
                digest = hashlib.sha256(content).hexdigest()
                entries.append({"type": "file", "path": path.name, "size": len(content),
                                "oid": digest[:40],
                                "lfs": {"oid": digest, "size": len(content), "pointerSize": 100}})
            return self.send(200, json.dumps(entries).encode(), {})
        self.answer(with_body=True)

    def answer(self, with_body):
        path = self.server.folder / self.path.split("/")[-1].split("?")[0]
        if not path.is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        first = 0
        if (wanted := self.headers.get("Range")) and with_body:
            first = int(wanted.removeprefix("bytes=").split("-")[0])
        if path.name in self.server.spoil:
            content = bytes(len(content))
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": "c" * 40, "Accept-Ranges": "bytes",
                   "X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{digest}"'}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        self.send(206 if first else 200, content[first:], headers, path.name, first, with_body)

    def send(self, status, body, headers, name="", first=0, with_body=True):
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not with_body:
            return
        if name:
            self.server.sent.append((name, first))
            if name not in NAMES[:2]:
                self.server.hold.wait(60)
        limit = self.server.cut.pop(name, len(body))
        self.wfile.write(body[:limit])
        if limit < len(body):
            self.close_connection = True
            self.connection.close()


@pytest.fixture
def server(tmp_path, monkeypatch):
    folder = tmp_path / "remote"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in NAMES:
        np.save(folder / name, generator.integers(0, 50257, 4001).astype(np.uint16))
    (folder / "README.md").write_text("tokens")
    server = Hub(folder)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub, "PAUSE", 0.01)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield server
    server.hold.set()
    server.shutdown()
    server.server_close()


def same(path, server):
    return path.read_bytes() == (server.folder / path.name).read_bytes()


def test_the_listing_names_shards_with_their_sizes_and_sums(server):
    found = hub.listing(REPOSITORY)
    assert [remote.name for remote in found] == sorted(NAMES)
    assert {remote.size for remote in found} == {128 + 2 * 4001}
    content = (server.folder / found[0].name).read_bytes()
    assert found[0].sha256 == hashlib.sha256(content).hexdigest()


def test_a_file_is_fetched_once(server, tmp_path):
    remote = hub.listing(REPOSITORY)[0]
    path = hub.fetch(REPOSITORY, remote, tmp_path / "data")
    assert same(path, server) and len(server.sent) == 1
    assert hub.fetch(REPOSITORY, remote, tmp_path / "data") == path
    assert len(server.sent) == 1


def test_a_broken_transfer_is_mended(server, tmp_path):
    remote = hub.listing(REPOSITORY)[0]
    server.cut[remote.name] = 5000
    path = hub.fetch(REPOSITORY, remote, tmp_path / "data")
    assert same(path, server) and len(server.sent) == 2
    assert [entry.name for entry in (tmp_path / "data").iterdir()] == [remote.name]


def test_a_damaged_file_is_never_kept(server, tmp_path):
    remote = hub.listing(REPOSITORY)[0]
    server.spoil.add(remote.name)
    said = []
    with pytest.raises(UserError, match=r"cannot fetch a_train_000001\.npy of someone/Some-Tokens: "
                                        "it arrived damaged; the same command goes on"):
        hub.fetch(REPOSITORY, remote, tmp_path / "data", said.append)
    assert len(said) == hub.ATTEMPTS - 1 and not (tmp_path / "data" / remote.name).exists()
    server.spoil.clear()
    assert same(hub.fetch(REPOSITORY, remote, tmp_path / "data"), server)


def test_a_file_that_was_damaged_on_the_disk_is_fetched_again(server, tmp_path):
    remote = hub.listing(REPOSITORY)[0]
    path = hub.fetch(REPOSITORY, remote, tmp_path / "data")
    content = bytearray(path.read_bytes())
    content[4000] ^= 1
    path.write_bytes(content)
    assert same(hub.fetch(REPOSITORY, remote, tmp_path / "data"), server)


def test_a_hub_that_is_not_there_is_named(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="the Hugging Face hub does not list the data set some/one"):
        hub.listing("some/one")


def test_fineweb_fetches_shards_once_and_the_folder_trains(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        result = run("prepare.py", "fineweb", f"--repository={REPOSITORY}", "--shards=2",
                     "--out=tokens")
        assert result.status == 0, result.err
    assert sorted(name for name, _ in server.sent) == sorted((NAMES[1], NAMES[2], NAMES[0]))
    flags = ("--data=tokens", "--out=out", *TINY["pretrain"], *COMMON)
    assert run("pretrain.py", *flags).status == 0


def test_training_starts_with_the_first_shard_and_takes_the_same_steps(
    server, tmp_path, monkeypatch
):
    """The others are held back until the run waits for them; all at once gives the same weights."""
    flags = (f"--data=hf://{REPOSITORY}", *TINY["pretrain"], *COMMON, "--max_steps=16",
             "--save_every=0", "--eval_every=0")
    say = Log.say

    def heard(log, text):
        say(log, text)
        if text.startswith("waiting for"):
            server.hold.set()

    monkeypatch.setattr(Log, "say", heard)
    weights = []
    for name, held in (("slow", True), ("fast", False)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if held:
            server.hold.clear()
        result = run("pretrain.py", *flags, "--out=out")
        assert result.status == 0, result.err
        assert ("waiting for" in result.out) == held, result.out
        if held:
            assert result.out.index("step     0") < result.out.index("waiting for")
        weights.append((newest("out") / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_run_that_waits_for_data_can_be_stopped_and_goes_on(server, tmp_path):
    server.hold.clear()
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, ROOT / "pretrain.py", f"--data=hf://{REPOSITORY}", "--out=out",
               *TINY["pretrain"], *COMMON, "--max_steps=16", "--save_every=0", "--eval_every=0"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
                               text=True)
    for line in process.stdout:
        if line.startswith("waiting for"):
            break
    process.terminate()
    assert process.wait(30) == 75
    server.hold.set()
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "going on from" in result.stdout
