"""The scripts as programs: --help, one sentence for a mistake, answers, scores."""

import dataclasses
import importlib
import inspect
import json
import re
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import COMMON, ROOT, STAGES, TINY, Result, newest, run
from PIL import Image
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel

import prepare
from common.checkpoint import file_sum

COMMANDS = {**{f"{stage}.py": "[CONFIG]" for stage in STAGES},
            **{f"prepare.py {name}": "" for name in prepare.COMMANDS},
            "sample.py": "CHECKPOINT", "app.py": "CHECKPOINT", "eval.py": "CHECKPOINT",
            "upload.py": "CHECKPOINT", "bench.py": "CONFIG"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_usage_examples_groups_and_complete_comments(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    result = run(*command.split(), "--help")
    assert (result.status, result.err) == (0, "")
    usage, text = result.out.split("\n", 1)
    assert usage.startswith(f"usage: python {command} ") and COMMANDS[command] in usage
    assert re.search(rf"^    python {command}", text, re.MULTILINE)  # an example
    script, *sub = command.split()
    module = importlib.import_module(script.removesuffix(".py"))
    config = module.COMMANDS[sub[0]][0] if sub else module.Config
    comments = re.findall(r"^    \w+: .*  # (.*)", inspect.getsource(config), re.MULTILINE)
    assert comments and all(comment in " ".join(text.split()) for comment in comments)
    assert all(f"--{field.name} " in text for field in dataclasses.fields(config))
    assert "\nsettings:\n" not in text  # every setting is in a group


def test_a_script_starts_in_its_own_process_from_any_folder(tmp_path):
    command = [sys.executable, ROOT / "eval.py", tmp_path / "no", "--zero_shot=images"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT.parent)
    result = Result(done.returncode, done.stdout, done.stderr)
    assert f"there is no checkpoint {tmp_path}/no" in result.refusal


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of inputs that do not fit: another tokenizer, broken files, text for images."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "story.txt").write_text("Once upon a time there was a fox. " * 50)
    (folder / "chats.jsonl").write_text(
        json.dumps({"instruction": "hello", "response": "hello"}) + "\n")
    for argv in (("text", "--files={0}/*.txt", "--val_files={0}/*.txt", "--vocabulary=300",
                  "--out={0}/text"),
                 ("chat", "--files={0}/chats.jsonl", "--val_files={0}/chats.jsonl",
                  "--tokenizer={0}/text", "--out={0}/chats")):
        assert run("prepare.py", *(part.format(folder) for part in argv)).status == 0
    for name, content in {
            "broken.parquet": b"PAR1, or so it says" * 9, "broken.json": b'[{"messages": ',
            "broken.zip": b"PK and no more", "text.png": b"not an image", "large.txt": b"w69999",
            "useless.jsonl": b'{"messages": [{"role": "user", "content": "hello?"}]}\n',
            "typo.py": b"max_steps = 5\nmax_stepz = 5\n", "empty.jsonl": b" \n"}.items():
        (folder / name).write_bytes(content)
    (folder / "large").mkdir()
    words = {f"w{i}": i for i in range(70000)}
    FastTokenizer(WordLevel(words)).save(f"{folder}/large/tokenizer.json")
    Image.new("RGB", (16, 16), "red").save(folder / "red.png")
    (folder / "short").mkdir()
    for split, n in ("train", 400), ("val", 10):
        np.save(folder / "short" / split, np.arange(n, dtype=np.uint16))
    return folder


MISTAKES = {  # start of the command: more flags | what the message has
    "pretrain.py": """
        {tmp}/no.py | {tmp}/no.py
        {bad}/typo.py | {bad}/typo.py, line 2; max_steps
        --device=tpu | --device=tpu; cuda
        --data={tmp}/no | {tmp}/no; prepare.py
        --data={data}/chats | {data}/chats; prepare.py
        --data={bad}/short --context=16 | {bad}/short
        --data={data}/text --batch_tokens=63 | --batch_tokens
        --data={data}/text --max_positions=32 | --context=64; 32
        --data={data}/text --n_head=3 | --n_head=3
        --data={bad}/text --init_from={runs}/pretrain --context=8 --batch_tokens=8 | {bad}/text
        --max_steps=many | --max_steps; many""",
    "clip_pretrain.py": """
        --data={data}/captions --patch_size=7 | --patch_size=7
        --data={data}/captions --zero_shot={tmp}/no | --zero_shot={tmp}/no
        --data={data}/captions --micro_pairs=-1 | --micro_pairs=-1""",
    "sft.py --data={data}/chats": """
        --max_stepz=5 | max_stepz; max_steps
        --init_from={tmp}/no | {tmp}/no
        --init_from={runs}/clip_pretrain | clip_pretrain.py; decoder""",
    "sft.py --init_from={runs}/pretrain": """
        --data={data}/text | {data}/text
        --data={bad}/chats | {bad}/chats; tokenizer
        --data={data}/chats --context=512 --batch_tokens=512 | --context=512; 256
        --data={data}/chats --context=4 --batch_tokens=4 | {data}/chats; --context=4""",
    "vision_pretrain.py --data={data}/captions": """
        --init_from={runs}/sft --clip={runs}/sft | sft.py; clip
        --init_from={runs}/vision_sft --clip={runs}/clip_pretrain | vision_sft.py; decoder""",
    "vision_sft.py --data={data}/scenes": """
        --init_from={runs}/sft | sft.py; vision
        --init_from={runs}/vision_pretrain --text_data={bad}/chats | {bad}/chats; tokenizer""",
    "sample.py": """
        | checkpoint
        {tmp}/no --prompt=hi | {tmp}/no
        {runs}/clip_pretrain --prompt=hi | clip_pretrain.py
        {runs}/pretrain | --prompt
        {runs}/sft --image={bad}/red.png --prompt=hi | vision_sft
        {runs}/sft --prompt={long} | 256""",
    "sample.py {runs}/sft": """
        --input={bad}/chats.jsonl | --output
        --output={tmp}/x | --input
        --input={bad}/chats.jsonl --output={tmp}/x --prompt=hi | --prompt
        --input={tmp}/no.jsonl --output={tmp}/x | no file matches {tmp}/no.jsonl
        --input={bad}/empty.jsonl --output={tmp}/x | no rows
        --input={bad}/chats.jsonl --output={tmp} | --output={tmp}: it is a folder or a device
        --input={bad}/chats.jsonl --output={bad}/red.png/x | --output={bad}/red.png/x
        --input={bad}/chats.jsonl --output={tmp}/x --batch=0 | batch must be 1 or more""",
    "sample.py {runs}/vision_sft --prompt=hi": """
        --image={tmp}/no.png | {tmp}/no.png
        --image={bad}/text.png | {bad}/text.png""",
    "eval.py": """
        | checkpoint
        {runs}/sft --items=0 | --items=0
        {runs}/sft --data={tmp}/no | {tmp}/no does not exist
        {runs}/sft --report={bad}/red.png | --report={bad}/red.png
        {runs}/sft --out={bad}/red.png/new | --out={bad}/red.png/new
        {runs}/sft --data={bad} | tokenizer""",
    "bench.py": """
        configs/demo/sft.py --steps=0 | --steps
        plan configs/demo --vocabulary=2 | --vocabulary""",
    "upload.py": """
        {runs}/sft | --space""",
    "prepare.py": """
        txt --files=x | txt; demo, text, chat, images
        text --out={tmp}/x | --files""",
    "prepare.py text --vocabulary=300 --out={tmp}/x": """
        --files={tmp}/*.txt | {tmp}/*.txt
        --files={bad}/broken.parquet | {bad}/broken.parquet
        --files={bad}/large.txt --vocabulary=0 --tokenizer={bad}/large | {bad}/large; 65536""",
    "prepare.py chat --tokenizer={bad}/text --out={tmp}/x": """
        --files={bad}/broken.json | {bad}/broken.json
        --files={bad}/text | {bad}/text
        --files={bad}/useless.jsonl | {bad}/useless.jsonl""",
    "prepare.py images --files={bad}/chats.jsonl --out={tmp}/x": """
        --image_root={tmp}/no | {tmp}/no; image_root
        --image_root={bad}/broken.zip | {bad}/broken.zip""",
}


@pytest.mark.parametrize("mistake", [f"{start} {line.strip()}" for start, lines in MISTAKES.items()
                                     for line in lines.split("\n")[1:]])
def test_a_mistake_gets_one_sentence_that_names_it(mistake, pipeline, bad, tmp_path):
    names = {"tmp": tmp_path, "bad": bad, "data": pipeline.data, "runs": pipeline.folder,
             "long": "word," * 300}
    command, words = mistake.split("| ")
    script, *argv = [part.format(**names) for part in command.split()]
    if script.removesuffix(".py") in TINY:  # an input that is not refused would train for hours
        config = argv[:1] if argv[0].endswith(".py") else []
        usual = (*COMMON, *TINY[script.removesuffix(".py")], f"--out={tmp_path}/run")
        argv = [*config, *usual, *argv[len(config):]]
    refusal = run(script, *argv).refusal
    assert all(word.format(**names) in refusal for word in words.split("; ")), refusal
    assert not (tmp_path / "x").exists()


def test_a_tracker_gets_settings_and_metrics(pipeline, tmp_path, monkeypatch):
    argv = ("pretrain.py", *pipeline.flags("pretrain"), f"--out={tmp_path}/run", "--tracker=wandb")
    tracker = Mock()
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    assert run(*argv, "--lr=-1").status == 0
    assert tracker.init.call_args.kwargs["config"]["lr"] > 0  # what the rule gave
    assert "val_loss" in tracker.init().log.call_args.args[0]
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in run(*argv).refusal


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named(pipeline):
    refusal = run("sample.py", pipeline.folder / "sft", "--prompt=hi", "--device=cuda").refusal
    assert "--device=cuda" in refusal


SHORT = ("--max_tokens=12", "--device=cpu")


@pytest.mark.parametrize("stage", ["pretrain", "sft", "vision_sft"])
def test_a_prompt_is_answered_reproducibly(pipeline, stage):
    image = [f"--image={pipeline.data}/images/0.png"] if "vision" in stage else []
    argv = ("--prompt=Once upon", "--temperature=1", *image, *SHORT)
    first, again, other = (run("sample.py", pipeline.folder / stage, *argv, f"--seed={seed}")
                           for seed in (0, 0, 1))
    assert first == again != other and (first.status, first.err) == (0, "")
    assert first.out.startswith("Once upon") or stage != "pretrain"
    assert run("sample.py", newest(pipeline.folder / stage), *argv, "--seed=0") == first


def test_a_conversation_can_be_piped(pipeline):
    images = pipeline.data / "images"
    argv = ("sample.py", pipeline.folder / "vision_sft", *SHORT)
    lines = ["What do you see?", "Is it red?", f"/image {images}/1.png", "What do you see?",
             "/photo", "/image no.png", "", "/quit", "Is anyone there?"]
    result = run(*argv, f"--image={images}/0.png", stdin="\n".join(lines))
    assert (result.status, result.err) == (0, "") and "Is anyone there?" not in result.out
    assert "/photo" in result.out and "no.png" in result.out
    answers = re.findall("^model: (.*)", result.out, re.MULTILINE)
    assert len(answers) == 3
    for i, answer in enumerate(answers[::2]):
        alone = run(*argv, f"--image={images}/{i}.png", "--prompt=What do you see?")
        assert answer == alone.out.removesuffix("\n")


GAINS = {"vision_gain_shuffled", "vision_gain_blank", "caption_choice32"}
SCORES = {
    "clip_pretrain": {"clip_choice32", *(f"clip_{way}_r{k}" for k in (1, 5, 10)
                                         for way in ("image_to_text", "text_to_image"))},
    "pretrain": {"text_val_loss", "text_bits_per_byte"},
    "sft": {"chat_loss", "chat_exact"},
    "vision_pretrain": {"caption_loss", "caption_loss_mismatched_image", "caption_loss_text_only",
                        "caption_loss_blank_image", *GAINS},
    "vision_sft": {"chat_loss", "chat_exact", "vqa_exact", "vqa_shuffled", "vqa_heldout_pairs",
                   "vqa_text_only", "answer_loss", "answer_loss_mismatched_image",
                   "answer_loss_text_only", "answer_loss_blank_image", *GAINS},
}


@pytest.fixture(scope="module")
def evaluated(pipeline, tmp_path_factory):
    """What eval.py prints about each stage's run, and the folder of a report of the last one."""
    folder = tmp_path_factory.mktemp("new") / "report"
    printed = ""
    for stage, *more in ("sft",), ("vision_pretrain",), ("vision_sft", f"--report={folder}"):
        result = run("eval.py", pipeline.folder / stage, f"--data={pipeline.data}", "--items=16",
                     *more)
        assert result.status == 0, result.err
        printed += result.out
    return printed, folder


@pytest.mark.parametrize("stage", STAGES)
def test_eval_scores_a_checkpoint_by_what_it_is(evaluated, pipeline, stage):
    """The report of vision_sft scores its pretrain and clip_pretrain too."""
    folder = re.escape(str(pipeline.folder / stage))
    _, text = re.split(rf"^{folder}(?:/step_\d+)?, validation data:\n", evaluated[0],
                       flags=re.MULTILINE)
    scores = dict(re.findall(r"^(\S+) +(-?\d\.\d{4}) ± \d\.\d{4}", text.split(" data:\n")[0],
                             re.MULTILINE))
    assert {label for label in scores if "/" not in label} == SCORES[stage]
    assert (f"text_val_loss/{stage}" in scores) == (stage in STAGES[2:])
    if stage == "pretrain":  # after six steps, slightly better than a uniform guess
        assert 3 < float(scores["text_val_loss"]) < np.log(512)


def test_a_pipeline_with_a_parent_that_was_trained_again_is_refused(pipeline, tmp_path):
    """Its scores would not be of the weights that the later stages began with."""
    pipeline.run_stage("pretrain", tmp_path / "pretrain")
    pipeline.run_stage("sft", tmp_path / "sft", f"--init_from={tmp_path}/pretrain")
    pipeline.run_stage("pretrain", tmp_path / "pretrain", "--resume=False", "--seed=7")
    result = run("eval.py", tmp_path / "sft", f"--data={pipeline.data}", "--items=4",
                 f"--report={tmp_path}/report")
    assert f"{newest(tmp_path / 'pretrain')} was trained again" in result.refusal
    assert not (tmp_path / "report/report.md").exists()


def test_the_report_has_scores_of_both_splits_curves_and_conversations(evaluated, pipeline):
    folder = evaluated[1]
    figures = json.loads((folder / "report.json").read_text())
    assert figures["checkpoint"] == str(newest(pipeline.folder / "vision_sft"))
    assert figures["sha256"] == file_sum(newest(pipeline.folder / "vision_sft") / "manifest.json")
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
    assert all(f"| {stage} |" in report for stage in STAGES)
    assert report.count("What do you see?") == 4
