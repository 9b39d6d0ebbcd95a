"""runs/*.sh from an empty folder: the public data sets in their layouts, from a local hub."""

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import fake_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from conftest import ROOT, newest
from PIL import Image
from safetensors.torch import load_file
from test_original import Original, held

CONFIGS = """---
configs:
- config_name: LLaVA_Instruct_150K
  data_files: LLaVA_Instruct_150K/train-*
---
"""
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
TINY = "--precision=fp32 --eval_every=0 --save_every=1 --log_every=1 --micro_rows=2"
ROWS = "--context=64 --batch_tokens=128 --max_steps=3 --compile=False"
SMALL = {
    "PRETRAIN": f"{TINY} --n_layer=1 --n_head=1 --n_embd=16 --max_positions=256 --context=32 "
                "--batch_tokens=128 --max_steps=3 --val_rows=4 --compile=False",
    "SFT": f"{TINY} {ROWS} --val_rows=4",
    "VISION_PRETRAIN": f"{TINY} {ROWS} --val_chats=4", "VISION_SFT": f"{TINY} {ROWS} --val_chats=4",
    "EVAL": "--items=4", "PREPARE": "--val_share=0.2", "DEVICE": "cpu", "MAX_CHATS": "20",
    "MAX_CAPTIONS": "20", "MAX_QUESTIONS": "20", "CUDA_VISIBLE_DEVICES": ""}


def jpeg(i):
    file = io.BytesIO()
    Image.new("RGB", (32, 24), (9 * i, 200 - 9 * i, 90)).save(file, "JPEG")
    return file.getvalue()


def parquet(rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file := io.BytesIO())
    return file.getvalue()


def chat(i):
    return [{"from": "human", "value": f"What is number {i}?"},
            {"from": "gpt", "value": f"It is a shade of colour {i}."}]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """{(kind, name): {path: content}} of the public repositories, a few rows of each."""
    rng, shards = np.random.default_rng(0), {}
    for name in "val_000000", "train_000001", "train_000002":
        file = io.BytesIO()
        np.save(file, rng.integers(0, 50257, 600, dtype=np.uint16))
        shards[f"edufineweb_{name}.npy"] = file.getvalue()
    magpie = [{"uuid": str(i), "instruction": chat(i)[0]["value"],
               "response": chat(i)[1]["value"], "conversations": chat(i), "input_quality": "good",
               "instruct_reward": 1.0, "min_similar_uuid": str(i), "language": "EN",
               "llama_guard_2": "safe"} for i in range(24)]
    stories, images = io.BytesIO(), io.BytesIO()
    with (zipfile.ZipFile(images, "w") as archive,
          tarfile.open(fileobj=stories, mode="w:gz") as tar):
        for i in range(24):
            archive.writestr(f"GCC_train_{i:09}.jpg", jpeg(i))
            member = tarfile.TarInfo(f"images/{i}.jpg")
            member.size = len(jpeg(i))
            tar.addfile(member, io.BytesIO(jpeg(i)))
    captions = [{"id": str(i), "image": f"GCC_train_{i:09}.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat is this?"}, chat(i)[1]]} for i in range(25)]
    told = [{"id": i, "image_path": f"/content/data/images/{i}.jpg", "caption": f"a shade {i}"}
            for i in range(24)]
    vision = [{"images": [{"bytes": jpeg(i), "path": None}], "texts": [
        {"user": "Which shade?", "assistant": f"The shade {i}."}], "source": "LLaVA"}
        for i in range(24)]
    folder = tmp_path_factory.mktemp("clip")
    tower = dict(hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    transformers.CLIPModel(transformers.CLIPConfig(
        text_config=dict(tower, vocab_size=99, max_position_embeddings=8),
        vision_config=dict(tower, image_size=224, patch_size=56), projection_dim=16,
    )).save_pretrained(folder)
    clip = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {
        ("datasets", "ShallowU/FineWeb-Edu-10B-Tokens-NPY"): shards,
        ("datasets", "Magpie-Align/Magpie-Phi3-Pro-1M-v0.1"): {
            "data/train-00000-of-00001.parquet": parquet(magpie)},
        ("datasets", "liuhaotian/LLaVA-CC3M-Pretrain-595K"): {
            "chat.json": json.dumps(captions).encode(), "images.zip": images.getvalue()},
        ("datasets", "HayatoHongo/LLaVA-CC3M-Pretrain-521K"): {
            "ImageStoriesTrain.jsonl": "".join(json.dumps(row) + "\n" for row in told).encode(),
            "images.tar.zst": stories.getvalue()},
        ("datasets", "HuggingFaceM4/FineVision"): {
            "README.md": CONFIGS.encode(),
            "LLaVA_Instruct_150K/train-00000-of-00001.parquet": parquet(vision)},
        ("models", "openai/clip-vit-large-patch14"): clip,
        ("models", "openai/clip-vit-base-patch32"): clip}


@pytest.fixture
def hub(public, monkeypatch):
    with fake_hub.running(monkeypatch) as server:
        server.repos |= public
        server.large += (".parquet", ".zip", ".zst")
        yield server


@pytest.fixture
def project(tmp_path):
    """A copy of the project, as a user clones it."""
    left_out = shutil.ignore_patterns(".git", "data", "out", "__pycache__", ".*cache", ".venv")
    return shutil.copytree(ROOT, tmp_path / "clone", ignore=left_out)


def start(project, script, hub, file_size=-1, stdin=None, **environment):
    """A shell script with the settings of a small run; file_size: bytes that the disk has left."""
    limit = resource.RLIMIT_FSIZE, (file_size, file_size)
    everything = {**os.environ, **hub.environment(), **SMALL, "HOME": str(project.parent / "home"),
                  "HF_HOME": str(project.parent / "home/hf"),
                  "PATH": PATH, **environment}
    (project.parent / "home").mkdir(exist_ok=True)
    return subprocess.Popen(
        ["bash", script], cwd=project, env=everything, text=True, stdin=stdin,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        preexec_fn=lambda: resource.setrlimit(*limit))


def finished(process, status=0):
    said = process.communicate(timeout=900)[0]
    assert process.returncode == status, said
    return said


def weights(project, run):
    return load_file(newest(project / f"out/{run}/vision_sft") / "model.safetensors")


def read_until(process, start, kill):
    """Read the lines of a process until one that starts so; then kill it and its children."""
    line = next(line for line in process.stdout if line.startswith(start))
    if kill:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait() if kill else line


@pytest.mark.parametrize("run", ["full", "single_gpu", "t4"])
def test_a_run_killed_twice_ends_as_one_that_was_not(project, hub, tmp_path, run):
    script = f"runs/{run}.sh"
    said = finished(start(project, script, hub, GPUS="1", OUT="out/whole"))
    assert "1 rows: a missing image (chat.json:25)" in said  # counted before training
    for stage, line in ("pretrain", "step     1"), ("vision_sft", "step     1"):
        process = start(project, script, hub, GPUS="1")
        for wanted in f"== python {stage}.py", line:
            status = read_until(process, wanted, kill=wanted == line)
        assert status == -signal.SIGKILL
    original, words = tmp_path / "original.pt", tmp_path / "words.jsonl"
    torch.save(held(Original()), original)
    words.write_text('{"text": "The dog barks"}\n{"text": "The cat sleeps"}')
    shutil.rmtree(project / "data/hub")  # as on another machine
    said = finished(start(project, script, hub, GPUS="1", ORIGINAL=str(original),
                          TEXT_TASKS=f"lambada:{words}"))
    assert f"out/{run}/sft is finished" in said
    for label in "text_val_loss", "lambada/acc":
        assert re.search(rf"\| {label} (\| [\d.]+ ± [\d.]+ ){{2}}\|",
                         (project / f"out/{run}/report.md").read_text())
    one, other = weights(project, "whole"), weights(project, run)
    assert all(one[name].equal(other[name]) for name in one)


def test_what_is_missing_ends_a_run_in_one_sentence(project, hub):
    """No token, no GPU, a gated data set, no network, a full disk; and it says how to go on."""
    (project / "out/full").mkdir(parents=True)
    (project / "out/full/plan.args").write_text("configs/full 8 x A100 80 GB  ")
    flags = dict.fromkeys(("pretrain", "sft", "vision_pretrain", "vision_sft"), "")
    (project / "out/full/plan.json").write_text(json.dumps({"flags": flags}))

    def said(**settings):
        text = finished(start(project, "runs/full.sh", hub, GPUS="1", **settings), status=1)
        assert "Traceback" not in text and text.count("error: ") == 1, text
        assert text.endswith("goes on from there: bash runs/full.sh\n")
        return text[text.index("error: ") :]

    assert "HF_TOKEN" in said(UPLOAD="some/model")
    assert "this machine has 0 CUDA GPUs, not 1" in said(DEVICE="auto")
    toy = dict(name="toy", gpus=1, memory_gib=4, tflops=1, mfu=0.5, dollars_per_hour=1)
    (project / "toy.json").write_text(json.dumps([toy]))
    text = said(GPU="toy", PLAN="--gpus=toy.json", OUT="out/toy")
    assert "pretrain does not fit GPU='toy'" in text
    chats = project / "data/public/chats"
    chats.mkdir(parents=True)
    (chats.parent / "chats.args").write_text("--dataset=other")
    assert "was prepared with '--dataset=other', not '--dataset=Magpie" in said()
    chats.rmdir()
    hub.gated.add("Magpie-Align/Magpie-Phi3-Pro-1M-v0.1")
    assert "ask for access" in said()
    hub.gated.clear()
    assert "cannot read the data set" in said(HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot write" in said(file_size=1024)


STAND_INS = {  # programs of the guide that would install or download the project
    "git": '[ "$1 $2" = "clone URL" ] && cp -r {clone} "$3"',
    "pip": '[ "$*" = "install -r requirements.txt" ]',
    "python3": '[ "$1 $2" = "-m venv" ] && mkdir -p "$3/bin" && touch "$3/bin/activate"'}


def test_the_guide_works_as_it_is_written(project, hub, tmp_path):
    """All commands in its blocks, one after the other in one shell, in an empty folder."""
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body.format(clone=project)}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "empty").mkdir()
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "docs/guide.md").read_text(), re.S | re.M)
    guide = "".join(block for block in blocks if not block.startswith("step "))  # printed lines
    (tmp_path / "guide.sh").write_text("set -eo pipefail\n" + guide.replace(
        "python sample.py", "cp ../photo.jpg . && python sample.py"))
    (tmp_path / "photo.jpg").write_bytes(jpeg(3))
    (tmp_path / "token").write_text(fake_hub.WRITER + "\n")
    process = start(tmp_path / "empty", tmp_path / "guide.sh", hub, GPUS="1", CAPTIONS="521K",
                    PLAN="--budget=999h", stdin=open(tmp_path / "token"), PATH=f"{tmp_path}:{PATH}")  # noqa: SIM115
    said = finished(process)
    out = tmp_path / "empty/nanoGPT-vision/out"
    for name in "full", "single_gpu", "t4":
        assert "answer_loss" in (out / name / "report.md").read_text()
        assert f"done: out/{name}/report.html" in said
    assert "--n_layer=24" in (out / "single_gpu/plan.md").read_text()  # by the budget
    assert ("models", "NAME/MODEL") in hub.repos and ("spaces", "NAME/SPACE") in hub.repos
