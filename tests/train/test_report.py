"""The claims of the report card: true figures, the same in both files, and nothing in it runs."""

import base64
import hashlib
import json
import os
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
from conftest import ROOT, STAGES, STEPS, log_rows, newest, reseal, run
from PIL import Image

import tokenizer as tokenizers
from common.device import Machine
from common.report import LARGEST, Code, Notes, Page, Picture, Sample, Samples, Table
from data import Chats
from evals.compare import compare
from train.log import data_table, origin, with_origin

SEEING = ("clip_pretrain", "vision_pretrain", "vision_sft")
VOID = ("meta", "link", "img", "br", "hr")  # tags without an end
HOSTILE = ("<script>alert(1)</script>", "</pre></dd><img src=x onerror=alert(1)>", "a | b", "```",
           "````text\n<b>\n````", "[link](https://example.org)", "![x](https://example.org/x.png)",
           "&lt;script&gt; &amp; 'quotes\" >", "*bold* _thin_ `code` ~~gone~~ a\\|b",
           "two\n\nlines", "\x1b[31m\x00 \ud800 é 漢", "# heading",
           "w" * 400, "{braces} %s", "<!-- -->", "https://example.org/bare", "1. one", "- two")


class Reader(HTMLParser):
    """What an HTML page holds: its tags, tables, code, lists of terms, pictures and words."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.pictures, self.words, self.open = [], [], [], [], []
        self.cells, self.rows, self.texts = None, [], {"code": [], "dd": [], "dt": []}
        self.feed(page.replace("<wbr>", ""))  # where a word may break
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "img":
            self.pictures.append(dict(attributes))
        if tag in VOID:
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag in self.texts:
            self.texts[tag].append("")

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"style", "title"} & {*self.open}:
            return
        self.words += data.split()
        for tag in self.open:
            if tag in ("td", "th"):
                self.rows[-1][-1] += data
            if tag in self.texts:
                self.texts[tag][-1] += data


class Card:
    """A report: report.html, and report.md as another implementation of Markdown reads it."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.page = (self.folder / "report.html").read_text(encoding="utf-8")
        self.html, self.markdown = Reader(self.page), rendered(self.folder / "report.md")
        self.facts = {row[0]: row[1] for row in self.html.rows}
        self.tables = self.html.rows

    @property
    def commands(self):
        """The words of every command, as a shell takes them."""
        return [shlex.split(text.replace("\\\n", "")) for text in self.html.texts["code"]]

    @property
    def samples(self):
        """A {label: text} for each sample."""
        found = []
        for label, text in zip(self.html.texts["dt"], self.html.texts["dd"], strict=True):
            if not found or label in found[-1]:
                found.append({})
            found[-1][label] = text
        return found


def rendered(path):
    markdown_it = pytest.importorskip("markdown_it", reason="pip install markdown-it-py")
    renderer = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])
    return Reader(renderer.render(path.read_text(encoding="utf-8")))


def squeezed(rows):
    return [[" ".join(cell.split()) for cell in row] for row in rows]


def info_of(folder):
    return json.loads((newest(folder) / "config.json").read_text())


@pytest.fixture(scope="module")
def cards(pipeline):
    return {stage: Card(pipeline.folder / stage) for stage in STAGES}


# ------------------------------------------------------------------------------------ true figures


@pytest.mark.parametrize("stage", STAGES)
def test_a_card_says_how_the_run_was_made_and_what_it_cost(pipeline, cards, stage):
    folder, facts = pipeline.folder / stage, cards[stage].facts
    command = [Path(sys.executable).name, str(ROOT / f"{stage}.py"), *pipeline.flags(stage),
               f"--out={folder}"]
    assert cards[stage].commands[0] == command
    info, rows = info_of(folder), log_rows(folder)
    (made,) = info["origins"]
    assert facts["commit"] == made["commit"]
    assert re.fullmatch(r"unknown|[0-9a-f]{7,}(-dirty)?", made["commit"])
    assert facts["hardware"].startswith("1 x ") and facts["hardware"].endswith("float32")
    assert f"PyTorch {torch.__version__}" in facts["software"]

    unit, each = ("img", 16) if stage == "clip_pretrain" else ("tok", info["settings"].get(
        "batch_tokens"))
    assert facts["steps"] == str(STEPS)
    amount = facts["pairs" if unit == "img" else "tokens"]
    assert amount.startswith(f"{STEPS * each:,} ") and f"{STEPS} steps of {each:,}" in amount
    speed = statistics.median(row[f"{unit}_per_s"] for row in rows if "ms" in row)
    mfu = statistics.median(row["mfu"] for row in rows if "ms" in row)
    assert facts["median speed"] == f"{speed:,.0f} {unit}/s" and facts["MFU"] == f"{mfu:.1%}"
    metrics = info["metrics"]
    assert facts["peak memory"].startswith(f"{metrics['peak_rss_gb']:.2f} GB host")
    assert facts["wall time"] == f"{metrics['seconds']:.0f} seconds"
    assert facts["arithmetic"] == f"{metrics['tflop']:,.4g} TFLOP" and metrics["tflop"] > 0
    assert facts["price"].startswith("no price set")


@pytest.mark.parametrize("stage", STAGES)
def test_a_card_has_losses_settings_and_the_fingerprint_of_the_data(pipeline, cards, stage):
    folder, facts = pipeline.folder / stage, cards[stage].facts
    info, rows = info_of(folder), log_rows(folder)
    first = next(row["val_loss"] for row in rows if "val_loss" in row)
    held_out = next(row for row in cards[stage].tables if row[0] == "held-out loss")
    assert held_out[1:] == [f"{first:.4f}", "3", f"{info['metrics']['val_loss']:.4f}"]
    assert ("held-out loss, without a picture" in facts) == stage.startswith("vision")
    for name, value in info["settings"].items():
        assert [name, str(value) or "(empty)"] in [row[:2] for row in cards[stage].tables]
    assert ["max_steps", str(STEPS), "1000"] in cards[stage].tables  # what it is if left alone
    assert ["seed", "1337", ""] in cards[stage].tables
    data = [info["settings"][name] for name in ("data", "text_data") if info["settings"].get(name)]
    found = [row[1] for row in cards[stage].tables if row[0] == "sha256 of manifest.json"]
    assert found == [hashlib.sha256(Path(folder, "manifest.json").read_bytes()).hexdigest()
                     for folder in data]
    assert len(data) == 1 + (stage == "vision_sft")
    if stage == "pretrain":
        manifest = json.loads((pipeline.data / "text/manifest.json").read_text())
        assert facts["train_tokens"] == f"{manifest['train_tokens']:,}"


def test_the_counts_of_a_data_set_are_in_the_card(pipeline, tmp_path):
    """With the rows that were left out; and data without a manifest are said to have none."""
    data = shutil.copytree(pipeline.data / "chats", tmp_path / "chats")
    manifest = json.loads((data / "manifest.json").read_text())
    manifest |= {"train": {"chats": 150, "tokens": 4321}, "left_out": {
        "an empty answer": {"rows": 7, "first": ["a.jsonl:3"]}}}
    (data / "manifest.json").write_text(json.dumps(manifest))
    reseal(data)
    pipeline.run_stage("sft", tmp_path / "run", f"--data={data}")
    facts = Card(tmp_path / "run").facts
    assert facts["train"] == "chats 150, tokens 4321" and facts["left out"] == "7 an empty answer"
    digest = hashlib.sha256((data / "manifest.json").read_bytes()).hexdigest()
    assert facts["sha256 of manifest.json"] == digest
    assert data_table(str(tmp_path)).rows == [["fingerprint", "none: it has no manifest.json"]]


def test_time_and_price_are_summed_over_the_lineage(pipeline, tmp_path):
    priced = "--dollars_per_hour=72000"
    pipeline.run_stage("sft", tmp_path / "sft", priced)
    pipeline.run_stage("vision_pretrain", tmp_path / "vision", priced,
                       f"--init_from={tmp_path}/sft")
    card, info = Card(tmp_path / "vision"), info_of(tmp_path / "vision")
    line = [*info["lineage"], {"stage": "vision_pretrain", "step": STEPS, **info}]
    assert [stage["stage"] for stage in line] == [
        "pretrain", "sft", "clip_pretrain", "vision_pretrain"]
    start = card.tables.index(["stage", "steps", "held-out loss", "TFLOP", "min", "$"])
    *rows, total = card.tables[start + 1 : start + 6]
    dollars = [stage["metrics"]["dollars"] for stage in line]
    assert dollars[0] == dollars[2] == 0 and min(dollars[1], dollars[3]) > 1
    for row, stage, price in zip(rows, line, dollars, strict=True):
        m = stage["metrics"]
        assert row == [stage["stage"], str(STEPS), f"{m['val_loss']:.4f}", f"{m['tflop']:,.1f}",
                       f"{m['seconds'] / 60:.1f}", f"{price:,.2f}"]
    tflop, seconds = (sum(stage["metrics"][name] for stage in line) for name in (
        "tflop", "seconds"))
    assert total == ["all", "–", "–", f"{tflop:,.1f}", f"{seconds / 60:.1f}",
                     f"{sum(dollars):,.2f}"]
    assert card.facts["price"] == f"${dollars[3]:,.2f} (a device costs $72,000.00 an hour)"


# ------------------------------------------------------------------------------- one data structure


@pytest.mark.parametrize("stage", STAGES)
def test_both_files_say_the_same(cards, stage):
    html, markdown = cards[stage].html, cards[stage].markdown
    assert squeezed(html.rows) == squeezed(markdown.rows) and len(html.rows) > 40
    assert html.texts["code"] + html.texts["dd"] != []
    assert sorted(text.strip() for text in html.texts["code"] + html.texts["dd"]) == sorted(
        text.strip() for text in markdown.texts["code"])
    words = [{word.rstrip(":") for word in reader.words} for reader in (html, markdown)]
    assert words[0] <= words[1] and words[1] - words[0] <= set("12345678")  # numbers of samples


@pytest.mark.parametrize("stage", STAGES)
def test_eight_samples_with_what_would_be_right_and_their_pictures(pipeline, cards, stage):
    card = cards[stage]
    assert len(card.samples) == 8
    assert all(len(sample) >= 2 and sample["right"].strip() for sample in card.samples)
    embedded = [base64.b64decode(picture["src"].split(",")[1]) for picture in card.html.pictures]
    beside = [card.folder / picture["src"] for picture in card.markdown.pictures]
    assert [path.read_bytes() for path in beside] == embedded
    names = [str(path.relative_to(card.folder)) for path in beside]
    assert names[0] == "loss.png" and len(names) == 1 + 8 * (stage in SEEING)
    assert all(re.fullmatch(r"samples/[0-7]\.(png|jpg)", name) for name in names[1:])
    assert all(max(Image.open(path).size) <= LARGEST for path in beside[1:])
    assert len(card.page) < 200_000


def test_samples_are_those_of_the_held_out_data(pipeline, cards):
    chats = Chats(pipeline.data / "scenes", "val")
    tokenizer = tokenizers.load(pipeline.data / "scenes")
    for i, sample in enumerate(cards["vision_sft"].samples):
        text = tokenizer.decode(chats.chat(i)[0])
        found = re.match(r"<\|endoftext\|><\|user\|><\|image\|>(.*?)<\|end\|>"
                         r"<\|assistant\|>(.*?)<\|end\|>", text)
        assert (sample["user"], sample["right"]) == found.groups()
        shown = Image.open(next((cards["vision_sft"].folder / "samples").glob(f"{i}.*")))
        true = chats.images(i)[0]
        difference = np.asarray(shown.convert("RGB"), float) - np.asarray(true, float)
        assert shown.size == true.size and np.abs(difference).mean() < 8
    documents = tokenizer.decode(np.load(pipeline.data / "text/val_000000.npy"))
    for sample in cards["pretrain"].samples:
        assert re.search(re.escape(sample["beginning"]) + r"\s*" + re.escape(sample["right"]),
                         documents)
        assert "<|" not in sample["right"] and len(sample["right"]) > 10


# ------------------------------------------------------------------------- hostile text, no network


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The folder of a page that quotes the worst everywhere."""
    folder = tmp_path_factory.mktemp("hostile")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 900, 3), np.uint8))
    samples = [Sample([("user", text), ("model", text), (text, "right")], [image] * (i < 2))
               for i, text in enumerate(HOSTILE)]
    Page(" ".join(HOSTILE[:2]), HOSTILE[1], {
        HOSTILE[0]: [Table([HOSTILE[0], HOSTILE[2]], [[text, text] for text in HOSTILE]),
                     Notes(HOSTILE), *map(Code, HOSTILE),
                     Picture("loss.png", b"\x89PNG", HOSTILE[1])],
        "Samples": [Samples(samples)]}).write(folder)
    return folder


def test_hostile_text_is_text_in_both_files(hostile):
    card = Card(hostile)
    shown = [re.sub(r"[\x00-\x08\x0b-\x1f]", "\ufffd", text).replace("\ud800", "?")
             for text in HOSTILE]
    for reader in card.html, card.markdown:
        assert not {"script", "iframe", "b", "em", "strong", "s", "a", "object"} & {*reader.tags}
        assert not [name for name, _ in reader.attributes if name.startswith("on")]
        assert squeezed(reader.rows)[1:] == squeezed([[text, text] for text in shown])
    assert card.html.texts["code"] == shown
    assert card.html.texts["dd"][:2] == [shown[0]] * 2
    fenced = [text.removesuffix("\n") for text in card.markdown.texts["code"]]
    assert fenced[: len(shown)] == shown
    assert len(card.html.pictures) == len(card.markdown.pictures) == 3
    assert Image.open(next((hostile / "samples").glob("0.*"))).size == (LARGEST, 171)


def test_a_page_asks_the_network_for_nothing(hostile, cards):
    for card in (Card(hostile), *cards.values()):
        sources = [value for name, value in card.html.attributes if name in ("src", "href")]
        assert all(value.startswith("data:") for value in sources) and sources
        assert not {"script", "iframe", "object", "embed", "form"} & {*card.html.tags}
        assert "url(" not in card.page and "@import" not in card.page


def test_small_pictures_stay_as_they_are_and_large_ones_become_small_files():
    flat, noise = (Image.new("RGB", (96, 96), "red"), Image.effect_noise((2000, 1000), 90))
    (first,), (second, third) = Samples([Sample([], [flat]), Sample([], [noise, noise])]).pictures
    assert (first.name, second.name, third.name) == (
        "samples/0.png", "samples/1.jpg", "samples/1_1.jpg")
    assert len(first.data) < 1000 and len(second.data) < 40_000


# ------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser",
                                                 "google-chrome"))), None)
    if not found:
        pytest.skip("install Chromium (Debian: apt install chromium) to look at the reports")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=flags)
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_every_page_without_overflow(browser, pipeline, hostile, scheme, tmp_path):
    compare([pipeline.folder / "sft", pipeline.folder / "vision_sft"], tmp_path)
    page = browser.new_context(viewport={"width": 390, "height": 844},
                               color_scheme=scheme).new_page()
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    for folder in (*(pipeline.folder / stage for stage in STAGES), hostile, tmp_path):
        page.goto(f"file://{folder}/report.html")
        wide, inner = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= inner == 390, folder
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 26)"}[scheme]
        shapes = page.evaluate("[...document.querySelectorAll('.sample img')].map(i => "
                               "[i.width / i.height, i.naturalWidth / i.naturalHeight])")
        assert all(shown == pytest.approx(true, rel=0.02) for shown, true in shapes), folder
    assert len([url for url in asked if not url.startswith("data:")]) == len(STAGES) + 2
    assert not said


# ------------------------------------------------------------------------- when it is written again


def test_a_finished_run_started_again_writes_the_same_report(pipeline, tmp_path):
    """Speed, cost, command and settings are those of the training, not of the second start."""
    folder = shutil.copytree(pipeline.folder / "sft", tmp_path / "sft")
    before = (folder / "report.md").read_text()
    (folder / "report.md").unlink()
    pipeline.run_stage("sft", folder, "--dollars_per_hour=5", "--lr=1")
    after = (folder / "report.md").read_text()
    assert "| median speed |" in after
    assert after.replace(str(folder), str(pipeline.folder / "sft")) == before


def test_a_run_that_went_on_elsewhere_names_both_commands(pipeline, tmp_path):
    folder = shutil.copytree(pipeline.folder / "pretrain", tmp_path / "run")
    for _ in range(2):  # the second start is the first one's command
        shutil.rmtree(newest(folder))
        pipeline.run_stage("pretrain", folder, "--log_every=2")
    made = info_of(folder)["origins"]
    assert [part["step"] for part in made] == [0, 4]
    assert "--log_every=2" in made[1]["command"] and "--log_every=2" not in made[0]["command"]
    assert Card(folder).commands == [shlex.split(part["command"]) for part in made]
    assert info_of(folder)["metrics"]["peak_rss_gb"] >= info_of(
        pipeline.folder / "pretrain")["metrics"]["peak_rss_gb"]


def test_a_start_is_noted_once(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--out=a b"])
    machine = Machine(torch.device("cpu"), torch.bfloat16, 0, 8, "Some GPU")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    starts = with_origin([], machine, 0, 10)
    assert starts[0]["command"] == "torchrun --nnodes=2 --nproc_per_node=4 pretrain.py '--out=a b'"
    assert starts[0]["hardware"] == "8 x Some GPU, bfloat16"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert origin(machine, 0)["command"].startswith("torchrun --standalone --nproc_per_node=8 ")
    assert with_origin(with_origin(starts, machine, 3, 10), machine, 7, 10) == [
        *starts, origin(machine, 3)]
    assert with_origin(starts, machine, 10, 10) == starts


@pytest.mark.skipif(os.name != "posix", reason="folders in the way of files")
def test_a_report_that_cannot_be_written_costs_nothing_else(pipeline, tmp_path):
    (tmp_path / "run/report.md").mkdir(parents=True)
    said = pipeline.run_stage("pretrain", tmp_path / "run")
    assert "there is no report: " in said and "done: " in said
    assert newest(tmp_path / "run").name == f"step_{STEPS:08d}"


# ------------------------------------------------------------------------------------- side by side


def test_runs_are_laid_side_by_side(pipeline, tmp_path):
    other = tmp_path / "other"
    pipeline.run_stage("pretrain", other, "--lr=0.01", "--batch_tokens=1024",
                       "--dollars_per_hour=72000")
    (other / "report.json").write_text(json.dumps({
        "text_bits_per_byte": 1.2345678, "text_bits_per_byte_error": 0.01234}))
    digest = hashlib.sha256((newest(other) / "manifest.json").read_bytes()).hexdigest()
    (other / "eval.json").write_text(json.dumps({"sha256": digest, "tasks": {"piqa": {
        "scores": {"acc": [0.5, 0.01]}, "chance": 0.5, "n": 9}}}))
    runs, out = (pipeline.folder / "pretrain", other), f"--out={tmp_path}/both"
    result = run("eval.py", "compare", *runs, out)
    assert result.status == 0 and "compare 2 runs" in result.out, result.err
    card = Card(tmp_path / "both")
    rows = {row[0]: row[1:] for row in card.tables}
    infos = [info_of(pipeline.folder / "pretrain"), info_of(other)]
    assert rows["steps"] == ["6", "6"] and rows["read"] == ["3,072 tokens", "6,144 tokens"]
    assert rows["held-out loss"] == [f"{info['metrics']['val_loss']:.4f}" for info in infos]
    assert rows["lr"] == ["0.003", "0.01"] and rows["batch_tokens"] == ["512", "1024"]
    assert rows["price"] == ["no price set", f"${infos[1]['metrics']['dollars']:,.2f}"]
    assert all(cell.endswith(" tok/s") for cell in rows["median speed"])
    assert rows["peak memory"] == [f"{i['metrics']['peak_rss_gb']:.2f} GB host" for i in infos]
    assert rows["commit"] == [info["origins"][0]["commit"] for info in infos]
    assert rows["text_bits_per_byte"] == ["–", "1.235 ± 0.012"]
    assert "text_bits_per_byte_error" not in rows
    assert rows["piqa/acc"] == ["–", "0.5000 ± 0.0100"]
    assert rows["piqa by guessing"] == ["–", "0.5000"]
    assert not {"seed", "out", "context"} & rows.keys()
    assert card.commands == [shlex.split(info["origins"][0]["command"]) for info in infos]
    assert squeezed(card.html.rows) == squeezed(card.markdown.rows)
    assert len(card.html.pictures) == 1 and (tmp_path / "both/loss.png").is_file()


def test_runs_of_different_stages_can_be_compared(pipeline, tmp_path):
    compare([pipeline.folder / stage for stage in STAGES], tmp_path)
    rows = {row[0]: row[1:] for row in Card(tmp_path).tables}
    assert rows["stage"] == list(STAGES)
    assert [cell.split()[1] for cell in rows["read"]] == ["pairs", *["tokens"] * 4]


def test_what_is_no_run_is_named(pipeline, tmp_path):
    sft, out = pipeline.folder / "sft", f"--out={tmp_path}/out"
    (tmp_path / "empty").mkdir()
    gone = run("eval.py", "compare", sft, tmp_path / "gone", out)
    assert f"no folder {tmp_path}/gone" in gone.refusal
    empty = run("eval.py", "compare", sft, tmp_path / "empty", out)
    assert f"{tmp_path}/empty is no run" in empty.refusal
    assert "two or more" in run("eval.py", "compare", sft, out).refusal
    assert "two or more" in run("eval.py", "compare").refusal
    before = (sft / "report.md").read_text()
    assert "would be lost" in run("eval.py", "compare", sft, sft, f"--out={sft}").refusal
    assert (sft / "report.md").read_text() == before
    (tmp_path / "file").write_text("")
    assert "cannot write" in run("eval.py", "compare", sft, sft, f"--out={tmp_path}/file").refusal
    assert not (tmp_path / "out").exists()
