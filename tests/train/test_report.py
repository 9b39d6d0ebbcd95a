"""The report of a run: correct figures, one text in both formats, quoted text stays text."""

import base64
import hashlib
import json
import re
import shlex
import shutil
import statistics
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, STAGES, STEPS, log_rows, newest
from PIL import Image
from test_stages import assert_same_weights

import tokenizer as tokenizers
from common.device import Machine
from common.report import ReportImage, code, lineage_table, sample_blocks, table, write_report
from data import Chats
from experiments.compare_runs import compare
from train.log import data_table, with_origin

VISION = ("clip_pretrain", "vision_pretrain", "vision_sft")
HOSTILE = ("<script>alert(1)</script>", "</pre></td><img src=x onerror=alert(1)>", "a | b", "```",
           "````text\n<b>\n````", "[link](https://example.org)", "![x](https://example.org/x.png)",
           "&lt;script&gt; &amp; 'quotes\" >", "*bold* _thin_ `code` ~~gone~~ a\\|b",
           "two\n\nlines", "\x1b[31m\x00 \ud800 é 漢", "### # heading", "- - -", "<!-- -->",
           "https://example.org/bare", "1. one", "[x]: https://example.org", "=====", "-0.5")


class Reader(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


class Report:
    """report.md and report.html of a folder."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.text = (self.folder / "report.md").read_text(encoding="utf-8")
        self.page = (self.folder / "report.html").read_text(encoding="utf-8")
        self.html = Reader(self.page)
        self.sources = [value for name, value in self.html.attributes if name in ("src", "href")]
        self.rows = [[re.sub(r"\\(.)", r"\1", cell) for cell in line[2:-2].split(" | ")]
                     for line in self.text.splitlines() if line.startswith("| ")]
        self.facts = {row[0]: row[1] for row in self.rows}
        self.image_files = re.findall(r"^!\[.*?\]\((.*?)\)$", self.text, re.MULTILINE)
        self.commands = [shlex.split(text) for text in re.findall(
            r"^```text\n(.*)\n```$", self.text, re.MULTILINE) if ".py" in text]
        samples = re.split(r"^### \d+$", self.text.split("\n## Cost")[0], flags=re.MULTILINE)[1:]
        self.samples = [dict(re.findall(r"^(\w[^\n]*):\n\n```text\n(.*?)\n```$", sample,
                                        re.MULTILINE | re.DOTALL)) for sample in samples]


def info_of(folder):
    return json.loads((newest(folder) / "config.json").read_text())


@pytest.fixture(scope="module")
def reports(pipeline):
    return {stage: Report(pipeline.folder / stage) for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_report_states_provenance_cost_losses_settings_and_data(pipeline, reports, stage):
    folder, facts = pipeline.folder / stage, reports[stage].facts
    info, logged = info_of(folder), log_rows(folder)
    (made,), m = info["origins"], info["metrics"]
    assert reports[stage].commands[0] == [Path(sys.executable).name, str(ROOT / f"{stage}.py"),
                                          *pipeline.flags(stage), f"--out={folder}"]
    assert facts["commit"] == made["commit"]
    assert re.fullmatch(r"unknown|[0-9a-f]{7,}(-dirty)?", made["commit"])
    assert facts["hardware"].startswith("1 x ") and facts["hardware"].endswith("float32")
    assert f"PyTorch {torch.__version__}" in facts["software"]

    unit, each = ("img", 16) if stage == "clip_pretrain" else ("tok", info["settings"].get(
        "batch_tokens"))
    amount = facts["pairs" if unit == "img" else "tokens"]
    assert amount.startswith(f"{STEPS * each:,} ") and f"{STEPS} steps of {each:,}" in amount
    speed, mfu = (statistics.median(row[name] for row in logged if "ms" in row)
                  for name in (f"{unit}_per_s", "mfu"))
    assert facts["median speed"] == f"{speed:,.0f} {unit}/s" and facts["MFU"] == f"{mfu:.1%}"
    assert facts["peak memory"].startswith(f"{m['peak_rss_gb']:.2f} GB host")
    assert facts["wall time"] == f"{m['seconds']:.0f} seconds"
    assert facts["arithmetic"] == f"{m['tflop']:,.4g} TFLOP" and m["tflop"] > 0
    assert facts["price"].startswith("no price set")
    assert facts["validation loss"] == f"{m['val_loss']:.4f}" and "seed" not in facts
    rows = reports[stage].rows
    assert ["max_steps", str(STEPS), "-1" if stage == "pretrain" else "1000"] in rows
    data = [info["settings"][name] for name in ("data", "text_data") if info["settings"].get(name)]
    assert [row[1] for row in rows if row[0] == "sha256 of manifest.json"] == [
        hashlib.sha256(Path(folder, "manifest.json").read_bytes()).hexdigest() for folder in data]


def test_the_data_table_has_counts_and_left_out_rows(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({
        "train": {"chats": 150, "tokens": 4321}, "sha256": {"a": "0"},
        "left_out": {"an empty answer": {"rows": 7, "first": ["a.jsonl:3"]}}}))
    text = data_table(str(tmp_path))
    assert "| train | chats 150, tokens 4321 |" in text
    assert "| left out | an empty answer 7 |" in text


def test_time_and_price_are_summed_over_the_lineage(pipeline, reports):
    info = info_of(pipeline.folder / "vision_sft")
    assert [row[0] for row in reports["vision_sft"].rows if row[0] in STAGES] == [
        "pretrain", "sft", "clip_pretrain", "vision_pretrain", "vision_sft"]
    stages = [*info["lineage"], info, {"stage": "imported", "step": 0, "metrics": {}}]
    stages[1] = {**stages[1], "metrics": {**stages[1]["metrics"], "dollars": 5010}}
    *_, imported, total = lineage_table(stages).splitlines()
    tflop, seconds = (sum(stage["metrics"].get(name, 0) for stage in stages)
                      for name in ("tflop", "seconds"))
    assert imported == "| imported | 0 | – | – | – | – |"
    assert [cell.strip(" *") for cell in total.split("|")[1:-1]] == [
        "total", "–", "–", f"{tflop:,.1f}", f"{seconds / 60:.1f}", "5,010.00"]


@pytest.mark.parametrize("stage", STAGES)
def test_eight_samples_with_references_and_images(reports, stage):
    report = reports[stage]
    assert len(report.samples) == 8
    assert all(len(sample) >= 2 and sample["reference"].strip() for sample in report.samples)
    beside = [report.folder / name for name in report.image_files]
    assert [path.read_bytes() for path in beside] == [
        base64.b64decode(source.split(",")[1]) for source in report.sources if "image/" in source]
    assert report.image_files == ["loss.png", *(f"samples/{i}.jpg" for i in range(8)
                                                if stage in VISION)]
    assert all(max(Image.open(path).size) <= 256 for path in beside[1:])
    assert len(report.page) < 200_000


def test_samples_are_those_of_the_validation_data(pipeline, reports):
    chats = Chats(pipeline.data / "scenes", "val")
    tokenizer = tokenizers.load(pipeline.data / "scenes")
    for i, sample in enumerate(reports["vision_sft"].samples):
        text = tokenizer.decode(chats.chat(i)[0])
        found = re.match(r"(.*?<\|assistant\|>)(.*?)<\|end\|>", text)
        assert (sample["prompt"], sample["reference"]) == found.groups()
        shown = Image.open(reports["vision_sft"].folder / f"samples/{i}.jpg")
        true = chats.images(i)[0]
        difference = np.asarray(shown.convert("RGB"), float) - np.asarray(true, float)
        assert shown.size == true.size and np.abs(difference).mean() < 8
    documents = tokenizer.decode(np.load(pipeline.data / "text/val_000000.npy"))
    for sample in reports["pretrain"].samples:
        assert re.search(re.escape(sample["prompt"]) + r"\s*" + re.escape(sample["reference"]),
                         documents)
        assert len(sample["reference"]) > 10 and "<|" not in sample["reference"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The folder of a report that quotes hostile text everywhere."""
    folder = tmp_path_factory.mktemp("hostile")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 900, 3), np.uint8))
    samples = [([("user", text), (text, "reference")], [image] * (i < 2))
               for i, text in enumerate(HOSTILE)]
    write_report(folder, " ".join(HOSTILE[:2]), HOSTILE[1], {
        HOSTILE[0]: [table([HOSTILE[0], HOSTILE[2]], [[text, text] for text in HOSTILE]),
                     *map(code, HOSTILE),
                     ReportImage("loss.png", b"\x89PNG", HOSTILE[1])],
        "Samples": sample_blocks(samples)})
    return folder


def test_hostile_text_stays_text(hostile):
    html = Report(hostile).html
    assert {*html.tags} <= {"html", "head", "meta", "title", "link", "style", "body", "main", "h1",
                            "h2", "h3", "p", "table", "thead", "tbody", "tr", "th", "td",
                            "pre", "code", "img"}
    assert not [name for name, _ in html.attributes if name.startswith("on")]
    shown = " ".join(html.text.split())
    for text in HOSTILE:
        text = re.sub(r"[\x00-\x08\x0b-\x1f]", "\ufffd", text).replace("\ud800", "?")
        assert shown.count(" ".join(text.split())) >= 5  # cells, code, label, sample
    n = len(HOSTILE)
    assert {tag: html.tags.count(tag) for tag in ("td", "pre", "h3", "h2", "img")} == {
        "td": 2 * n, "pre": 3 * n, "h3": n, "h2": 2, "img": 3}


def test_a_report_loads_nothing_from_the_network(hostile, reports):
    for report in (Report(hostile), *reports.values()):
        assert all(source.startswith("data:") for source in report.sources) and report.sources
        assert "url(" not in report.page and "@import" not in report.page
        assert "default-src 'none'" in report.page


def test_a_finished_run_started_again_changes_nothing(pipeline, tmp_path):
    """Speed, cost, command and settings are those of the training, not of the second start."""
    folder = shutil.copytree(pipeline.folder / "sft", tmp_path / "sft")
    before = (folder / "report.md").read_text()
    (folder / "report.md").unlink()
    said = pipeline.run_stage("sft", folder, "--dollars_per_hour=5", "--lr=1")
    assert "step     " not in said and "done" in said
    assert_same_weights(folder, pipeline.folder / "sft")
    assert log_rows(folder) == log_rows(pipeline.folder / "sft")
    after = (folder / "report.md").read_text()
    assert after.replace(str(folder), str(pipeline.folder / "sft")) == before


def test_a_resumed_run_names_both_commands_and_what_changed(pipeline, tmp_path):
    folder = shutil.copytree(pipeline.folder / "pretrain", tmp_path / "run")
    for _ in range(2):  # the third start repeats the command of the second
        shutil.rmtree(newest(folder))
        said = pipeline.run_stage("pretrain", folder, "--log_every=2")
        assert "changed: " in said and "log_every (1 -> 2)" in said
    made = info_of(folder)["origins"]
    assert [part["step"] for part in made] == [0, 4]
    assert "--log_every=2" in made[1]["command"] and "--log_every=2" not in made[0]["command"]
    assert Report(folder).commands == [shlex.split(part["command"]) for part in made]
    assert info_of(folder)["metrics"]["peak_rss_gb"] >= info_of(
        pipeline.folder / "pretrain")["metrics"]["peak_rss_gb"]


def test_the_command_of_several_machines_is_recorded_once(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--out=a b"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    machine = Machine(torch.device("cpu"), torch.bfloat16, 0, 8, "Some GPU")
    starts = with_origin([], machine, 0, 10)
    assert starts[0]["command"] == "torchrun --nnodes=2 --nproc_per_node=4 pretrain.py '--out=a b'"
    assert starts[0]["hardware"] == "8 x Some GPU, bfloat16"
    assert with_origin(starts, machine, 3, 10) == starts


def test_a_report_that_cannot_be_written_does_not_end_the_run(pipeline, tmp_path):
    (tmp_path / "run/report.md").mkdir(parents=True)
    said = pipeline.run_stage("pretrain", tmp_path / "run")
    assert "there is no report: " in said and "done: " in said
    assert newest(tmp_path / "run").name == f"step_{STEPS:08d}"


def test_compare_shows_runs_side_by_side(pipeline, tmp_path):
    first, other = pipeline.folder / "pretrain", tmp_path / "other"
    pipeline.run_stage("pretrain", other, "--lr=0.01", "--batch_tokens=1024",
                       "--dollars_per_hour=72000")
    digest = hashlib.sha256((newest(other) / "manifest.json").read_bytes()).hexdigest()
    (other / "report.json").write_text(json.dumps({
        "checkpoint": "x", "sha256": digest,
        "text_bits_per_byte": 1.2345678, "text_bits_per_byte_error": 0.01234}))
    (other / "eval.json").write_text(json.dumps({"sha256": digest, "tasks": {"piqa": {
        "scores": {"acc": [0.5, 0.01]}, "chance": 0.5, "n": 9}}}))
    compare([first, other], tmp_path / "both")
    report, infos = Report(tmp_path / "both"), [info_of(first), info_of(other)]
    rows = {row[0]: row[1:] for row in report.rows}
    for name, cells in {
            "steps": ["6", "6"], "lr": ["0.003", "0.01"], "batch_tokens": ["512", "1024"],
            "validation loss": [f"{info['metrics']['val_loss']:.4f}" for info in infos],
            "price": ["no price set", f"${infos[1]['metrics']['dollars']:,.2f}"],
            "commit": [info["origins"][0]["commit"] for info in infos],
            "text_bits_per_byte": ["–", "1.235 ± 0.012"],
            "piqa/acc": ["–", "0.5000 ± 0.0100"]}.items():
        assert rows[name] == cells
    assert ["3,072 tokens", "6,144 tokens"] in rows.values()
    assert not {"seed", "out", "context", "text_bits_per_byte_error"} & rows.keys()
    assert report.commands == [shlex.split(info["origins"][0]["command"]) for info in infos]
    assert report.html.tags.count("img") == 1 and (tmp_path / "both/loss.png").is_file()
