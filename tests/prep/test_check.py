"""The claims of prepare.py check: every problem is counted and named, and nothing is made up."""

import gc
import io
import json
import shutil
import tarfile

import numpy as np
import pyarrow.parquet
import pytest
from conftest import run
from PIL import Image

import tokenizer as tokenizers
from common.config import seal
from data import Chats
from prep import look
from prep.check import Check
from prep.check import check as check_data
from train.packing import Packed

SIZES = ("--context=96", "--patches=16", "--image_size=32")


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def row(name, *texts, **more):
    """A row in LLaVA's form about the picture `name`; texts are question, answer, question ..."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {**({"image": name} if name else {}), "conversations": turns, **more}


def planted():
    """{problem or note: the rows that have it}, and good ones."""
    ask = "<image>\nWhat is it?"
    long = "word " * 100
    return {
        "good": [row("red.png", ask, f"Red {i}.", id=f"good{i}") for i in range(20)],
        "a missing image": [row(f"gone{i}.png", ask, "Red.", id=i) for i in range(7)],
        "an unreadable image": [row("text.jpg", ask, "Red."), row("empty.jpg", ask, "Red.")],
        "a truncated image": [row("cut.jpg", ask, "Red.")] * 3,
        "an image that is too large": [row("large.png", ask, "Red.")],
        "images and <image> marks do not match": [
            row("red.png", "<image> <image>", "Two."), row("red.png", ask, "Red.", ask, "Red."),
            row("", "Say <image>.", "I see none.")],
        "more than 4 images": [row(["red.png"] * 5, "What are they?", "Red.")],
        "an empty answer": [row("red.png", ask, " ")] * 4,
        "turns out of order": [{"image": "red.png", "conversations": row(0, "a", "b")[
            "conversations"][::-1]}],
        "its first answer ends beyond 96 positions": [row("red.png", long + str(i), "Long.")
                                                      for i in range(2)],
        "longer than 96 positions: cut behind an answer": [row("red.png", ask, "Cut.", long, "b")],
        look.NO_PICTURE: [row("", f"Say {i}.", str(i), id=f"text{i}") for i in range(3)],
        look.UNMARKED: [row("red.png", f"What {i}?", "Red.") for i in range(2)],
        look.SEVERAL: [row(["red.png"] * n, "<image>" * n, "Red.") for n in (2, 3)],
        look.COPY: [row("red.png", ask, "Red 3."), row("", "Say 0.", "0")],
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with pictures/, rows.jsonl of everything planted, good.jsonl, and a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "pictures").mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    pictures = {"red.png": encoded(Image.new("RGB", (40, 20), (250, 10, 10))),
                "text.jpg": b"not a picture", "empty.jpg": b"",
                "cut.jpg": encoded(noise, "JPEG")[:1500],
                "large.png": encoded(Image.new("1", (8001, 7000)))}
    for name, content in pictures.items():
        (folder / "pictures" / name).write_bytes(content)
    for name, kinds in ("rows", planted()), ("good", ["good"]):
        lines = [json.dumps(found) + "\n" for kind in kinds for found in planted()[kind]]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    with open(folder / "rows.jsonl", "a") as file:
        file.write("not JSON\n")
    tokenizers.train(["what is it? red. say " * 20], 300).save(folder)
    return folder


@pytest.fixture
def checked(corpus, tmp_path, capsys):
    """A function that checks a file or folder; gives (its report, what it printed)."""

    def checked(data, **settings):
        report = tmp_path / "report.json"
        check_data(Check(**{
            "files": str(data), "image_root": f"{corpus}/pictures", "tokenizer": str(corpus),
            "context": 96, "patches": 16, "image_size": 32, "sheet": "", "report": str(report),
            **settings}))
        return json.loads(report.read_text()), capsys.readouterr().out

    return checked


def test_every_problem_is_counted_and_the_first_five_are_named(corpus, checked):
    report, said = checked(corpus / "rows.jsonl")
    kinds, start, first = planted(), 1, {}
    for kind, rows in kinds.items():
        first[kind] = [f"rows.jsonl:{start + i}" + (f" (id {found['id']})" if "id" in found else "")
                       for i, found in enumerate(rows)]
        start += len(rows)
    problems = list(kinds)[1:10]
    assert report["left_out"] == {
        "not a line of JSON": {"rows": 1, "first": [f"rows.jsonl:{start}"]},
        **{kind: {"rows": len(kinds[kind]), "first": first[kind][:5]} for kind in problems}}
    texts = [*first[look.NO_PICTURE], first[look.COPY][1]]
    notes = {**{kind: first[kind] for kind in list(kinds)[10:]}, look.NO_PICTURE: texts}
    assert report["notes"] == {kind: {"rows": len(names), "first": names[:5]}
                               for kind, names in notes.items()}
    n_rows = sum(map(len, kinds.values())) + 1
    n_good = n_rows - 1 - sum(len(kinds[kind]) for kind in problems)
    assert report["rows"] == n_rows and report["good"] == {
        "rows": n_good, "no picture": 4, "one picture": n_good - 6, "several": 2,
        "turns": 2 * n_good + 2, "answers": n_good + 1, "pictures": n_good - 1}
    for kind, rows in {**report["left_out"], **report["notes"]}.items():
        assert f"{rows['rows']:>8}  {kind}\n" in said
    assert said.splitlines()[-1] == report["verdict"] == (
        f"only {n_good} of {n_rows} rows are good; training leaves the others out, so look at "
        "the reasons first")


def test_the_reasons_and_counts_are_those_of_prepare_itself(corpus, checked, tmp_path):
    report, _ = checked(corpus / "rows.jsonl", context=100_000)
    result = run("prepare.py", "images", f"--files={corpus}/rows.jsonl", f"--tokenizer={corpus}",
                 f"--image_root={corpus}/pictures", "--image_size=32", f"--out={tmp_path}/out")
    assert f"train: {report['good']['rows'] - 1} chats" in result.out  # and one for validation
    for reason, found in report["left_out"].items():
        assert f"left out {found['rows']} rows: {reason} (" in result.out


def test_lengths_sizes_and_steps_are_those_of_training(corpus, checked):
    report, said = checked(corpus / "good.jsonl", batch_tokens=192)
    tokenizer = tokenizers.load(corpus)
    messages = [[{"role": role, "content": turn["value"]} for role, turn in
                 zip(("user", "assistant"), found["conversations"], strict=True)]
                for found in planted()["good"]]
    lengths = [len(tokenizers.render(tokenizer, chat, 1).ids) for chat in messages]
    ids, positions = (report["percentiles"][f"{name} of a row"] for name in ("ids", "positions"))
    assert (ids["min"], ids["max"]) == (min(lengths), max(lengths))
    assert {name: n + 15 for name, n in ids.items()} == positions
    assert set(report["percentiles"]["picture width"].values()) == {40}
    assert set(report["percentiles"]["picture height"].values()) == {20}
    assert list(ids) == ["min", "5 %", "25 %", "50 %", "75 %", "95 %", "99 %", "max"]
    a_row = 96 // max(positions.values())
    assert report["epoch"]["training_rows"] == -(-20 // a_row)
    assert report["epoch"]["steps"] == -(-report["epoch"]["training_rows"] // 2)
    assert report["verdict"] == "all 20 rows are good: this can be trained on as it is"
    assert report["left_out"] == report["notes"] == {} and "left out  " in said
    assert report["pictures_enlarged"] == 0
    assert checked(corpus / "good.jsonl", image_size=41)[0]["pictures_enlarged"] == 20
    assert checked(corpus / "good.jsonl", fit="short")[0]["pictures_enlarged"] == 20


def test_strange_ids_and_texts_end_nothing(corpus, checked, tmp_path):
    rows = [row("red.png", text, text, id=i) for text in ("\ud800", "a\0b", "🦊" * 400, "x" * 3000)
            for i in ("\ud800\n\n x", 7, None, ["a"], {"b": 1})]
    (tmp_path / "a.json").write_text(json.dumps([*rows, {**rows[0], "image": "gone.png"}, 7]))
    report, _ = checked(tmp_path / "a.json", sheet=str(tmp_path / "sheet.png"), context=8000)
    assert report["good"]["rows"] == 20
    assert report["left_out"]["a missing image"]["first"] == ["a.json:21 (id ? x)"]


def test_where_most_pictures_are_missing_the_place_is_doubted(corpus, checked, tmp_path):
    report, _ = checked(corpus / "good.jsonl", image_root=str(tmp_path))
    assert report["verdict"] == ("none of 20 rows is good: this cannot be trained on; most "
                                 "pictures are missing: is --image_root right?")


def test_pictures_are_found_in_archives_and_in_the_rows(corpus, checked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected, _ = checked(corpus / "good.jsonl")
    with tarfile.open("pictures.tar.gz", "w:gz") as archive:
        archive.add(corpus / "pictures", "pictures")
    content = (corpus / "pictures/red.png").read_bytes()
    rows = [{**found, "image": {"bytes": content, "path": None}} for found in planted()["good"]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "good.parquet")
    for settings in (dict(image_root="pictures.tar.gz"),
                     dict(files="good.parquet", image_root="")):
        report, _ = checked(corpus / "good.jsonl", **settings)
        assert {**report, "data": expected["data"]} == expected
    gc.collect()
    assert not list(tmp_path.glob(".unpacked-*"))


# ------------------------------------------------------------------------------- a folder of ours


@pytest.fixture(scope="module")
def made(corpus):
    """What prepare.py images makes of the rows."""
    out = corpus / "made"
    result = run("prepare.py", "images", f"--files={corpus}/rows.jsonl", f"--tokenizer={corpus}",
                 f"--image_root={corpus}/pictures", "--image_size=32", f"--out={out}",
                 "--val_share=0.2")
    assert result.status == 0, result.err
    return out


def test_a_folder_that_prepare_made_is_looked_at_as_training_reads_it(made, checked):
    report, _ = checked(made, sheet="")
    tokenizer, splits = tokenizers.load(made), [Chats(made, split) for split in ("train", "val")]
    packed = Packed(splits, 96, tokenizer, 16, 32)
    assert report["rows"] == sum(map(len, splits))
    assert report["good"]["rows"] == len(packed.chats) == report["rows"] - 2
    assert report["left_out"]["its first answer ends beyond 96 positions"]["rows"] == 2
    assert report["notes"]["longer than 96 positions: cut behind an answer"]["rows"] == packed.cut
    assert report["notes"][look.COPY]["rows"] == 2
    assert report["notes"][look.NO_PICTURE]["rows"] == report["good"]["no picture"] == 4
    assert report["notes"][look.SEVERAL]["rows"] == report["good"]["several"] == 2
    assert set(report["percentiles"]["picture width"].values()) == {32}
    assert checked(made, items=3)[0]["rows"] == 3


def test_what_was_left_out_when_it_was_made_is_said_again(made, checked, tmp_path):
    manifest = json.loads((made / "manifest.json").read_text())
    manifest["left_out"] = {"a missing image": {"rows": 7, "first": ["a.json:1", "a.json:2"]}}
    shutil.copytree(made, tmp_path / "copy")
    (tmp_path / "copy/manifest.json").write_text(json.dumps(seal(manifest)))
    report, said = checked(tmp_path / "copy")
    assert report["left_out_when_made"] == manifest["left_out"]
    assert "left out when it was made\n       7  a missing image\n" in said


def test_pictures_that_stayed_elsewhere_and_are_gone_are_named(corpus, checked, tmp_path):
    shutil.copytree(corpus / "pictures", tmp_path / "pictures")
    shutil.copy(corpus / "pictures/red.png", tmp_path / "pictures/blue.png")
    rows = [*planted()["good"], row("blue.png", "<image>What?", "Blue.")]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    result = run("prepare.py", "images", f"--files={tmp_path}/a.json", f"--tokenizer={corpus}",
                 f"--image_root={tmp_path}/pictures", "--copy=False", f"--out={tmp_path}/out")
    assert result.status == 0, result.err
    assert checked(tmp_path / "out")[0]["verdict"].startswith("all 21 rows are good")
    (tmp_path / "pictures/blue.png").unlink()
    report, _ = checked(tmp_path / "out")
    (name,) = report["left_out"]["a missing image"]["first"]
    assert report["good"]["rows"] == 20 and name.startswith(("train:", "val:"))
    assert report["verdict"] == "20 of 21 rows are good; training leaves the others out"


def test_a_changed_or_missing_file_is_named(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    path = tmp_path / "copy/train/ids.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    said = run("prepare.py", "check", tmp_path / "copy", *SIZES).refusal
    assert "is damaged: train/ids.npy is not what manifest.json says" in said
    path.unlink()
    assert "train/ids.npy is missing" in run("prepare.py", "check", tmp_path / "copy").refusal


# ----------------------------------------------------------------------------------- looking at it


@pytest.mark.parametrize("kind", ["rows.jsonl", "good.jsonl", "made"])
def test_the_contact_sheet_shows_sixteen_rows(kind, corpus, made, checked, tmp_path):
    sheets = []
    for name, seed in ("a", 0), ("b", 0), ("c", 1):
        checked(corpus / kind, sheet=f"{tmp_path}/{name}.png", seed=seed)
        with Image.open(tmp_path / f"{name}.png") as sheet:
            assert sheet.format == "PNG" and sheet.width == 1200 and 1000 < sheet.height < 1600
            sheets.append(np.asarray(sheet).astype(int))
    assert np.array_equal(sheets[0], sheets[1]) and not np.array_equal(sheets[0], sheets[2])
    tiles = [tile for line in np.split(sheets[0], 4) for tile in np.split(line, 4, axis=1)]
    assert all(tile[4:-4, 4:-4].min() < 150 for tile in tiles), "a blank tile"
    red = [np.abs(tile - (250, 10, 10)).max(2) < 30 for tile in tiles]
    assert sum(tile.sum() > 5000 for tile in red) >= (16 if kind == "good.jsonl" else 5)


def test_a_row_with_a_picture_is_shown_token_by_token(corpus, tmp_path):
    found = row("red.png", "What <|end|>\n<image>", "Rëd.", "And now?", "Still red.", id="x7")
    (tmp_path / "a.json").write_text(json.dumps([planted()["good"][0], found]))
    said = run("prepare.py", "check", tmp_path / "a.json", "--show=2", f"--tokenizer={corpus}",
               f"--image_root={corpus}/pictures", "--patches=16").out.splitlines()
    tokenizer = tokenizers.load(corpus)
    chat = tokenizers.render(tokenizer, [
        {"role": ("user", "assistant")[i % 2], "content": turn["value"]}
        for i, turn in enumerate(found["conversations"])], 1)
    assert said[0].startswith(f"a.json:2 (id x7): {len(chat.ids)} ids, 1 of them a picture, "
                              f"{len(chat.ids) + 15} positions, {sum(chat.supervised)} of them")
    shown, at = [line.split(maxsplit=3) for line in said[3:]], 0
    assert [int(line[1]) for line in shown] == chat.ids
    assert [line[2] == "yes" for line in shown] == chat.supervised
    for i, (where, _, _, text) in zip(chat.ids, shown, strict=True):
        if i == tokenizer.image:
            assert (where, text) == (f"{at}-{at + 15}", "<|image|> x 16")
        else:
            assert where == str(at)
            assert (text in tokenizer.specials) == (i in tokenizer.specials.values())
        at += 16 if i == tokenizer.image else 1


def test_a_row_of_a_folder_of_ours_is_shown_too(made):
    n_train = len(Chats(made, "train"))
    for number, name in (1, "train:1"), (n_train, f"train:{n_train}"), (n_train + 1, "val:1"):
        said = run("prepare.py", "check", made, f"--show={number}").out
        assert said.startswith(f"{name}: ") and "<|assistant|>" in said


# ------------------------------------------------------------------------------ what makes no sense


def test_what_cannot_be_checked_is_refused_in_a_sentence(corpus, made, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "picture.jsonl").write_bytes(encoded(Image.new("RGB", (9, 9))))
    (tmp_path / "words.json").write_text("some words")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text/manifest.json").write_text("{}")
    shutil.copytree(made, tmp_path / "sets/chats")
    (tmp_path / "sets/manifest.json").write_text("{}")
    for data, sentence in {
        "no.json": "no file matches", "empty.jsonl": "holds no rows",
        "empty.json": "is not a JSON list", "picture.jsonl": "is not JSON",
        "words.json": "is not a JSON list", "folder": "has no manifest.json",
        "text": "holds no chats; check looks at", "sets": "name one of the folders in it: chats",
    }.items():
        said = run("prepare.py", "check", tmp_path / data, f"--tokenizer={corpus}", "--sheet=")
        assert sentence in said.refusal and str(tmp_path / data) in said.refusal
    rows = corpus / "rows.jsonl"
    for flag, sentence in {
        "--show=21": "cannot be used: a missing image", "--show=999": "has fewer rows than that",
        "--context=0": "--context=0 is too small", "--items=-1": "--items=-1 is too small",
        "--sheet=no/such/sheet.png": "no folder for no/such/sheet.png",
        "--image_root=nowhere": "nowhere", "--tokenizer=nowhere": "no tokenizer at nowhere",
        "--contxt=5": "did you mean context?", "--dataset=x": "say only one",
    }.items():
        usual = [f"--tokenizer={corpus}", f"--image_root={corpus}/pictures", "--sheet="]
        assert sentence in run("prepare.py", "check", rows, *usual, flag).refusal
    assert "say which files" in run("prepare.py", "check").refusal
