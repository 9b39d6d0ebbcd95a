"""The claims of prepare.py check: every problem is counted and named, as in training."""

import json
import re
from itertools import chain

import numpy as np
import pytest
from conftest import run
from PIL import Image
from test_prepare import encoded
from test_resumable import about as row
from test_resumable import prepared
from test_schema import FORMS

import tokenizer as tokenizers
from common.config import seal
from data import Chats, ImageSpec
from train.packing import Packed

RED = (250, 10, 10)
ASK = "<image>\nWhat is it?"
LONG = "word " * 100
CUT, TOO_LONG = ("truncated after an answer to 96 positions",
                 "its first answer ends beyond 96 positions")
GOOD = [row("red.png", ASK, f"Red {i}.") for i in range(20)]
REFUSED = {
    "a missing image": [row(f"gone{i}.png", ASK, "Red.", id=i) for i in range(7)],
    "an unreadable image": [row("text.jpg", ASK, "Red."), row("empty.jpg", ASK, "Red.")],
    "a truncated image": [row("cut.jpg", ASK, "Red.")] * 3,
    "more than 4 images": [row(["red.png"] * 5, "What are they?", "Red.")],
    "an empty answer": [row("red.png", ASK, " ")] * 4,
    "turns out of order": [row("red.png", ASK, "Red.")],
}
REFUSED["turns out of order"][0]["conversations"].reverse()
KEPT = {
    TOO_LONG: [row("red.png", LONG + str(i), "Long.") for i in range(2)],
    CUT: [row("red.png", ASK, "Cut.", LONG, "b")],
    "": [row("", "Say it.", "It."), *(row(["red.png"] * n, "<image>" * n, "Red.") for n in (2, 3))],
}
N_REFUSED, N_KEPT = (sum(map(len, rows.values())) for rows in (REFUSED, KEPT))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with images/, a tokenizer, good.jsonl, rows.jsonl of everything above, and `made`:
    what prepare.py images makes of those."""
    folder = tmp_path_factory.mktemp("corpus")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    (folder / "images").mkdir()
    for name, content in {
        "red.png": encoded(Image.new("RGB", (40, 20), RED), "PNG"), "text.jpg": b"not an image",
        "empty.jpg": b"", "cut.jpg": encoded(noise, "JPEG")[:1500],
    }.items():
        (folder / "images" / name).write_bytes(content)
    rows = [*GOOD, *chain(*REFUSED.values(), *KEPT.values())]
    (folder / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GOOD))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizers.train(["what is it? red. say " * 20], 300).save(folder)
    prepared("images", f"--files={folder}/rows.jsonl", f"--tokenizer={folder}",
             f"--image_root={folder}/images", "--image_size=32", f"--out={folder}/made",
             "--val_share=0.2")
    return folder


@pytest.fixture
def check(corpus, tmp_path, monkeypatch):
    """A function that checks a file or folder; gives the Result."""
    monkeypatch.chdir(tmp_path)

    def check(data, *flags):
        result = run("prepare.py", "check", data, f"--tokenizer={corpus}", "--context=96",
                     f"--image_root={corpus}/images", "--patches=16", "--image_size=32", "--sheet=",
                     *flags)
        assert not list(tmp_path.glob(".*"))  # the temporary folder is gone
        return result

    return check


def test_every_problem_is_counted_and_the_first_rows_are_named(corpus, check):
    said, start = check(corpus / "rows.jsonl").out, len(GOOD) + 1
    for reason, rows in {**REFUSED, **KEPT}.items():
        names = ", ".join(f"rows.jsonl:{start + i}" for i in range(len(rows))[:5])
        more = ", ..." * (len(rows) > 5)
        assert not reason or f"\n{len(rows)} rows: {reason} ({names}{more})\n" in said
        start += len(rows)
    _, training = said.split("\nleft out by training\n")
    assert training.startswith(f"2 rows: {TOO_LONG}")
    n_good = len(GOOD) + N_KEPT - 2
    assert (f"{len(GOOD) + N_KEPT} chats, {n_good} of them good, with {n_good} answers and "
            f"{n_good + 2} images\n") in said
    assert said.splitlines()[-1].startswith(
        f"{n_good} of {len(GOOD) + N_KEPT + N_REFUSED} rows are good; training leaves")


def test_a_prepared_folder_is_read_as_training_reads_it(corpus, check):
    said, tokenizer = check(corpus / "made").out, tokenizers.load(corpus)
    packed, train = (Packed([Chats(corpus / "made", split) for split in splits], 96, tokenizer,
                            ImageSpec(16, 32)) for splits in (("train", "val"), ("train",)))
    assert f"{len(GOOD) + N_KEPT} chats, {len(packed.chats)} of them good" in said
    assert f"({len(train)} packed rows of 96, {train.filled:.1%} filled)" in said
    assert all(reason in said for reason in REFUSED) and "(train:" in said


def test_positions_and_steps_are_those_of_training(corpus, check):
    said = check(corpus / "good.jsonl", "--batch_tokens=192").out
    tokenizer = tokenizers.load(corpus)
    messages = [[{"role": role, "content": turn["value"]} for role, turn in
                 zip(("user", "assistant"), row["conversations"], strict=True)] for row in GOOD]
    lengths = [len(tokenizers.render(tokenizer, chat, 1).ids) + 15 for chat in messages]
    shortest, *_, longest = re.search("positions per chat(.*)", said)[1].split()
    assert (int(shortest), int(longest)) == (min(lengths), max(lengths))
    n_rows = -(-20 // (96 // max(lengths)))
    assert f"{-(-n_rows // 2)} steps of 192 positions ({n_rows} packed" in said
    assert said.splitlines()[-1].startswith("all 20 rows are good")
    assert "3 chats, 3 of them good" in check(corpus / "good.jsonl", "--max_chats=3").out


def test_an_epoch_is_of_what_is_not_held_out(corpus, check, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([row("", f"Say {i}.", "It is red.") for i in range(40)]))
    prepared("images", f"--files={path}", f"--tokenizer={corpus}", "--val_share=0.5",
             f"--out={tmp_path}/out")
    train = Packed([Chats(tmp_path / "out", "train")], 96, tokenizers.load(corpus))
    assert len(train.chats) == 20
    for data in path, tmp_path / "out":
        said = check(data, "--val_share=0.5", "--batch_tokens=96").out
        assert f"training split: {len(train)} steps of 96" in said and "40 of them good" in said


@pytest.mark.parametrize("first", ["long", "good"])
def test_any_number_of_long_chats_leaves_the_others_good(first, corpus, check, tmp_path):
    rows = sorted(GOOD + [row("red.png", LONG + str(i), "Long.") for i in range(300)],
                  key=lambda row: (row in GOOD) == (first == "long"))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    said = check(tmp_path / "a.json").out
    assert "320 chats, 20 of them good" in said and f"300 rows: {TOO_LONG}" in said


def test_rows_of_which_something_is_not_read_are_not_called_good(check, tmp_path):
    rows = [json.loads(row) for _, row, _ in FORMS]
    for name in "apb":
        Image.new("RGB", (40, 20), RED).save(tmp_path / f"{name}.jpg")
    but = "{} of {} rows can be trained on, but without the columns that are not used"
    for extra, verdict in ({}, "all {} rows are good"), ({"notes": "Seen at dawn."}, but):
        lines = [json.dumps({**row, **extra} if isinstance(row, dict) else row) for row in rows]
        (tmp_path / "forms.jsonl").write_text("\n".join(lines), encoding="utf-8")
        said = check("forms.jsonl", f"--image_root={tmp_path}").out
        n = len(rows) + 1  # chats: one row has two captions
        assert said.splitlines()[-1].startswith(verdict.format(n, n))
        n_noted = sum(isinstance(row, dict) for row in rows)
        assert (f"{n_noted} rows: column notes is not used" in said) == bool(extra)


def test_the_contact_sheet_shows_sixteen_random_chats(corpus, check, tmp_path):
    sheets = []
    for seed in 0, 1:
        flags = f"--sheet={tmp_path}/a.png", f"--seed={seed}"
        assert check(corpus / "good.jsonl", *flags).status == 0
        with Image.open(tmp_path / "a.png") as sheet:
            sheets.append(np.asarray(sheet.convert("RGB")).astype(int))
    assert not np.array_equal(*sheets)
    tiles = [tile for line in np.array_split(sheets[0], 4)
             for tile in np.array_split(line, 4, axis=1)]
    assert all((np.abs(tile - RED).max(2) < 30).sum() > 3000 for tile in tiles)


def test_unusual_texts_end_nothing(corpus, check, tmp_path):
    texts = ("\ud800", "a\0b", "🦊" * 400, "x" * 3000, "costs $5$ {}\\frac")
    rows = [*(row("red.png", text, text, id=[1]) for text in texts), 7]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    result = check(tmp_path / "a.json", f"--sheet={tmp_path}/a.png", "--context=8000")
    assert result.out.splitlines()[-1].startswith("5 of 6 rows are good"), result.err


def test_a_chat_is_shown_token_by_token(corpus, check, tmp_path):
    found = row("red.png", "What <|end|>\n<image>", "Rëd.", "And now?", "Still red.")
    (tmp_path / "a.json").write_text(json.dumps([*REFUSED["a missing image"], found]))
    said = check(tmp_path / "a.json", "--show=1").out.splitlines()
    said = said[said.index("a.json:8") :]
    tokenizer = tokenizers.load(corpus)
    chat = tokenizers.render(tokenizer, [
        {"role": ("user", "assistant")[i % 2], "content": turn["value"]}
        for i, turn in enumerate(found["conversations"])], 1)
    shown, at = [line.split(maxsplit=3) for line in said[2:]], 0
    assert [int(line[1]) for line in shown] == chat.ids
    assert [line[2] == "yes" for line in shown] == chat.supervised
    for i, (where, _, _, text) in zip(chat.ids, shown, strict=True):
        assert where == str(at)
        assert (text == "<|image|> x 16") == (i == tokenizer.image)
        at += 16 if i == tokenizer.image else 1
    assert "train:1" in check(corpus / "made", "--show=1").out


@pytest.mark.parametrize("name, content, word", [
    ("no.json", None, "no file matches"), ("empty.jsonl", "", "no row"),
    ("empty.json", "", "no row"), ("words.json", "words", "malformed JSON in line 1"),
    ("words.jsonl", "some words\n", ".txt"), ("folder", {}, "holds no data set"),
    ("text", {"manifest.json": seal({})}, "not prepared yet"),
])
def test_data_that_cannot_be_checked_is_refused(name, content, word, check, tmp_path):
    if isinstance(content, str):
        (tmp_path / name).write_text(content)
    elif content is not None:
        (tmp_path / name).mkdir()
        for inside, value in content.items():
            (tmp_path / name / inside).write_text(json.dumps(value))
    said = check(tmp_path / name).refusal
    assert word in said and str(tmp_path / name) in said


@pytest.mark.parametrize("flag, word", [
    ("--show=999", "--show=999"), ("--context=0", "--context=0"),
    ("--context=9", "none fits --context=9"), ("--max_chats=-1", "--max_chats=-1"),
    ("--sheet=/dev/null", "--sheet=/dev/null: it is a folder or a device"),
    ("--image_root=nowhere", "nowhere"), ("--tokenizer=nowhere", "nowhere"),
    ("--contxt=5", "context"), ("--dataset=x", "--dataset"),
])
def test_a_setting_that_cannot_be_used_is_refused(flag, word, corpus, check):
    assert word in check(corpus / "rows.jsonl", flag).refusal


def test_a_wrong_image_root_is_suspected_where_all_images_are_missing(corpus, check, tmp_path):
    assert "is --image_root right?" in check(corpus / "good.jsonl",
                                             f"--image_root={tmp_path}").refusal
