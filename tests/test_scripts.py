"""The claims of the scripts as programs: help, one line for a mistake, talking, scoring."""

import dataclasses
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COMMON, ROOT, STAGES, TINY, Result, newest, run
from PIL import Image
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel

import prepare
from common.config import UserError
from pretrain import Config
from train.run import Run

SCRIPTS = [(f"{name}.py",) for name in ("prepare", *STAGES, "sample", "app", "eval", "bench")]
COMMANDS = [("prepare.py", name) for name in ("demo", "text", "chat", "images", "fineweb")]


def run_alone(*argv):
    """Run a script in a process of its own, from another folder."""
    command = [sys.executable, ROOT / argv[0], *map(str, argv[1:])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120,
                          cwd=ROOT.parent, env={**os.environ, "COLUMNS": "80"})
    return Result(done.returncode, done.stdout, done.stderr)


# -------------------------------------------------------------------------------------------- help


def settings_of(script, *command):
    """{name: first line of its comment} of all settings of a script, from the source."""
    module = importlib.import_module(script.removesuffix(".py"))
    config = module.COMMANDS[command[0]][0] if command else module.Config
    source = "".join(map(inspect.getsource, config.__mro__[-2::-1]))
    comments = dict(re.findall(r"^    (\w+): [^#\n]* = [^#\n]*  # (.*)$", source, re.MULTILINE))
    names = [field.name for field in dataclasses.fields(config)]
    return {name: comments.get(name, "") for name in names}


@pytest.mark.parametrize("command", [*SCRIPTS[1:], *COMMANDS], ids=" ".join)
def test_help_lists_every_setting_with_its_comment(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    result = run(*command, "--help")
    assert (result.status, result.err) == (0, "")
    said = " ".join(result.out.split())
    for name, comment in settings_of(*command).items():
        assert f"--{name} " in said
        assert comment in said, name


def test_prepare_help_lists_its_commands():
    for argv in (), ("--help",):
        result = run("prepare.py", *argv)
        assert result.status == 0
        for _, name in COMMANDS:
            assert f"prepare.py {name}" in result.out


@pytest.mark.parametrize("script", ["vision_pretrain.py", "eval.py"])
def test_a_script_starts_on_its_own_from_any_folder(script):
    """The other scripts are started so by other tests."""
    result = run_alone(script, "--help")
    assert (result.status, result.err) == (0, "") and script in result.out


def test_a_config_file_and_flags_give_the_same_settings(pipeline, tmp_path):
    pairs = [flag.removeprefix("--").split("=") for flag in pipeline.flags("pretrain")]
    lines = [f"{name} = {value if value.isdigit() else repr(value)}\n" for name, value in pairs]
    (tmp_path / "tiny.py").write_text('"""A tiny run."""\n\n' + "".join(lines))
    flags = (f"--out={tmp_path}/run", "--max_steps=1")
    assert run("pretrain.py", tmp_path / "tiny.py", *flags).status == 0
    found, usual = (json.loads((newest(folder) / "config.json").read_text())["settings"]
                    for folder in (tmp_path / "run", pipeline.folder / "pretrain"))
    assert found == {**usual, "out": f"{tmp_path}/run", "max_steps": 1}


# ---------------------------------------------------------------------------------------- mistakes


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """A folder of things that do not fit: another vocabulary, broken files, texts as pictures."""
    folder = tmp_path_factory.mktemp("things")
    (folder / "story.txt").write_text("Once upon a time there was a fox. " * 50)
    (folder / "chats.jsonl").write_text(
        json.dumps({"instruction": "hello", "response": "hello"}) + "\n")
    for argv in (("text", "--files={0}/*.txt", "--val_files={0}/*.txt", "--vocabulary=300",
                  "--out={0}/text"),
                 ("chat", "--files={0}/chats.jsonl", "--val_files={0}/chats.jsonl",
                  "--tokenizer={0}/text", "--out={0}/chats")):
        assert run("prepare.py", *(part.format(folder) for part in argv)).status == 0
    (folder / "broken.parquet").write_bytes(b"PAR1, or so it says" * 9)
    (folder / "broken.npy").write_bytes(b"\x93NUMPY and no more")
    (folder / "broken.zip").write_bytes(b"PK and no more")
    (folder / "broken.json").write_text('[{"messages": ')
    (folder / "object.json").write_text('{"messages": []}')
    (folder / "useless.jsonl").write_text('{"messages": [{"role": "user", "content": "hello?"}]}\n')
    (folder / "blank.jsonl").write_text('{"text": " "}\n{"title": "no text"}\n')
    (folder / "typo.py").write_text('max_steps = 5\nmax_stepz = 5\n')
    (folder / "code.py").write_text("import os\n")
    (folder / "text.png").write_text("not a picture")
    (folder / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF")
    (folder / "large").mkdir()
    words = {f"w{i}": i for i in range(70000)}
    FastTokenizer(WordLevel(words)).save(f"{folder}/large/tokenizer.json")
    (folder / "large.txt").write_text("w69999")
    Image.new("RGB", (16, 16), "red").save(folder / "red.png")
    for name, n_train, n_val in ("half", 20, 20), ("short", 400, 10):
        (folder / name).mkdir()
        np.save(folder / name / "train.npy", np.arange(n_train, dtype=np.uint16))
        np.save(folder / name / "val.npy", np.arange(n_val, dtype=np.uint16))
    return folder


MISTAKES = {
    # settings
    "a missing config file": "pretrain.py {tmp}/no.py | there is no config file {tmp}/no.py",
    "a typo in a config file": "pretrain.py {things}/typo.py | {things}/typo.py, line 2; max_steps",
    "code in a config file": "pretrain.py {things}/code.py | {things}/code.py, line 1",
    "a typo in a flag": "sft.py --max_stepz=5 | max_stepz; max_steps",
    "a flag of another stage": "sft.py --n_layer=5 | no setting 'n_layer'",
    "a device that does not exist": "pretrain.py --device=tpu | --device=tpu; cpu, cuda or mps",
    "a batch smaller than a row": "pretrain.py --data={data}/text --batch_tokens=63 "
                                  "| --batch_tokens",
    "rows longer than the model": "pretrain.py --data={data}/text --max_positions=32 "
                                  "| --context=64; 32",
    "chats longer than the model": "sft.py --init_from={runs}/pretrain --data={data}/chats "
                                   "--context=512 --batch_tokens=512 | --context=512; 256",
    "pictures longer than the model": "vision_sft.py --init_from={runs}/vision_pretrain "
                                      "--data={data}/scenes --context=512 --batch_tokens=512 "
                                      "| --context=512; 256",
    "heads that do not divide the width": "pretrain.py --data={data}/text --n_head=3 "
                                          "| --n_head=3",
    "patches that do not divide the picture": "clip_pretrain.py --data={data}/captions "
                                              "--patch_size=7 | --patch_size=7",
    # data
    "a missing data folder": "pretrain.py --data={tmp}/no | no data folder {tmp}/no; prepare.py",
    "a data folder of another kind": "pretrain.py --data={data}/chats | {data}/chats; prepare.py",
    "text for chats": "sft.py --init_from={runs}/pretrain --data={data}/text | {data}/text",
    "chats for captions": "clip_pretrain.py --data={data}/chats | {data}/chats; no pictures",
    "text of another tokenizer": "pretrain.py --init_from={runs}/pretrain --data={things}/text "
                                 "--context=8 --batch_tokens=8 | {things}/text; another tokenizer",
    "chats of another tokenizer": "sft.py --init_from={runs}/pretrain --data={things}/chats "
                                  "| {things}/chats; another tokenizer",
    "more chats of another tokenizer": "vision_sft.py --init_from={runs}/vision_pretrain "
                                       "--data={data}/scenes --text_data={things}/chats "
                                       "| {things}/chats; another tokenizer",
    "scores on another tokenizer": "eval.py {runs}/sft --data={things} | another tokenizer",
    "text shorter than a row": "pretrain.py --data={things}/half | {things}/half; empty",
    "too little to validate on": "pretrain.py --data={things}/short --context=16 "
                                 "| {things}/short (val); empty",
    "chats longer than a row": "sft.py --init_from={runs}/pretrain --data={data}/chats --context=4 "
                               "--batch_tokens=4 | {data}/chats; none fits --context=4",
    # checkpoints
    "a missing checkpoint": "sft.py --init_from={tmp}/no | there is no checkpoint {tmp}/no",
    "a folder without a checkpoint": "sft.py --init_from={data} | {data} holds no checkpoint",
    "clip for a decoder": "sft.py --init_from={runs}/clip_pretrain | clip_pretrain.py; a decoder",
    "a decoder for clip": "vision_pretrain.py --init_from={runs}/sft --clip={runs}/sft "
                          "| sft.py; a clip checkpoint",
    "vision for a decoder": "vision_pretrain.py --init_from={runs}/vision_sft "
                            "--clip={runs}/clip_pretrain | vision_sft.py; a decoder checkpoint",
    "a decoder for vision": "vision_sft.py --init_from={runs}/sft | sft.py; a vision checkpoint",
    # sample.py and eval.py
    "talking to nothing": "sample.py | which checkpoint",
    "talking to nobody": "sample.py {tmp}/no --prompt=hi | there is no checkpoint {tmp}/no",
    "talking to clip": "sample.py {runs}/clip_pretrain --prompt=hi | clip_pretrain.py",
    "a chat with a model of text": "sample.py {runs}/pretrain | --prompt",
    "a missing image": "sample.py {runs}/vision_sft --image={tmp}/no.png --prompt=hi "
                         "| there is no picture {tmp}/no.png",
    "a text as a picture": "sample.py {runs}/vision_sft --image={things}/text.png --prompt=hi "
                           "| {things}/text.png is not a readable picture",
    "a cut picture": "sample.py {runs}/vision_sft --image={things}/cut.jpg --prompt=hi "
                     "| {things}/cut.jpg is not a readable picture",
    "a folder as a picture": "sample.py {runs}/vision_sft --image={things} --prompt=hi | {things}",
    "a picture for a text model": "sample.py {runs}/sft --image={things}/red.png --prompt=hi "
                                  "| cannot see; vision_sft",
    "a picture for a pretrained model": "sample.py {runs}/pretrain --image={things}/red.png "
                                        "--prompt=hi | cannot see; vision_sft",
    "a prompt longer than the context": "sample.py {runs}/sft --prompt={long} | context is 256",
    "scoring nothing": "eval.py | which checkpoint",
    "scores on no data": "eval.py {runs}/sft --data={tmp}/no | no data folder {tmp}/no/chats",
    # prepare.py
    "an unknown kind of data": "prepare.py txt --files=x | txt; demo, text, chat, images",
    "no files": "prepare.py text --out={tmp}/x | --files",
    "a pattern that matches nothing": "prepare.py text --files={tmp}/*.txt | {tmp}/*.txt",
    "a broken parquet file": "prepare.py text --files={things}/broken.parquet --vocabulary=300 "
                             "--out={tmp}/x | {things}/broken.parquet",
    "a broken JSON file": "prepare.py chat --files={things}/broken.json --tokenizer={things}/text "
                          "--out={tmp}/x | {things}/broken.json",
    "a JSON file without rows": "prepare.py chat --files={things}/object.json "
                                "--tokenizer={things}/text --out={tmp}/x | {things}/object.json",
    "a folder among the files": "prepare.py chat --files={things}/text --tokenizer={things}/text "
                                "--out={tmp}/x | {things}/text",
    "no text": "prepare.py text --files={things}/blank.jsonl --vocabulary=300 --out={tmp}/x "
               "| {things}/blank.jsonl; no text",
    "no usable chat": "prepare.py chat --files={things}/useless.jsonl --tokenizer={things}/text "
                      "--out={tmp}/x | {things}/useless.jsonl; no chat",
    "a missing tokenizer": "prepare.py chat --files={things}/chats.jsonl --tokenizer={tmp}/no "
                           "--out={tmp}/x | {tmp}/no",
    "a missing folder of pictures": "prepare.py images --files={things}/chats.jsonl "
                                    "--image_root={tmp}/no --out={tmp}/x | {tmp}/no; image_root",
    "a broken zip of pictures": "prepare.py images --files={things}/chats.jsonl "
                                "--image_root={things}/broken.zip --out={tmp}/x "
                                "| {things}/broken.zip",
    "a vocabulary too large for 16 bits": "prepare.py text --files={things}/large.txt "
                                          "--tokenizer={things}/large --out={tmp}/x "
                                          "| {things}/large; 65536",
}  # command | words of the message; they are separated by semicolons


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_that_names_it(mistake, pipeline, things, tmp_path):
    command, words = MISTAKES[mistake].split(" | ")
    names = {"tmp": tmp_path, "things": things, "data": pipeline.data, "runs": pipeline.folder,
             "long": "word," * 300}
    script, *argv = [part.format(**names) for part in command.split()]
    if script.removesuffix(".py") in TINY:  # so that what is not refused would not train for long
        config = argv[:1] if argv[0].endswith(".py") else []
        usual = (*COMMON, *TINY[script.removesuffix(".py")], f"--out={tmp_path}/run")
        argv = [*config, *usual, *argv[len(config):]]
    refusal = run(script, *argv).refusal
    for word in words.split("; "):
        assert word.format(**names) in refusal
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".writing*"))


def test_a_value_of_the_wrong_type_is_named():
    refusal = run("sft.py", "--max_steps=many").refusal
    assert "max_steps" in refusal and "many" in refusal


def test_a_name_that_is_not_among_the_choices_is_refused():
    for argv in (["pretrain.py", "--optimizer=sgd"], ["clip_pretrain.py", "--activation=rleu"]):
        assert argv[1].split("=")[1] in run(*argv).refusal


@pytest.mark.skipif(importlib.util.find_spec("wandb"), reason="wandb is installed here")
def test_a_tracker_that_is_not_installed(pipeline, tmp_path):
    argv = (*pipeline.flags("pretrain"), f"--out={tmp_path}/run", "--tracker=wandb")
    assert "pip install wandb" in run("pretrain.py", *argv).refusal


def test_a_mistake_is_one_line_of_a_real_terminal_too(tmp_path):
    result = run_alone("vision_sft.py", f"--init_from={tmp_path}/no", f"--out={tmp_path}/x")
    assert f"there is no checkpoint {tmp_path}/no" in result.refusal


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_asking_for_a_gpu_that_is_not_there(pipeline, tmp_path):
    for argv in (["pretrain.py", *pipeline.flags("pretrain"), f"--out={tmp_path}/run"],
                 ["sample.py", pipeline.folder / "sft", "--prompt=hi"]):
        assert "--device=cuda, but PyTorch sees no" in run(*argv, "--device=cuda").refusal


def test_a_batch_that_processes_cannot_share_evenly(tmp_path):
    training = Run(Config(out=str(tmp_path), device="cpu"), "pretrain")
    training.ranks = 2
    assert training.split(4, 8) == (1, 2)
    with pytest.raises(UserError, match="3 rows does not divide by 2 processes"):
        training.split(3, 8)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json",
                                  "state/training.pt"])
def test_a_flipped_byte_is_found_before_it_does_harm(pipeline, tmp_path, file):
    shutil.copytree(pipeline.folder / "sft", tmp_path / "sft")
    path = newest(tmp_path / "sft") / file
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    commands = []
    if not file.startswith("state"):  # sampling and the next stage do not need it
        commands += [("sample.py", tmp_path / "sft", "--prompt=hi"),
                     ("vision_pretrain.py", *pipeline.flags("vision_pretrain"),
                      f"--init_from={tmp_path}/sft", f"--out={tmp_path}/next")]
    for command in commands:
        refusal = run(*command).refusal
        assert f"{path} is damaged" in refusal
    said = pipeline.run_stage("sft", tmp_path / "sft")  # the run itself has an older one
    assert f"{path} is damaged" in said and f"resuming from {tmp_path}/sft/step_00000004" in said


@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json"])
def test_a_lost_file_is_named(pipeline, tmp_path, file):
    folder = tmp_path / "checkpoint"
    shutil.copytree(newest(pipeline.folder / "sft"), folder)
    (folder / file).unlink()
    assert str(folder) in run("sample.py", folder, "--prompt=hi").refusal


# ----------------------------------------------------------------- prepare.py and what is there


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", [
    "text --files={things}/blank.jsonl --vocabulary=300",
    "text --files={things}/broken.parquet --vocabulary=300",
    "chat --files={things}/useless.jsonl --tokenizer={things}/text",
    "images --files={things}/chats.jsonl --image_root={things}/no"])
def test_what_fails_leaves_the_folder_that_is_there(command, things, tmp_path):
    shutil.copytree(things / "chats", tmp_path / "good")
    before = contents(tmp_path)
    argv = [part.format(things=things) for part in command.split()]
    assert run("prepare.py", *argv, f"--out={tmp_path}/good").refusal
    assert contents(tmp_path) == before


def test_prepare_replaces_a_data_set_but_nothing_else(things, tmp_path):
    argv = ("text", f"--files={things}/story.txt", "--vocabulary=300")
    shutil.copytree(things / "chats", tmp_path / "data")
    assert run("prepare.py", *argv, f"--out={tmp_path}/data").status == 0
    assert not (tmp_path / "data/train").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letters.txt").write_text("Dear all,")
    for folder in (tmp_path / "home", tmp_path):
        before = contents(tmp_path)
        assert str(folder) in run("prepare.py", *argv, f"--out={folder}").refusal
        assert contents(tmp_path) == before


def test_a_crash_leaves_the_folder_that_is_there(tmp_path):
    (tmp_path / "good").mkdir()
    (tmp_path / "good/manifest.json").write_text("{}")
    with pytest.raises(KeyboardInterrupt), prepare.new_data_set(tmp_path / "good") as out:
        (out / "half").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["good", "manifest.json"]


# ----------------------------------------------------------------------------------------- talking

SHORT = ("--max_tokens=12", "--device=cpu")


@pytest.mark.parametrize("stage", ["pretrain", "sft", "vision_pretrain", "vision_sft"])
def test_one_question_gets_one_answer_from_every_stage(pipeline, stage):
    picture = [f"--image={pipeline.data}/images/0.png"] if "vision" in stage else []
    said = set()
    for seed in range(3):
        argv = (pipeline.folder / stage, "--prompt=Once upon", f"--seed={seed}", "--temperature=1")
        first, again = (run("sample.py", *argv, *picture, *SHORT) for _ in range(2))
        assert first == again and (first.status, first.err) == (0, "")
        said.add(first.out)
    assert len(said) == 3 and max(map(len, said)) > len("Once upon\n")
    if stage == "pretrain":
        assert all(text.startswith("Once upon") for text in said)


def test_a_checkpoint_can_be_named_by_its_run_or_its_own_folder(pipeline):
    argv = ("--prompt=hello", *SHORT)
    assert run("sample.py", pipeline.folder / "sft", *argv) == run(
        "sample.py", newest(pipeline.folder / "sft"), *argv)


def answers(result):
    assert (result.status, result.err) == (0, "")
    return [line.removeprefix("model: ") for line in result.out.splitlines()
            if line.startswith("model: ")]


def test_a_conversation_can_be_piped(pipeline):
    pictures = pipeline.data / "images"
    lines = ["What do you see?", "Is it red?", f"/image {pictures}/1.png", "What do you see?",
             "/reset", "Is it red?", "/reset", "What do you see?", "/photo", "/image no.png", "",
             "/quit", "Is anyone there?"]
    argv = ("sample.py", pipeline.folder / "vision_sft", f"--image={pictures}/0.png", *SHORT)
    result = run(*argv, stdin="\n".join(lines))
    said = answers(result)
    assert len(said) == 5 and "Is anyone there?" not in result.out
    one = run(*argv, "--prompt=What do you see?")
    assert said[0] == one.out.removesuffix("\n")
    assert said[1:4] == [answers(run(*argv[:2], *SHORT, *more, stdin=text))[-1] for more, text in (
        ([argv[2]], "What do you see?\nIs it red?"),
        ([f"--image={pictures}/1.png"], "What do you see?"),
        ([], "Is it red?"))]
    for words in "(starting over)", "there is no /photo", "there is no picture no.png":
        assert words in result.out


def test_a_mistake_in_a_conversation_does_not_end_it(pipeline):
    questions = f"/image {pipeline.data}/images/0.png\nhello\nhello\n{'word,' * 300}\nhello"
    result = run("sample.py", pipeline.folder / "sft", *SHORT, stdin=questions)
    assert "cannot see" in result.out and "context is 256" in result.out
    lines = [line for line in result.out.splitlines() if not line.startswith("(")]
    assert sum(line.startswith("model: ") and line != "model: (" for line in lines) >= 3


def test_a_conversation_longer_than_the_context_says_so_and_can_start_over(pipeline):
    questions = ["Tell me a story."] * 40 + ["/reset", "hello"]
    result = run("sample.py", pipeline.folder / "sft", *SHORT, stdin="\n".join(questions))
    assert "oldest turn is forgotten" in result.out
    alone = run("sample.py", pipeline.folder / "sft", "--prompt=hello", *SHORT)
    assert answers(result)[-1] == alone.out.removesuffix("\n")


# ----------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("stage", STAGES)
def test_eval_scores_a_checkpoint_by_what_it_is(pipeline, stage):
    result = run("eval.py", pipeline.folder / stage, f"--data={pipeline.data}", "--items=16")
    assert result.status == 0
    first, *lines = result.out.splitlines()
    assert first == f"{pipeline.folder / stage}, validation data:"
    scores = {line.split()[0]: line.split()[1] for line in lines}
    assert all(re.search(r" \d\.\d{4} ± \d\.\d{4}", line.replace("-", ""))
               for line in lines), result.out
    gains = {"vision_gain_shuffled", "vision_gain_blank", "caption_choice32"}
    assert {label for label in scores if "/" not in label} == {
        "clip_pretrain": {"clip_choice32", *(f"clip_{way}_r{k}" for k in (1, 5, 10)
                                             for way in ("image_to_text", "text_to_image"))},
        "pretrain": {"text_val_loss", "text_bits_per_byte"},
        "sft": {"chat_loss", "chat_exact"},
        "vision_pretrain": {"caption_loss", "caption_loss_other_picture",
                            "caption_loss_no_picture", "caption_loss_blank_picture", *gains},
        "vision_sft": {"chat_loss", "chat_exact", "vqa_exact", "vqa_shuffled", "vqa_heldout_pairs",
                       "vqa_blind", "answer_loss", "answer_loss_other_picture",
                       "answer_loss_no_picture", "answer_loss_blank_picture", *gains},
    }[stage]
    assert (f"text_val_loss/{stage}" in scores) == (stage in STAGES[2:])
    if stage == "pretrain":  # six steps: better than guessing one of 512 tokens, worse than trained
        assert 3 < float(scores["text_val_loss"]) < np.log(512)


def test_the_report_sums_up_the_pipeline(pipeline, tmp_path):
    """With the scores on test data, and apart from them those on validation data."""
    folder = tmp_path
    argv = (pipeline.folder / "vision_sft", f"--data={pipeline.data}", "--items=16",
            f"--report={folder}")
    assert run("eval.py", *argv).status == 0
    figures = json.loads((folder / "report.json").read_text())
    for name in ("vqa_exact", "vqa_heldout_pairs", "vqa_shuffled", "chat_exact", "clip_choice32"):
        for label in name, f"val_{name}":
            assert 0 <= figures[label] <= 1 and 0 <= figures[f"{label}_error"] <= 0.2
    for name in "text_val_loss", "text_bits_per_byte", "tflop", "seconds", "peak_rss_gb":
        assert figures[name] > 0
    for name in "text_val_loss", "answer_loss":  # of other data
        assert figures[f"val_{name}"] != figures[name]
    report = (folder / "report.md").read_text()
    test, validation = (report.split(f"## Scores on {split} data\n")[1].split("\n## ")[0]
                        for split in ("test", "validation"))
    for section, label in (test, "clip_choice32"), (validation, "val_clip_choice32"):
        row = next(line for line in section.splitlines()
                   if line.replace("\\", "").startswith(f"| {label} |"))
        assert [float(cell) for cell in row.split("|")[2:5]] == pytest.approx(
            [figures[label], figures[f"{label}_error"], 1 / 32], rel=0.05)
    images = re.findall(r"!\[.*?\]\((.*?)\)", report)
    assert {f"curves/{stage}.png" for stage in STAGES} <= set(images)
    assert len(images) == len(STAGES) + 4 and all((folder / path).is_file() for path in images)
    for stage in STAGES:
        assert f"| {stage} |" in report
    for question in "What do you see?", "How many things are there?":
        assert report.count(question) == 4
    assert "<img src=\"data:" in (folder / "report.html").read_text()


def test_runs_can_be_laid_side_by_side(pipeline, tmp_path):
    runs = [pipeline.folder / stage for stage in ("pretrain", "sft")]
    assert run("eval.py", "compare", *runs, f"--out={tmp_path}/both").status == 0
    assert "Runs side by side" in (tmp_path / "both/report.html").read_text()


def test_a_report_goes_into_a_new_folder_too(pipeline, tmp_path):
    argv = (pipeline.folder / "sft", f"--data={pipeline.data}", "--items=4")
    assert run("eval.py", *argv, f"--report={tmp_path}/new/report").status == 0
    assert "chat_exact" in json.loads((tmp_path / "new/report/report.json").read_text())
