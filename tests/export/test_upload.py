"""The claims of upload.py and export/model_card.py, with a fake hub that can refuse and break."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request

import fake_hub
import pytest
import yaml
from conftest import ROOT, STAGES, newest, run
from fake_hub import READER, WRITER, WRONG
from test_layout import MODULES, imports

import upload as script
from common.checkpoint import file_sum
from common.config import parse, read_json
from common.images import read_image
from export.model_card import command_of

pytestmark = pytest.mark.filterwarnings(  # of the hub's own library
    "ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A fake hub; scripts in this process use it with a token that may write."""
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.chdir(tmp_path)
    with fake_hub.running(monkeypatch) as hub:
        yield hub


def upload(*argv):
    """Run upload.py here; its Result, in which no token may stand."""
    result = run("upload.py", *argv)
    for token in WRITER, READER, WRONG:
        assert token not in result.out + result.err
    return result


def listed(out):
    """{file: bytes} of what upload.py says that it sends."""
    rows = re.findall(r"^ +([\d,]+)  (\S+)$", out, re.MULTILINE)
    return {name: int(size.replace(",", "")) for size, name in rows}


def sizes(files):
    return {path: len(content) for path, content in files.items() if path != ".gitattributes"}


def test_a_native_push_opens_by_its_name(hub, tmp_path, pipeline, monkeypatch):
    """What is sent is listed; it comes without what only resuming needs."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    name, image = pipeline.folder / "vision_sft", pipeline.data / "images" / "0.png"
    said = upload(name, "--repo=someone/sees", "--native=True").out
    files = hub.repos["models", "someone/sees"]
    assert listed(said) == sizes(files)
    assert set(files) == {".gitattributes", "README.md", "config.json", "example.png",
                          "manifest.json", "model.safetensors", "tokenizer.json"}
    assert "python sample.py someone/sees" in files["README.md"].decode()
    pushed, here = (run("sample.py", checkpoint, f"--image={image}", "--prompt=What do you see?",
                        "--max_tokens=16", "--precision=fp32")
                    for checkpoint in ("someone/sees", name))
    assert pushed == here and here.out and hub.times("GET", "model.safetensors") == 1
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or WRITER.encode() not in path.read_bytes(), path


def test_an_export_is_pushed_file_by_file_and_a_dry_run_sends_nothing(hub, pipeline):
    """test_export.py opens the same files by transformers."""
    command = pipeline.folder / "sft", "--repo=someone/chat"
    dry = upload(*command, "--dry_run=True")
    assert (dry.status, dry.err, hub.log) == (0, "", [])
    assert dry.out.startswith("would push to the model someone/chat:\n")
    result = upload(*command)
    assert result.status == 0, result.err
    assert listed(result.out) == listed(dry.out) == sizes(hub.repos["models", "someone/chat"])
    assert hub.times("PUT", "/stored/") == 1  # the weights; the rest goes with the commit
    assert hub.created[0].get("visibility") != "private"


def test_a_failed_push_is_resumed_without_sending_files_again(hub, pipeline):
    """A third push has to be asked for by --overwrite, and sends nothing."""
    command = (pipeline.folder / "sft", "--repo=someone/chat", "--native=True", "--private=True")
    hub.closed.append("/commit/")
    assert "failed (RemoteProtocolError: " in upload(*command).refusal
    assert set(hub.repos["models", "someone/chat"]) == {".gitattributes"}
    for flag in "--overwrite=False", "--overwrite=True":
        result = upload(*command, flag)
        assert result.status == 0 and "pushed: http://127.0.0.1" in result.out, result.err
        assert listed(result.out) == sizes(hub.repos["models", "someone/chat"])
    assert hub.times("PUT", "/stored/") == 1 and hub.times("/commit/") == 2
    assert hub.created[0]["visibility"] == "private"


def test_an_unreachable_hub_is_one_sentence(hub, pipeline, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.close()
    refusal = upload(pipeline.folder / "sft", "--repo=someone/chat", "--native=True").refusal
    assert "failed (ConnectError: " in refusal and "same command again" in refusal


def test_a_repository_with_other_content_is_left_alone(hub, pipeline):
    command = (pipeline.folder / "sft", "--repo=someone/chat")
    before = {".gitattributes": b"", "README.md": b"", "config.json": b"{}", "notes.txt": b"mine",
              "model-00001-of-00002.safetensors": b"old"}
    hub.repos["models", "someone/chat"] = dict(before)
    assert "(config.json, model-00001-of-00002.safetensors, notes.txt)" in upload(*command).refusal
    assert hub.repos["models", "someone/chat"] == before
    assert upload(*command, "--overwrite=True").status == 0
    files = hub.repos["models", "someone/chat"]
    assert files["notes.txt"] == b"mine" and len(files["config.json"]) > 2
    assert "model-00001-of-00002.safetensors" not in files  # or readers might take the old weights


@pytest.mark.parametrize(("token", "repo", "words"), [
    (WRONG, "someone/chat", "the token is not accepted"),
    (READER, "someone/chat", "the token may not write there"),
    (None, "someone/chat", "no token"), (WRITER, "my model", "my model")])
def test_a_refused_token_or_name_is_one_sentence(token, repo, words, hub, pipeline, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert words in upload(pipeline.folder / "sft", f"--repo={repo}", "--native=True").refusal
    assert hub.repos == {} and (token or not hub.log)


def test_a_space_has_every_module_that_the_app_imports():
    found, waiting = set(), ["app"]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += imports(MODULES[module])
    parts = {MODULES[module].relative_to(ROOT).parts[0] for module in found}
    assert parts <= set(script.APP)


@pytest.mark.slow
def test_a_pushed_space_runs_by_itself(hub, tmp_path, pipeline, monkeypatch):
    """It goes the way that uploads take today, a connection that breaks once included; then its
    app.py runs in an empty environment."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.large, hub.closed = (), ["/commit/"]
    result = upload(pipeline.folder / "vision_sft", "--space=someone/page")
    assert result.status == 0, result.err
    assert hub.created[0]["type"] == "space" and hub.created[0]["sdk"] == "gradio"
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
    process = subprocess.Popen(
        [sys.executable, "app.py", "--port=0", "--device=cpu"], cwd=folder, text=True,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": ""},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        address = re.search(r"http://[\d.:]+", process.stdout.readline())[0]
        with urllib.request.urlopen(address, timeout=60) as page:
            assert page.status == 200 and "vision_sft" in page.read().decode()
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_an_export_replaces_nothing_but_an_earlier_export(tmp_path, pipeline, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "models"
    command = (pipeline.folder / "sft", "--to=models")
    for _ in range(2):
        result = upload(*command, "--overwrite=True")
        assert (result.status, result.out) == (0, "written: models\n")
        names = {path.name for path in target.iterdir()}
        assert {"config.json", "model.safetensors"} <= names
        assert {path.stat().st_mode & 0o777 for path in target.iterdir()} == {0o644}
        assert [path.name for path in tmp_path.iterdir()] == ["models"]
    assert "models exists" in upload(*command).refusal
    (target / "old.safetensors").touch()
    assert "this export has no old.safetensors" in upload(*command, "--overwrite=True").refusal
    (target / ".git").mkdir()
    assert "models is not an earlier export" in upload(*command, "--overwrite=True").refusal
    assert (target / "old.safetensors").is_file()


@pytest.mark.parametrize(("name", "flags", "words"), [
    ("", ["--to=new"], "name a checkpoint"),
    ("sft", [], "name a target: --to, --repo or --space"),
    ("sft", ["--to=file"], "file exists"),
    ("sft", ["--to=file", "--overwrite=True"], "file is not an earlier export"),
    ("sft", ["--to=checkpoint", "--overwrite=True"], "checkpoint is not an earlier export"),
    ("sft", ["--to=file/new"], "cannot write"),
    ("clip_pretrain", ["--to=new"], "decoder or vision checkpoint is needed"),
    ("pretrain", ["--space=a/b"], "pretrained checkpoint"),
    ("sft", ["--to=new", "--image=a.png"], "--image=a.png"),
    ("vision_sft", ["--to=new", "--image=a.png"], "a.png"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)
def test_a_wrong_command_is_one_sentence_and_leaves_nothing(name, flags, words, tmp_path, pipeline,
                                                            monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "file").write_text("mine")
    shutil.copytree(newest(pipeline.folder / "sft"), tmp_path / "checkpoint")
    name = [pipeline.folder / name] if name else []
    before = sorted(tmp_path.rglob("*"))
    assert words in upload(*name, *flags).refusal
    assert sorted(tmp_path.rglob("*")) == before


def front_matter(card):
    """The YAML at the head of a card."""
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


@pytest.fixture(scope="module")
def cards(pipeline, tmp_path_factory):
    """{stage: the folder that upload.py --to writes}."""
    folder = tmp_path_factory.mktemp("cards")
    runs = shutil.copytree(pipeline.folder, folder / "runs")
    digest = file_sum(newest(runs / "vision_sft") / "manifest.json")
    (runs / "report.json").write_text(json.dumps({"sha256": digest, "vqa_exact": 0.75}))
    for stage in ("pretrain", "sft", "vision_sft"):
        flags = f"--to={folder}/{stage}", "--license=cc0-1.0"
        assert upload(runs / stage, *flags).status == 0
    return folder


def test_a_card_has_metadata_stages_losses_data_and_scores(cards, pipeline):
    card = (cards / "vision_sft" / "README.md").read_text()
    for stage in STAGES:
        loss = read_json(newest(pipeline.folder / stage) / "config.json")["metrics"]["val_loss"]
        row = rf"\| {stage} \| 6 \| {loss:.4f} \| [\d.]+ \| \d+\.\d \| 0.00 \|"
        assert any(re.fullmatch(row, line) for line in card.splitlines())
    for kind in "text", "chats", "captions", "scenes":
        assert str(pipeline.data / kind) in card
    assert "| vqa_exact | 0.75 |" in card and "## Limits" in card
    for stage in "pretrain", "sft":  # the scores are of another checkpoint
        assert "scores" not in (cards / stage / "README.md").read_text().lower()
    for stage, tag in ("sft", "text-generation"), ("vision_sft", "image-text-to-text"):
        assert front_matter((cards / stage / "README.md").read_text()) == {
            "license": "cc0-1.0", "language": "en", "library_name": "transformers",
            "pipeline_tag": tag, "tags": ["nanogpt-vision"]}


def test_the_commands_of_a_card_give_the_settings_of_the_runs(cards, pipeline):
    """They parse, to the very settings of the run; only those of known stages are shown."""
    card = (cards / "vision_sft" / "README.md").read_text()
    commands = [shlex.split(line) for line in card.splitlines() if line.startswith("python ")]
    assert sorted(command[1] for command in commands) == sorted(f"{stage}.py" for stage in STAGES)
    for _, name, *flags in commands:
        stage = name.removesuffix(".py")
        config = vars(parse(__import__(stage).Config, flags))
        assert config == read_json(newest(pipeline.folder / stage) / "config.json")["settings"]
    settings = {"data": "my data; rm -rf x", "out": "a'b"}
    command = shlex.split(command_of({"stage": "pretrain", "settings": settings}))
    assert command[2:] == ["--out=a'b", "--data=my data; rm -rf x"]
    assert command_of({"stage": "antigravity", "settings": settings}) == ""


def test_a_card_shows_an_image_and_the_answer_of_the_model(cards, pipeline):
    card = (cards / "vision_sft" / "README.md").read_text()
    shown = cards / "vision_sft" / re.search(r"!\[.*\]\((.*)\)", card)[1]
    held_out = sorted((pipeline.data / "images").glob("*.png"))[0]
    assert shown.read_bytes() == held_out.read_bytes() and read_image(shown)
    answer = run("sample.py", pipeline.folder / "vision_sft", f"--image={held_out}",
                 "--prompt=What do you see?", "--max_tokens=64", "--precision=fp32").out
    assert f"**What do you see?** {answer.strip()}" in card


@pytest.mark.slow
def test_the_code_of_a_card_runs_without_our_modules(cards):
    """That of a text model, of one that chats, and of one that sees."""
    shutil.copy(cards / "vision_sft" / "example.png", cards / "image.jpg")
    texts = [(cards / stage / "README.md").read_text()
             for stage in ("pretrain", "sft", "vision_sft")]
    code = "\n".join(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1] for text in texts)
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HOME": str(cards),
                   "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-I", "-c", code], cwd=cards, env=environment,
                            capture_output=True, text=True)
    assert result.stdout.count("'generated_text': ") == 3, result.stderr
    assert re.search(r"\*\*What do you see\?\*\* (.*)", texts[2])[1] in result.stdout
