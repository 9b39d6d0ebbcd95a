"""The claims of upload.py and export/model_card.py, against a little hub of ours that can refuse
and break."""

import base64
import hashlib
import http.server
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from conftest import ROOT, STAGES, newest, run

from common import checkpoint
from common.config import parse, read_json
from common.images import read_image
from export.model_card import STAGES as STAGES_OF_CARDS
from export.model_card import command_of

pytestmark = pytest.mark.filterwarnings(  # of the hub's own library
    "ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
WRITER, READER, WRONG = "hf_ThisOneMayWrite", "hf_ThisOneMayRead", "hf_ThisOneIsNobodys"
RESOLVE = re.compile(r"/(?:(spaces)/)?([\w-]+/[\w.-]+)/resolve/\w+/(.+)")
API = re.compile(r"/api/(models|spaces)/([\w-]+/[\w.-]+)(?:/(\w+)(?:/(.*))?)?")


class Hub(http.server.ThreadingHTTPServer):
    """Speaks as much of the Hugging Face hub's protocol as pushing and fetching models takes.

    repos: {(kind, name): {path: content}}; stored: large files by their sha256; log: every request,
    as (method, path); wishes: what repositories were made with; cut: requests whose connection is
    closed instead of an answer, by a part of their path.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.stored, self.log, self.wishes, self.cut = {}, {}, [], [], []
        self.large = ".safetensors"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def times(self, *words):
        """How many requests had all these words in their method and path."""
        return sum(all(word in " ".join(entry) for word in words) for entry in self.log)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def answer(self):
        path, body, hub = unquote(urlsplit(self.path).path), self.body(), self.server
        hub.log.append((self.command, path))
        for part in [part for part in hub.cut if part in path]:
            hub.cut.remove(part)
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", WRITER, READER):
            return self.send(401, {"error": "Invalid credentials"},
                             {"X-Error-Message": "Invalid credentials in Authorization header"})
        if self.command == "POST" and token != WRITER:  # a PUT has a secret address instead
            return self.send(403, {"error": "You don't have the rights"})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.send(200, {})
        if path.endswith("/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        if path.startswith("/stored/"):
            hub.stored[path.split("/")[-1]] = body
            return self.send(200, {})
        if match := API.fullmatch(path):
            return self.api(*match.groups(), body)
        if match := RESOLVE.fullmatch(path):
            return self.resolve(*match.groups())
        return self.send(404, {"error": path})

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def create(self, wish):
        self.server.wishes.append(wish)
        key = f"{wish['type']}s", f"{wish['organization']}/{wish['name']}"
        if key in self.server.repos:
            return self.send(409, {"error": "It exists"})
        self.server.repos[key] = {".gitattributes": b"*.safetensors filter=lfs\n"}
        self.send(200, {"url": f"{self.server.url}/{key[1]}"})

    def batch(self, wish):
        objects = [{"oid": item["oid"], "size": item["size"]} |
                   ({} if item["oid"] in self.server.stored else {"actions": {
                       "upload": {"href": f"{self.server.url}/stored/{item['oid']}"}}})
                   for item in wish["objects"]]
        self.send(200, {"transfer": "basic", "objects": objects})

    def api(self, kind, name, verb, rest, body):
        files = self.server.repos.get((kind, name))
        if files is None:
            return self.send(404, {"error": "Repository not found"},
                             {"X-Error-Code": "RepoNotFound"})
        if verb == "tree" and "/" in rest:
            return self.send(404, {}, {"X-Error-Code": "EntryNotFound"})
        if verb == "tree":
            return self.send(200, [described(path, content, self.server.large)
                                   for path, content in sorted(files.items())])
        if verb == "preupload":
            modes = [{"path": file["path"], "shouldIgnore": False, "uploadMode":
                      "lfs" if file["path"].endswith(self.server.large) else "regular"}
                     for file in json.loads(body)["files"]]
            return self.send(200, {"files": modes})
        if verb == "commit":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.stored[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            return self.send(200, {"commitUrl": f"{self.server.url}/{name}/commit/{'c' * 40}",
                                   "commitOid": "c" * 40})
        info = {"id": name, "sha": "c" * 40, "private": False, "tags": [], "downloads": 0,
                "siblings": [{"rfilename": path} for path in files]}
        self.send(200, info)

    def resolve(self, kind, name, path):
        files = self.server.repos.get((kind or "models", name), {})
        if path not in files:
            return self.send(404, {}, {"X-Error-Code": "EntryNotFound"})
        content = files[path]
        self.send(200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                                 "X-Repo-Commit": "c" * 40})

    def send(self, status, body, headers=()):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def described(path, content, large):
    """A file in a listing, with git's sum of it, or of what git keeps in its place."""
    entry = {"type": "file", "path": path, "size": len(content)}
    if path.endswith(large):
        digest = hashlib.sha256(content).hexdigest()
        return {**entry, "oid": "0" * 40,
                "lfs": {"oid": digest, "size": len(content), "pointerSize": 130}}
    return {**entry, "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub, the one that scripts in this process know; they have a token that may write."""
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.chdir(tmp_path)
    yield hub
    hub.shutdown()
    hub.server_close()


def upload(*argv):
    """Run upload.py here; its Result, in which no token may stand."""
    result = run("upload.py", *argv)
    for token in WRITER, READER, WRONG:
        assert token not in result.out + result.err
    return result


def elsewhere(hub, folder, *command, **more):
    """Run a command in a process of its own that knows the hub; what it printed."""
    kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    environment = {**kept, "HOME": str(folder), "HF_HOME": f"{folder}/hf", "HF_ENDPOINT": hub.url,
                   "HF_HUB_DISABLE_XET": "1", **more}
    result = subprocess.run([sys.executable, *command], cwd=folder, env=environment,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def listed(out):
    """{file: bytes} of what upload.py says that it sends."""
    rows = re.findall(r"^ +([\d,]+)  (\S+)$", out, re.MULTILINE)
    return {name: int(size.replace(",", "")) for size, name in rows}


def sizes(files):
    return {path: len(content) for path, content in files.items() if path != ".gitattributes"}


# ------------------------------------------------------------------------------------ to the hub


def test_a_checkpoint_pushed_as_it_is_opens_by_its_name(hub, tmp_path, pipeline):
    """What is sent is listed; it comes without what only resuming needs."""
    name, picture = pipeline.folder / "vision_sft", pipeline.data / "pictures" / "0.png"
    said = elsewhere(hub, tmp_path, ROOT / "upload.py", name, "--repo=someone/eyes",
                     "--native=True", HF_TOKEN=WRITER)
    files = hub.repos["models", "someone/eyes"]
    assert listed(said) == sizes(files)
    assert set(files) == {".gitattributes", "README.md", "config.json", "example.png",
                          "manifest.json", "model.safetensors", "tokenizer.json"}
    assert len(said.splitlines()) == len(listed(said)) + 2  # and nothing of progress bars
    assert "python sample.py someone/eyes" in files["README.md"].decode()
    question = (f"--image={picture}", "--prompt=What do you see?", "--max_tokens=16",
                "--precision=fp32")
    answer = elsewhere(hub, tmp_path, ROOT / "sample.py", "someone/eyes", *question)
    here = run("sample.py", name, *question).out
    assert here and here in answer
    assert WRITER not in said + answer
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or WRITER.encode() not in path.read_bytes(), path


THEIRS = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("someone/chat")
tokenizer = AutoTokenizer.from_pretrained("someone/chat")
chat = [{"role": "user", "content": "What is your name?"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True,
                                       return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].size(1):]
print(tokenizer.decode(ids, skip_special_tokens=True))
"""


def test_a_pushed_export_opens_by_its_name_without_our_code(hub, tmp_path, pipeline):
    name = pipeline.folder / "sft"
    result = upload(name, "--repo=someone/chat")
    assert result.status == 0, result.err
    files = hub.repos["models", "someone/chat"]
    assert listed(result.out) == sizes(files)
    assert hub.times("PUT", "/stored/") == 1  # the weights; the rest goes with the commit
    here = run("sample.py", name, "--prompt=What is your name?", "--max_tokens=16",
               "--precision=fp32").out
    assert here.strip() in elsewhere(hub, tmp_path, "-I", "-c", THEIRS)


def test_a_dry_run_sends_nothing(hub, pipeline, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    result = upload(pipeline.folder / "sft", "--repo=someone/chat", "--dry_run=True")
    assert result.out.startswith("would push to the model someone/chat:\n")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(
        listed(result.out))
    assert (result.status, result.err, hub.log) == (0, "", [])


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_is_private_if_wanted(private, hub, pipeline):
    flags = ["--native=True", *["--private=True"] * private]
    assert upload(pipeline.folder / "sft", "--repo=someone/chat", *flags).status == 0
    assert [wish.get("visibility") == "private" for wish in hub.wishes] == [private]


def test_a_push_that_broke_off_goes_on(hub, pipeline):
    """The large file is not sent again; and once all is there, nothing is."""
    command = (pipeline.folder / "sft", "--repo=someone/chat", "--native=True")
    hub.cut.append("/commit/")
    refusal = upload(*command).refusal
    assert refusal.startswith("error: the push broke off (RemoteProtocolError: ")
    assert refusal.endswith("start the command again, and what is there already is not sent again")
    assert set(hub.repos["models", "someone/chat"]) == {".gitattributes"}
    result = upload(*command)
    assert result.status == 0 and "pushed: http://127.0.0.1" in result.out, result.err
    assert listed(result.out) == sizes(hub.repos["models", "someone/chat"])
    assert hub.times("PUT", "/stored/") == 1
    assert upload(*command).out.endswith("pushed: someone/chat has all of that already\n")
    assert hub.times("/commit/") == 2


def test_a_repository_with_other_content_is_left_alone(hub, pipeline):
    command = (pipeline.folder / "sft", "--repo=someone/chat")
    before = {".gitattributes": b"", "README.md": b"", "config.json": b"{}", "notes.txt": b"mine",
              "model-00001-of-00002.safetensors": b"old"}
    hub.repos["models", "someone/chat"] = dict(before)
    assert upload(*command).refusal == (
        "error: someone/chat is there already with other content (config.json, "
        "model-00001-of-00002.safetensors, notes.txt); say another name, or --overwrite=True to "
        "write into it")
    assert hub.repos["models", "someone/chat"] == before and not hub.times("POST")
    assert upload(*command, "--overwrite=True").status == 0
    files = hub.repos["models", "someone/chat"]
    assert files["notes.txt"] == b"mine" and len(files["config.json"]) > 2
    assert "model-00001-of-00002.safetensors" not in files  # or readers might take the old weights


@pytest.mark.parametrize(("token", "words"), [
    (WRONG, "the hub refused (401): the token is not accepted: check HF_TOKEN"),
    (READER, "the hub refused (403): the token may not write there: give it write access"),
    (None, "there is no token for the hub: set HF_TOKEN, or say `hf auth login`")])
def test_a_token_that_does_not_do_is_named_but_not_shown(token, words, hub, pipeline, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert upload(pipeline.folder / "sft", "--repo=someone/chat", "--native=True").refusal == (
        f"error: {words}")
    assert hub.repos == {} and (token or not hub.log)


def test_a_token_of_hf_auth_login_does(hub, tmp_path, pipeline, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(WRITER)
    assert upload(pipeline.folder / "sft", "--repo=someone/chat", "--native=True").status == 0


def test_a_hub_that_is_not_there_is_a_sentence(hub, pipeline, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.shutdown()
    hub.server_close()
    refusal = upload(pipeline.folder / "sft", "--repo=someone/chat", "--native=True").refusal
    assert refusal.startswith("error: the push broke off (ConnectError: ")


@pytest.mark.parametrize("repo", ["my model", "a/b/c", "-/-"])
def test_a_name_that_no_repository_can_have_is_refused(repo, hub, pipeline):
    assert upload(pipeline.folder / "sft", f"--repo={repo}", "--native=True").refusal == (
        f"error: the hub takes no repository called {repo!r}: say NAME/REPO")


# ----------------------------------------------------------------------------------------- a Space


@pytest.mark.slow
def test_a_pushed_space_runs_by_itself(hub, tmp_path, pipeline, monkeypatch):
    """It goes the way that uploads take today, a connection that breaks once included; then its
    app.py runs in an empty environment."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.large, hub.cut = ".nothing", ["/commit/"]
    result = upload(pipeline.folder / "vision_sft", "--space=someone/page")
    assert result.status == 0, result.err
    assert hub.wishes[0]["type"] == "space" and hub.wishes[0]["sdk"] == "gradio"
    files = hub.repos["spaces", "someone/page"]
    assert listed(result.out) == sizes(files)
    assert {"app.py", "requirements.txt", "README.md", "checkpoint/manifest.json"} <= set(files)
    assert not any(path.startswith(("tests", "checkpoint/state")) for path in files)
    head = front_matter(files["README.md"].decode())
    assert (head["sdk"], head["app_file"], head["title"]) == ("gradio", "app.py", "page")
    assert head["sdk_version"].split(".")[0] >= "6"
    folder = tmp_path / "space"
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "app.py", f"--port={port}", "--device=cpu"], cwd=folder, text=True,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": ""},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        line = process.stdout.readline()
        assert f":{port}" in line, line + process.stdout.read()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as page:
            assert page.status == 200 and "vision_sft" in page.read().decode()
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_a_space_takes_a_model_that_chats(hub, pipeline):
    refusal = upload(pipeline.folder / "pretrain", "--space=someone/page").refusal
    assert "continues text and does not chat" in refusal and hub.log == []


# ------------------------------------------------------------------------------------- to a folder


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path, pipeline, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "notes.txt").write_text("mine")
    (tmp_path / "models" / "model-00001-of-00002.safetensors").write_text("old")
    command = (pipeline.folder / "sft", "--to=models")
    assert upload(*command).refusal == (
        "error: the folder models is not empty; say another, or --overwrite=True")
    assert len(list((tmp_path / "models").iterdir())) == 2
    result = upload(*command, "--overwrite=True")
    assert (result.status, result.out) == (0, "written: models\n")
    names = {path.name for path in (tmp_path / "models").iterdir()}
    assert {"notes.txt", "config.json", "model.safetensors"} <= names
    assert "model-00001-of-00002.safetensors" not in names
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def damaged(pipeline, folder):
    """A copy of a checkpoint with a flipped byte in its weights."""
    copy = shutil.copytree(newest(pipeline.folder / "sft"), folder / "damaged")
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    return copy


@pytest.mark.parametrize(("name", "flags", "words"), [
    ("nothing", ["--to=new"], "there is no checkpoint nothing"),
    ("", ["--to=new"], "say which checkpoint"),
    ("sft", [], "say where it should go: --to, --repo, --space or --gguf"),
    ("sft", ["--to=file"], "file is a file; say a folder"),
    ("sft", ["--to=file/new"], "cannot write into"),
    ("damaged", ["--to=new/er"], "is damaged: its sha256 is not the manifest's"),
    ("clip_pretrain", ["--to=new"], "here a decoder or vision checkpoint is needed"),
    ("clip_pretrain", ["--space=a/b"], "here a decoder or vision checkpoint is needed"),
    ("sft", ["--to=new", "--picture=a.png"], "this checkpoint cannot see"),
    ("vision_sft", ["--to=new", "--picture=a.png"], "there is no picture a.png"),
    ("sft", ["--to=new", "--licence=mit"], "did you mean license?"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)
def test_what_cannot_be_is_one_sentence_and_leaves_nothing(name, flags, words, tmp_path, pipeline,
                                                           monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "file").write_text("mine")
    if name == "damaged":
        name = damaged(pipeline, tmp_path)
    elif name in STAGES:
        name = pipeline.folder / name
    before = sorted(tmp_path.rglob("*"))
    assert words in upload(*([name] if name else []), *flags).refusal
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_is_never_written_over(pipeline, tmp_path):
    copy = shutil.copytree(newest(pipeline.folder / "sft"), tmp_path / "copy")
    refusal = upload(copy, f"--to={copy}", "--overwrite=True").refusal
    assert "is the checkpoint itself" in refusal and checkpoint.read(copy)


def test_an_export_can_be_read_by_others_than_its_owner(tmp_path, pipeline):
    assert upload(pipeline.folder / "sft", f"--to={tmp_path}/new").status == 0
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()} == {0o644}


# ------------------------------------------------------------------------------------------- cards


def front_matter(card):
    """The YAML at the head of a card."""
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


@pytest.fixture(scope="module")
def cards(pipeline, tmp_path_factory):
    """{stage: the folder that upload.py --to writes}."""
    folder = tmp_path_factory.mktemp("cards")
    runs = shutil.copytree(pipeline.folder, folder / "runs")
    (runs / "report.json").write_text(json.dumps({"vqa_exact": 0.75}))
    for stage in ("pretrain", "sft", "vision_sft"):
        flags = f"--to={folder}/{stage}", "--license=cc0-1.0"
        assert upload(runs / stage, *flags).status == 0
    return folder


@pytest.mark.parametrize(("stage", "tag"), [
    ("pretrain", "text-generation"), ("sft", "text-generation"),
    ("vision_sft", "image-text-to-text")])
def test_the_head_of_a_card_says_what_the_hub_wants_to_know(stage, tag, cards):
    head = front_matter((cards / stage / "README.md").read_text())
    assert head == {"license": "cc0-1.0", "language": "en", "library_name": "transformers",
                    "pipeline_tag": tag, "tags": ["nanogpt-vision"]}


def test_a_card_tells_stages_losses_data_and_scores(cards, pipeline):
    card = (cards / "vision_sft" / "README.md").read_text()
    for stage in STAGES:
        loss = read_json(newest(pipeline.folder / stage) / "config.json")["metrics"]["val_loss"]
        row = rf"\| `{stage}` \| 6 \| {loss:.4f} \| \d+\.\d \|  \|"  # nobody has said a price
        assert any(re.fullmatch(row, line) for line in card.splitlines())
    for kind in "text", "chats", "captions", "scenes":
        assert str(pipeline.data / kind) in card
    assert "| vqa_exact | 0.75 |" in card and "## Limits" in card
    assert "scores" not in (cards / "sft" / "README.md").read_text().lower()


def test_the_commands_of_a_card_are_those_that_made_it(cards, pipeline):
    """They parse, to the very settings of the run."""
    card = (cards / "vision_sft" / "README.md").read_text()
    commands = [shlex.split(line) for line in card.splitlines() if line.startswith("python ")]
    assert sorted(command[1] for command in commands) == sorted(f"{stage}.py" for stage in STAGES)
    for _, script, *flags in commands:
        stage = script.removesuffix(".py")
        config = vars(parse(__import__(stage).Config, flags))
        assert config == read_json(newest(pipeline.folder / stage) / "config.json")["settings"]


def test_a_command_survives_a_shell_and_names_only_our_stages():
    settings = {"data": "my data; rm -rf x", "out": "a'b"}
    command = command_of({"stage": "pretrain", "settings": settings})
    config = parse(__import__("pretrain").Config, shlex.split(command)[2:])
    assert (config.data, config.out) == (settings["data"], settings["out"])
    assert command_of({"stage": "antigravity", "settings": settings}) == ""
    assert set(STAGES_OF_CARDS) == set(STAGES)


def test_a_card_shows_a_picture_and_what_the_model_says_of_it(cards, pipeline):
    card = (cards / "vision_sft" / "README.md").read_text()
    shown = cards / "vision_sft" / re.search(r"!\[.*\]\((.*)\)", card)[1]
    held_out = sorted((pipeline.data / "pictures").glob("*.png"))[0]
    assert shown.read_bytes() == held_out.read_bytes() and read_image(shown)
    answer = run("sample.py", pipeline.folder / "vision_sft", f"--image={held_out}",
                 "--prompt=What do you see?", "--max_tokens=64", "--precision=fp32").out
    assert f"**What do you see?** {answer.strip()}" in card


@pytest.mark.slow
def test_the_code_of_a_card_runs_where_ours_is_not(cards, hub):
    """That of a text model, of one that chats, and of one that sees."""
    shutil.copy(cards / "vision_sft" / "example.png", cards / "picture.jpg")
    texts = [(cards / stage / "README.md").read_text()
             for stage in ("pretrain", "sft", "vision_sft")]
    code = "\n".join(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1] for text in texts)
    said = elsewhere(hub, cards, "-I", "-c", code, HF_HUB_OFFLINE="1")
    assert said.count("'generated_text': ") == 3
    assert re.search(r"\*\*What do you see\?\*\* (.*)", texts[2])[1] in said


def test_without_transformers_a_sentence_says_how_to_get_it(pipeline, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.utils.logging", None)
    assert upload(pipeline.folder / "sft", f"--to={tmp_path}/new").refusal == (
        "error: this is written by a library that is missing here: pip install transformers")
