"""The claims of prepare.py: nothing of a data set is lost, changed or left out in silence."""

import io
import itertools
import json
import os
import random
import re
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import DEMO, ROOT, run
from PIL import Image
from test_resumable import many_rows

from common.checkpoint import sums
from common.config import UserError
from data import Chats, ImageSpec
from prep import toy_dataset, toy_images, writers
from prep.sources import Files, pieces, retried
from tokenizer import load
from train.packing import Captions


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """The folder of a small tokenizer; byte-level, so that it spells everything."""
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "story.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    prepared("text", f"--files={folder}/story.txt", "--vocabulary=300", f"--out={folder}/text")
    return folder / "text"


def prepared(*argv):
    """What a command of prepare.py prints that works."""
    result = run("prepare.py", *argv)
    assert (result.status, result.err) == (0, ""), result.err
    return result.out


def documents(folder, split):
    """The texts of a split, decoded."""
    tokenizer = load(folder)
    ids = np.concatenate([np.load(path) for path in sorted(Path(folder).glob(f"{split}_*.npy"))])
    assert ids.dtype == np.uint16 and ids[0] == tokenizer.end_of_text
    parts = np.split(ids, np.flatnonzero(ids == tokenizer.end_of_text))[1:]
    return [tokenizer.decode(part[1:]) for part in parts]


def chats(folder, split="train"):
    """[(the whole chat, what the assistant has to learn of it)] of a split, decoded."""
    tokenizer, found = load(folder), Chats(folder, split)
    decoded = []
    for i in range(len(found)):
        ids, supervised = found.chat(i)
        decoded.append((tokenizer.decode(ids), tokenizer.decode(ids[supervised])))
    return decoded


def write_rows(path, rows):
    """Rows as .jsonl, .json or .parquet, by the path's ending."""
    if path.suffix == ".parquet":
        columns = {name: [row.get(name) for row in rows] for row in rows for name in row}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    else:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text("".join(lines), encoding="utf-8")
    return path


# -------------------------------------------------------------------------------------------- text

TEXTS = ["The fox ran.", "Füchse 🦊 laufen.\n\nSehr schnell.", "  spaces  and\ttabs \n",
         "Nobody can type a <|endoftext|> or a <|user|>.", "x" * 5000]


@pytest.mark.parametrize("ending", ["txt", "jsonl", "json", "parquet"])
def test_every_document_survives_as_it_is(ending, vocabulary, tmp_path):
    if ending == "txt":
        for number, text in enumerate(TEXTS):
            (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8", newline="")
    else:
        write_rows(tmp_path / f"all.{ending}", [{"text": text, "id": 1} for text in TEXTS])
    files = f"{tmp_path}/*.{ending}"
    said = prepared("text", f"--files={files}", f"--val_files={files}",
                    f"--tokenizer={vocabulary}", f"--out={tmp_path}/out")
    assert sorted(documents(tmp_path / "out", "train")) == sorted(TEXTS)
    assert documents(tmp_path / "out", "val") == TEXTS
    assert f"{len(TEXTS)} documents" in said and "left out" not in said


def test_a_vocabulary_of_ones_own_is_learnt_from_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("gnorf blick gnorf blick gnorf. " * 50)
    prepared("text", f"--files={tmp_path}/a.txt", "--vocabulary=280", f"--out={tmp_path}/out")
    tokenizer = load(tmp_path / "out")
    assert len(tokenizer.encode("gnorf blick")) < 11
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["tokenizer"] == tokenizer.fingerprint and tokenizer.n_vocab == 320


def test_another_field_several_patterns_and_small_shards(vocabulary, tmp_path):
    rows = [{"body": f"Story {i}."} for i in range(40)]
    write_rows(tmp_path / "a.jsonl", rows[:20])
    write_rows(tmp_path / "b.parquet", rows[20:])
    prepared("text", f"--files={tmp_path}/*.jsonl, {tmp_path}/*.parquet", "--field=body",
             "--val_share=0.1", "--shard_tokens=50", f"--tokenizer={vocabulary}",
             f"--out={tmp_path}/out")
    shards = sorted((tmp_path / "out").glob("train_*.npy"))
    assert len(shards) > 2 and {len(np.load(path)) for path in shards[:-1]} == {50}
    train, val = (documents(tmp_path / "out", split) for split in ("train", "val"))
    assert len(val) == 4
    assert sorted(train + val) == sorted(row["body"] for row in rows)
    assert train != sorted(train)  # shuffled


def test_rows_without_text_are_counted_and_named(vocabulary, tmp_path):
    path = tmp_path / "a.jsonl"
    write_rows(path, [{"text": "good"}, {"text": " "}, {"title": "no text"}, ["text"],
                      {"text": "fine"}])
    with open(path, "ab") as file:
        file.write(b'{"text": "cut\n{"text": "\xff\xfe"}\n\n{"text": "last"}')
    said = prepared("text", f"--files={path}", f"--val_files={path}", f"--tokenizer={vocabulary}",
                    f"--out={tmp_path}/out")
    assert sorted(documents(tmp_path / "out", "train")) == ["fine", "good", "last"]
    assert re.search(r"left out \d+ rows: no text in the field text \(a.jsonl:2, a.jsonl:3, "
                     r"a.jsonl:4", said)
    assert re.search(r"left out \d+ rows: not a line of JSON \(a.jsonl:6, a.jsonl:7", said)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["left_out"]["no text in the field text"] == {
        "rows": 6, "first": ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4", "a.jsonl:2", "a.jsonl:3"]}


def test_where_nothing_can_be_used_the_reasons_are_said_too(vocabulary, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"titel": "x"}, {"titel": "y"}])
    for command, reason in ("text", "no text in the field text"), ("chat", "a turn without text"):
        result = run("prepare.py", command, f"--files={path}", f"--tokenizer={vocabulary}",
                     f"--out={tmp_path}/out")
        assert f"{path} holds no" in result.refusal
        where = re.search(rf"left out 2 rows: {reason} \((.*), (.*)\)", result.out)
        assert set(where.groups()) == {"a.jsonl:1", "a.jsonl:2"}


@pytest.mark.parametrize("texts", [["One long tale. " * 100], ["One.", "Two.", "Three."]])
def test_even_a_few_documents_leave_some_for_validation(texts, vocabulary, tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    prepared("text", f"--files={tmp_path}/a.jsonl", f"--tokenizer={vocabulary}",
             f"--out={tmp_path}/out")
    train, val = (documents(tmp_path / "out", split) for split in ("train", "val"))
    assert sum(map(len, train)) > sum(map(len, val)) > 0


def test_even_a_few_chats_leave_one_for_validation(vocabulary, tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"prompt": "hi", "output": str(i)} for i in range(3)])
    prepared("chat", f"--files={tmp_path}/a.jsonl", f"--tokenizer={vocabulary}",
             f"--out={tmp_path}/out")
    assert (len(chats(tmp_path / "out")), len(chats(tmp_path / "out", "val"))) == (2, 1)


# ------------------------------------------------------------------------------------------- chats

FORMS = [
    {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]},
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]},
    {"instruction": "hello", "response": "hi"},
    {"prompt": "hello", "output": "hi"},
]
HELLO = ("<|endoftext|><|user|>hello<|end|><|assistant|>hi<|end|>", "hi<|end|>")


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_every_form_of_a_chat_becomes_the_same_ids(ending, vocabulary, tmp_path):
    write_rows(tmp_path / f"a.{ending}", FORMS)
    files = f"{tmp_path}/a.{ending}"
    said = prepared("chat", f"--files={files}", f"--val_files={files}",
                    f"--tokenizer={vocabulary}", f"--out={tmp_path}/out")
    assert chats(tmp_path / "out") == chats(tmp_path / "out", "val") == [HELLO] * 4
    assert "train: 4 chats" in said and "left out" not in said


def test_longer_chats_keep_every_turn(vocabulary, tmp_path):
    turns = [("system", "be kind"), ("user", "1"), ("assistant", "one"), ("user", "2 <|end|>"),
             ("assistant", "two"), ("user", "still there?")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]},
            {"instruction": "add", "input": "1 and 2", "output": "3"}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    prepared("chat", f"--files={path}", f"--val_files={path}", f"--tokenizer={vocabulary}",
             f"--out={tmp_path}/out")
    assert chats(tmp_path / "out") == [
        ("<|endoftext|><|system|>be kind<|end|><|user|>1<|end|><|assistant|>one<|end|>"
         "<|user|>2 <|end|><|end|><|assistant|>two<|end|>", "one<|end|>two<|end|>"),
        ("<|endoftext|><|user|>add\n1 and 2<|end|><|assistant|>3<|end|>", "3<|end|>")]
    ids, tokenizer = Chats(tmp_path / "out", "train").chat(0)[0], load(vocabulary)
    assert np.count_nonzero(ids == tokenizer.end) == 5  # the typed <|end|> is ordinary text


def test_chats_that_cannot_be_used_are_counted_and_named(vocabulary, tmp_path):
    bad = [
        {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"},
                      {"role": "assistant", "content": "c"}]},
        {"messages": [{"role": "user", "content": "hello"}]},
        {"conversations": []},
        {"instruction": "hello", "response": " "},
        {"instruction": "hello"},
        {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "hi"}]},
        {"messages": "hello"}, {"messages": ["hello", "hi"]}, ["hello"], "hello", 7, None,
        {"conversations": [{"from": "human", "value": 7}, {"from": "gpt", "value": "hi"}]},
        {"conversations": [{"from": "martian", "value": "x"}, {"from": "gpt", "value": "hi"}]},
        {"instruction": ["hello"], "response": "hi"},
    ]
    path = write_rows(tmp_path / "a.jsonl", [FORMS[0], *bad, FORMS[1]])
    with open(path, "ab") as file:
        file.write(b'not JSON\n{"prompt": "\xff", "output": "hi"}\n')
        file.write(json.dumps(FORMS[2]).encode())
    write_rows(tmp_path / "val.jsonl", FORMS[:1])
    said = prepared("chat", f"--files={path}", f"--val_files={tmp_path}/val.jsonl",
                    f"--tokenizer={vocabulary}", f"--out={tmp_path}/out")
    assert chats(tmp_path / "out") == [HELLO] * 3
    left_out = dict(re.findall(r"left out (?:\d+) rows: (.*) \((.*)\)", said))
    assert sum(map(int, re.findall(r"left out (\d+) rows", said))) == len(bad) + 2
    assert left_out["not a line of JSON"] == "a.jsonl:19, a.jsonl:20"
    assert "a.jsonl:2, a.jsonl:3" in left_out["turns out of order"]
    assert "a.jsonl:6" in left_out["an empty answer"]
    assert not re.search("object has no|must be|NoneType|expected str", said), "Python's own words"


def test_gpt2_is_the_usual_vocabulary(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", FORMS)
    prepared("chat", f"--files={path}", f"--val_files={path}", f"--out={tmp_path}/out")
    ids = Chats(tmp_path / "out", "train").chat(0)[0]
    assert ids.tolist() == [50256, 50258, 31373, 50260, 50259, 5303, 50260]
    assert not (tmp_path / "out/tokenizer.json").exists()
    assert json.loads((tmp_path / "out/manifest.json").read_text())["tokenizer_name"] == "gpt2"


def test_validation_chats_are_drawn_by_the_seed_and_not_trained_on(vocabulary, tmp_path):
    path = write_rows(tmp_path / "a.jsonl",
                      [{"prompt": f"say {i}", "output": str(i)} for i in range(50)])
    seen = []
    for name, seed in ("a", 1), ("b", 1), ("c", 2):
        prepared("chat", f"--files={path}", "--val_share=0.1", f"--tokenizer={vocabulary}",
                 f"--out={tmp_path}/{name}", f"--seed={seed}")
        train, val = (chats(tmp_path / name, split) for split in ("train", "val"))
        assert (len(train), len(val)) == (45, 5) and not set(train) & set(val)
        held = np.sort(np.random.default_rng(seed).permutation(50)[:5])
        assert [learnt for _, learnt in val] == [f"{i}<|end|>" for i in held]
        seen.append(sums(tmp_path / name))
    assert seen[0] == seen[1] != seen[2]


# ---------------------------------------------------------------------------------------- pictures


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pictures():
    """{name: bytes} of pictures as they are found in the wild, all of them mostly red."""
    red = Image.new("RGB", (40, 20), (250, 10, 10))
    upright = red.copy()
    upright.paste((10, 10, 250), (20, 0, 40, 20))  # blue on the right: below, once it is turned
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = Image.new("P", (40, 20), 1)
    palette.putpalette([0, 0, 0, 250, 10, 10])
    palette.paste(0, (0, 0, 20, 20))
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    return {
        "red.png": encoded(red, "PNG"), "red.webp": encoded(red, "WEBP"),
        "gif.jpg": encoded(red, "GIF"), "cmyk.jpg": encoded(red.convert("CMYK"), "JPEG"),
        "turned.jpg": encoded(upright, "JPEG", exif=exif, quality=95),
        "palette.png": encoded(palette, "PNG", transparency=0),
        "16bit.png": encoded(Image.fromarray(ramp), "PNG"),
        "thin.png": encoded(Image.new("RGB", (900, 1), (250, 10, 10)), "PNG"),
        "cut.jpg": encoded(noise, "JPEG")[:1000],
        "cut.png": encoded(noise, "PNG")[:1000], "text.jpg": b"not a picture", "empty.jpg": b"",
        "large.png": encoded(Image.new("1", (8000, 6251)), "PNG"),
        "larger.png": encoded(Image.new("1", (8000, 7000)), "PNG"),
    }


def asked(name, text="<image>\nWhat?"):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "Red."}]
    return {"id": 1, "image": name, "conversations": turns}


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """A folder with pictures/, the same in pictures.zip, and val.json, a good row."""
    folder = tmp_path_factory.mktemp("album")
    (folder / "pictures").mkdir()
    with zipfile.ZipFile(folder / "pictures.zip", "w") as archive:
        for name, content in pictures().items():
            (folder / "pictures" / name).write_bytes(content)
            archive.writestr(f"inside/{name}", content)
    write_rows(folder / "val.json", [asked("red.png")])
    return folder


def album_set(album, vocabulary, rows, out, root="pictures"):
    """prepare.py images on some rows; returns (the train split, what it printed)."""
    path = write_rows(out.with_name("rows.json"), list(rows))
    said = prepared("images", f"--files={path}", f"--val_files={album}/val.json",
                    f"--image_root={album}/{root}", "--image_size=32", f"--out={out}",
                    f"--tokenizer={vocabulary}")
    return Chats(out, "train"), said


@pytest.mark.parametrize("root", ["pictures", "pictures.zip"])
def test_pictures_from_the_wild_arrive_as_one_sees_them(root, album, vocabulary, tmp_path):
    names = ["red.png", "red.webp", "gif.jpg", "cmyk.jpg", "turned.jpg", "palette.png",
             "16bit.png", "thin.png"]
    found, said = album_set(album, vocabulary, map(asked, names), tmp_path / "out", root)
    assert "left out" not in said and len(found) == len(names)
    seen = {}
    for i, name in enumerate(names):
        (image,) = found.images(i)
        assert image.size == (32, 32) and image.mode == "RGB"
        seen[name] = np.asarray(image).astype(int)

    def shows(name, x, y, colour, within=30):
        assert np.abs(seen[name][y, x] - colour).max() < within, (name, seen[name][y, x])

    grey, red, blue = (122, 116, 104), (250, 10, 10), (10, 10, 250)
    for name in "red.png", "red.webp", "gif.jpg", "cmyk.jpg":
        shows(name, 16, 16, red, 60 if name == "cmyk.jpg" else 30)
        shows(name, 16, 3, grey)  # wider than high: padded above and below
    shows("turned.jpg", 16, 6, red)
    shows("turned.jpg", 16, 26, blue)
    shows("turned.jpg", 2, 16, grey)
    shows("palette.png", 6, 16, (255, 255, 255))
    shows("palette.png", 26, 16, red)
    for y in (2, 16, 30):
        shows("16bit.png", 16, y, (y * 8, y * 8, y * 8))


def test_a_zip_and_its_folder_give_the_same_data(album, vocabulary, tmp_path):
    rows = [asked(name) for name in ("red.png", "gif.jpg", "cut.jpg")]
    for root in "pictures", "pictures.zip":
        album_set(album, vocabulary, rows, tmp_path / root, root)
    assert sums(tmp_path / "pictures") == sums(tmp_path / "pictures.zip")


@pytest.mark.parametrize("root", ["pictures", "pictures.zip"])
def test_a_picture_elsewhere_is_found_by_its_base_name(root, album, vocabulary, tmp_path):
    rows = [asked("coco/train2017/red.png"), asked("/content/drive/gif.jpg")]
    found, said = album_set(album, vocabulary, rows, tmp_path / "out", root)
    assert "left out" not in said and [len(found.images(i)) for i in range(2)] == [1, 1]


@pytest.mark.parametrize("root", ["pictures", "pictures.zip"])
def test_pictures_that_cannot_be_used_are_counted_and_named(root, album, vocabulary, tmp_path):
    rows = [asked(name) for name in (
        "red.png", "missing.jpg", "cut.jpg", "cut.png", "text.jpg", "empty.jpg", "large.png",
        "larger.png", ["red.png", "gif.jpg"], {"bytes": None}, "data:image/png;base64," + "A" * 999,
        "", "gif.jpg")]
    rows += [asked("red.png", "<image> and <image>?"), asked("gif.jpg", "No mark?")]
    found, said = album_set(album, vocabulary, rows, tmp_path / "out", root)
    assert [len(found.images(i)) for i in range(len(found))] == [1, 1, 1]
    left_out = {reason: (int(n), where) for n, reason, where in
                re.findall(r"left out (\d+) rows: (.*) \((.*)\)", said)}
    assert left_out["a missing image"][1].startswith("rows.json:2")
    assert left_out["a truncated image"] == (2, "rows.json:3, rows.json:4")
    assert left_out["an unreadable image"] == (2, "rows.json:5, rows.json:6")
    assert left_out["an image that is too large"] == (2, "rows.json:7, rows.json:8")
    assert left_out["images and <image> marks do not match"][0] == 3
    assert left_out["an image that is neither a name nor bytes"] == (1, "rows.json:10")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())["left_out"]
    assert {reason: n for reason, (n, _) in left_out.items()} == {
        reason: entry["rows"] for reason, entry in manifest.items()}
    assert manifest["a missing image"]["first"] == ["rows.json:2", "rows.json:11"]
    assert not re.search(r"\.(png|jpg)", " ".join(left_out)), "a reason for each name"
    assert not re.search("object has no|unhashable|PathLike|Errno", said), "Python's own words"


def test_a_damaged_zip_loses_the_damaged_pictures_alone(album, vocabulary, tmp_path):
    noise = np.random.default_rng(0).integers(0, 8, (64, 64, 3), np.uint8)
    whole = encoded(Image.fromarray(noise), "BMP")
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(20):
            archive.writestr(f"{i}.bmp", whole)
        archive.write(album / "pictures/red.png", "red.png")  # the validation row's
        starts = [info.header_offset for info in archive.infolist()]
    content = bytearray((tmp_path / "a.zip").read_bytes())
    for i, start in enumerate(starts[:10]):  # ten pictures damaged, at different places
        content[start + 40 + 17 * i] ^= 255
    (tmp_path / "a.zip").write_bytes(content)
    rows = [asked(f"{i}.bmp") for i in range(20)]
    root = os.path.relpath(tmp_path / "a.zip", album)
    found, said = album_set(album, vocabulary, rows, tmp_path / "out", root)
    assert len(found) == 10 and "left out 10 rows: an unreadable image" in said


def test_a_row_without_a_picture_is_a_chat_about_text(album, vocabulary, tmp_path):
    rows = [asked("red.png"), FORMS[0], asked("red.png", "Say <image> what?"),
            {"image_path": "/home/gif.jpg", "caption": "a red one"}]
    album_set(album, vocabulary, rows, tmp_path / "out")
    assert [chat for chat, _ in chats(tmp_path / "out")] == [
        "<|endoftext|><|user|><|image|>What?<|end|><|assistant|>Red.<|end|>", HELLO[0],
        "<|endoftext|><|user|>Say <|image|> what?<|end|><|assistant|>Red.<|end|>",
        "<|endoftext|><|user|><|image|><|end|><|assistant|>a red one<|end|>"]
    found = Chats(tmp_path / "out", "train")
    assert [len(found.images(i)) for i in range(4)] == [1, 0, 1, 1]
    assert len(Captions(found, load(vocabulary), ImageSpec(1, 32), 16)) == 3


# ---------------------------------------------------------------------------------- where rows are


def test_a_data_set_gives_what_its_files_give(vocabulary, tmp_path):
    (tmp_path / "stories").mkdir()
    many_rows(tmp_path / "stories/train.parquet")
    write_rows(tmp_path / "stories/test.parquet", [{"text": "Only one."}, {"text": "Or two."}])
    usual = (f"--tokenizer={vocabulary}", "--val_share=0.1")
    for command in "text", "chat":
        for name, source in {"set": f"--dataset={tmp_path}/stories",
                             "file": f"--files={tmp_path}/stories/train.parquet"}.items():
            prepared(command, source, *usual, f"--out={tmp_path}/{command}_{name}")
        assert sums(tmp_path / f"{command}_set") == sums(tmp_path / f"{command}_file")
    prepared("text", f"--dataset={tmp_path}/stories", "--split=test", f"--tokenizer={vocabulary}",
             f"--out={tmp_path}/test")
    assert sorted(documents(tmp_path / "test", "train") + documents(tmp_path / "test", "val")) == [
        "Only one.", "Or two."]


def test_a_data_set_that_is_not_there_is_named_with_what_was_asked(vocabulary, tmp_path):
    (tmp_path / "stories").mkdir()
    write_rows(tmp_path / "stories/train.parquet", [{"text": "Only one."}])
    for flag in f"--dataset={tmp_path}/no", f"--dataset={tmp_path}/stories --split=no":
        result = run("prepare.py", "text", *flag.split(), f"--tokenizer={vocabulary}",
                     f"--out={tmp_path}/out")
        assert f"cannot read the data set {tmp_path}/" in result.refusal


def test_a_network_that_fails_is_tried_again_behind_the_last_row():
    opened, said = [], []

    def rows(skip):
        opened.append(skip)
        for number in range(skip, 10):
            if number in (3, 7) and opened.count(number) < 2:
                raise ConnectionError(f"reset by peer\nat {number}")
            yield number

    found = list(retried(rows, 0, "books", waits=(0, 0), say=said.append))
    assert found == list(range(10)) and opened == [0, 3, 3, 7, 7]
    assert said[0] == "books, row 4: ConnectionError reset by peer; trying again in 0 s"
    opened.clear()
    with pytest.raises(UserError, match=r"books, row 4.*the same command goes on from"):
        list(retried(rows, 0, "books", waits=(0,), say=said.append))


def test_no_more_documents_than_asked_for(vocabulary, tmp_path):
    many_rows(tmp_path / "a.jsonl", 2000)
    prepared("text", f"--files={tmp_path}/a.jsonl", f"--tokenizer={vocabulary}",
             "--max_documents=110", f"--out={tmp_path}/out")
    found = [*documents(tmp_path / "out", "train"), *documents(tmp_path / "out", "val")]
    assert len(found) == 110 and {text.split()[1] for text in found} == {
        f"{i}." for i in range(111) if i != 100}
    prepared("chat", f"--files={tmp_path}/a.jsonl", f"--tokenizer={vocabulary}",
             "--max_chats=50", f"--out={tmp_path}/chats")
    assert len(Chats(tmp_path / "chats", "train")) + len(Chats(tmp_path / "chats", "val")) == 50


@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
def test_a_long_text_in_pieces_gives_the_ids_of_the_whole(kind, vocabulary, tmp_path, monkeypatch):
    monkeypatch.setattr("prep.sources.BLOCK", 5000)
    rng = random.Random(0)
    words = ["fox", " ", "  ", "\n", "\n\n", "\t ", "it's", "42", "!?", "\u00a0", "ü🦊", "\u2003",
             "\x1c", "\u0085", "don't", "9 lives", ". "]
    text = "".join(rng.choice(words) for _ in range(50_000))
    tokenizer = load("gpt2" if kind == "gpt2" else vocabulary)
    parts = list(pieces([text]))
    assert len(parts) > 10 and "".join(parts) == text
    assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(text)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "b.txt").write_text("", encoding="utf-8")
    write_rows(tmp_path / "a.jsonl", [{"text": (tmp_path / "a.txt").read_text(encoding="utf-8")}])
    for ending in "txt", "jsonl":
        said = prepared("text", f"--files={tmp_path}/*.{ending}", "--val_share=0",
                        f"--tokenizer={'gpt2' if kind == 'gpt2' else vocabulary}",
                        f"--out={tmp_path}/{ending}")
        assert ("left out 1 rows: an empty file (b.txt:1)" in said) == (ending == "txt")
    assert sums(tmp_path / "txt") == sums(tmp_path / "jsonl")


def test_a_json_list_of_any_length_is_read_row_by_row(tmp_path, monkeypatch):
    rows = [{"text": "ü" * (i % 50), "n": [i, {"x": None}]} for i in range(300)] + [1.5, "a", None]
    path = tmp_path / "a.json"
    for text in json.dumps(rows), json.dumps(rows, indent=1), json.dumps(rows, ensure_ascii=False):
        path.write_text(f" {text}\n", encoding="utf-8")
        for block in 1, 7, 100, 10**6:
            monkeypatch.setattr("prep.sources.BLOCK", block)
            assert [row for _, row, _ in Files(str(path)).rows()] == rows
            assert [where for where, _, _ in Files(str(path)).rows(300)] == [
                f"a.json:{n}" for n in (301, 302, 303)]
    for text in "", "[", "[1, 2", '[{"a": 1}, {"b"', "[1 2] 3]", '"rows"', "[" * 100_000:
        path.write_text(text)
        if text != "[1 2] 3]":
            with pytest.raises(UserError, match=str(path)):
                list(Files(str(path)).rows())


@pytest.mark.parametrize("skip", [0, 1, 256, 299, 300, 301, 599])
def test_skipping_rows_skips_just_those(skip, tmp_path):
    rows = [{"text": f"{i}"} for i in range(300)]
    for name in "a.parquet", "b.jsonl", "c.json":
        write_rows(tmp_path / name, rows)
    source = Files(f"{tmp_path}/a.parquet,{tmp_path}/b.jsonl,{tmp_path}/c.json")
    every = [where for where, _, _ in source.rows()]
    assert len(every) == 900 and every[299:301] == ["a.parquet:300", "b.jsonl:1"]
    assert [where for where, _, _ in source.rows(skip)] == every[skip:]


# -------------------------------------------------------------------------------------- the columns

GOOD = {"instruction": "hello", "response": "hi", "uuid": "a", "input_quality": "good",
        "instruct_reward": -1.5, "min_neighbor_distance": 0.1, "repeat_count": 1,
        "min_similar_uuid": None, "llama_guard_2": "safe", "language": "EN"}
POOR = {
    "input quality below average": {"input_quality": "poor"},
    "instruct reward below -10": {"instruct_reward": -10.5},
    "a near-copy of another row": {"min_similar_uuid": "b"},
    "a language other than EN": {"language": "ZH"},
    "not marked as safe": {"llama_guard_2": "unsafe\nS1"},
}


def test_poor_chats_are_left_out_by_their_columns_and_counted(vocabulary, tmp_path):
    kept = [GOOD, {**GOOD, "min_similar_uuid": "a", "repeat_count": 2}, {**GOOD, "language": "en"},
            {**GOOD, "input_quality": "average"}, {**GOOD, "instruct_reward": None},
            {name: None if name not in FORMS[2] else value for name, value in GOOD.items()},
            {**GOOD, "input_quality": ["strange"], "instruct_reward": "high", "language": 7}]
    path = write_rows(tmp_path / "a.jsonl", [*kept, *({**GOOD, **poor} for poor in POOR.values())])
    write_rows(tmp_path / "val.jsonl", FORMS[:1])
    argv = ("chat", f"--files={path}", f"--val_files={tmp_path}/val.jsonl",
            f"--tokenizer={vocabulary}", f"--out={tmp_path}/out")
    said = prepared(*argv)
    for number, reason in enumerate(POOR, 8):
        assert f"left out 1 rows: {reason} (a.jsonl:{number})" in said
    assert len(Chats(tmp_path / "out", "train")) == len(kept)
    said = prepared(*argv, "--min_quality=very poor", "--min_reward=-99", "--language=",
                    "--drop_duplicates=False", "--safe_only=False")
    assert len(Chats(tmp_path / "out", "train")) == 12 and "left out" not in said
    prepared(*argv, "--min_quality=good")
    assert len(Chats(tmp_path / "out", "train")) == len(kept) - 1


# ----------------------------------------------------------------------------- what makes no sense

SENSELESS = {
    "text": ["--shard_tokens=0", "--shard_tokens=-5", "--val_share=1", "--val_share=-0.1",
             "--val_share=nan", "--seed=-1", "--vocabulary=261", "--vocabulary=-3",
             "--max_documents=-1", "--dataset=books", "--out={tmp}/a.jsonl",
             "--out={tmp}/a.jsonl/x", "--out=/proc/x"],
    "chat": ["--val_share=2", "--max_chats=-1", "--seed=-7"],
    "images": ["--image_size=0", "--image_size=-3"],
    "demo": ["--vocabulary=100", "--image_size=0", "--held_out=0", "--captions=0", "--stories=-1",
             "--questions=0"],
    "fineweb": ["--shards=-1"],
}


@pytest.mark.parametrize("command, flag", [(command, flag) for command, flags in SENSELESS.items()
                                           for flag in flags])
def test_values_that_make_no_sense_are_refused_by_name(command, flag, vocabulary, tmp_path):
    row = {"text": "The fox.", "prompt": "a", "output": "b"}
    path = write_rows(tmp_path / "a.jsonl", [row] * 9)
    argv = [command, f"--out={tmp_path}/out", flag.format(tmp=tmp_path)]
    argv += [f"--files={path}"] * (command not in ("demo", "fineweb"))
    argv += [f"--tokenizer={vocabulary}"] * (command in ("text", "chat", "images"))
    argv += [f"--image_root={tmp_path}"] * (command == "images")
    refusal = run("prepare.py", *argv).refusal
    name, value = flag.format(tmp=tmp_path).split("=")
    assert (value if name == "--out" else name) in refusal
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


@pytest.mark.parametrize("value", [True, None, 7, 1.5, ["hello"], {"a": 1}, "\udc00", "NUL \0"])
def test_values_of_another_type_are_counted_or_kept_but_end_nothing(value, vocabulary, tmp_path):
    (tmp_path / "red.png").write_bytes(pictures()["red.png"])
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
    rows = [{**row, name: value} for row in (asked("red.png"), GOOD) for name in row]
    rows += [{"messages": [{**turns[0], name: value}, turns[1]]} for name in turns[0]]
    rows += [{"conversations": [turns[0], value]}, value, {"text": value}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [asked("red.png"), *rows]))
    good = write_rows(tmp_path / "val.json", [{**asked("red.png"), "text": "fine"}])
    for command in "text", "chat", "images":
        argv = (command, f"--files={path},{good}", f"--val_files={good}",
                f"--tokenizer={vocabulary}", f"--out={tmp_path}/{command}")
        said = prepared(*argv, *[f"--image_root={tmp_path}"] * (command == "images"))
        assert not re.search("object has no|must be|NoneType|expected str|unhashable|embedded|"
                             "codec", said), said


def test_a_growing_array_is_what_numpy_would_have_saved(tmp_path):
    for n in 0, 1, 70_000:
        values = np.arange(n).astype(np.uint16)
        array = writers.Array(tmp_path / "grown.npy", np.uint16)
        for part in np.array_split(values, 3):
            array.append(part)
        array.close()
        np.save(tmp_path / "saved.npy", values)
        assert (tmp_path / "grown.npy").read_bytes() == (tmp_path / "saved.npy").read_bytes()


# -------------------------------------------------------------------------------------------- demo

KINDS = ("captions", "scenes")
C, S = "|".join(toy_images.COLOURS), "|".join(toy_images.SHAPES)


def named(text):
    """The pairs of colour and shape that a text names."""
    text = text.lower()
    found = set(re.findall(rf"\b({C}) ({S})", text))
    return found | {(c, s) for s, c in re.findall(rf"\b({S}) (?:is )?({C})\b", text)}


def test_the_same_seed_gives_the_same_bytes_on_one_core_and_on_all(world_data, tmp_path):
    command = [sys.executable, ROOT / "prepare.py", "demo", f"--out={tmp_path}/again", *DEMO]
    pinned = {min(os.sched_getaffinity(0))}
    subprocess.run(command, check=True, capture_output=True,
                   env={**os.environ, "PYTHONHASHSEED": "7"},
                   preexec_fn=lambda: os.sched_setaffinity(0, pinned))  # one core, not all of them
    first, again = sums(world_data), sums(tmp_path / "again")
    assert len(first) > 30 and first == again


def test_another_seed_gives_other_data(world_data, tmp_path):
    prepared("demo", *DEMO, f"--out={tmp_path}/other", "--seed=1")
    first, other = sums(world_data), sums(tmp_path / "other")
    same = {name for name in first if first[name] == other[name]}
    assert {Path(name).name for name in same if "test" not in name} == {
        "first_image.npy"}  # one image a chat, always


def test_only_the_test_seed_changes_the_test_split(world_data, tmp_path):
    prepared("demo", *DEMO, f"--out={tmp_path}/other", "--test_seed=7")
    first, other = sums(world_data), sums(tmp_path / "other")
    changed = {name for name in first if first[name] != other[name]}
    assert changed and all("test" in name or "manifest" in name for name in changed)
    assert {f"{kind}/test/ids.npy" for kind in ("chats", *KINDS)} <= changed
    assert "scenes/test_pairs/ids.npy" in changed and "text/test_000000.npy" in changed


def test_the_demo_has_what_was_asked_for_and_true_sums(world_data):
    assert len(documents(world_data / "text", "train")) == 400
    assert len(documents(world_data / "text", "val")) == 64
    assert len(documents(world_data / "text", "test")) == 64
    counts = {"chats/train": 150, "chats/val": 64, "chats/test": 64}
    counts |= {f"{kind}/{split}": n for kind in KINDS
               for split, n in (("train", 120), ("val", 64), ("test", 64))}
    counts |= {"scenes/val_pairs": 64, "scenes/test_pairs": 64}
    for name, n in counts.items():
        found = Chats(world_data / Path(name).parent, Path(name).name)
        pictures = [image.size for i in range(n) for image in found.images(i)]
        assert len(found) == n and pictures == ([] if "chats" in name else [(32, 32)] * n)
    for kind in "text", "chats", *KINDS:
        manifest = json.loads((world_data / kind / "manifest.json").read_text())
        assert manifest["sha256"] == sums(world_data / kind)


@pytest.mark.parametrize("kind", KINDS)
def test_training_never_names_a_held_out_pair(world_data, kind):
    for split in "train", "val", "test":
        texts = [chat for chat, _ in chats(world_data / kind, split)]
        assert not set().union(*map(named, texts)) & toy_images.HELD_OUT
        assert len(set().union(*map(named, texts))) > 15  # the check sees many pairs


def test_held_out_images_are_about_held_out_pairs(world_data):
    for split in "val_pairs", "test_pairs":
        texts = ["".join(chat) for chat in chats(world_data / "scenes", split)]
        assert sum(bool(named(text) & toy_images.HELD_OUT) for text in texts) > len(texts) / 6


def test_no_text_or_chat_is_in_two_splits(world_data):
    splits = "train", "val", "test"
    for one, other in itertools.combinations(splits, 2):
        assert not set(documents(world_data / "text", one)) & set(
            documents(world_data / "text", other))
        assert not set(chats(world_data / "chats", one)) & set(
            chats(world_data / "chats", other))


def test_validation_questions_come_one_a_picture_with_their_kinds(world_data):
    for split in "val", "val_pairs", "test", "test_pairs":
        kinds = json.loads((world_data / "scenes" / split / "groups.json").read_text())
        texts = chats(world_data / "scenes", split)
        assert len(kinds) == len(texts) == 64 and set(kinds) == set(toy_images.QUESTION_KINDS)
        for kind, (text, answer) in zip(kinds, texts, strict=True):
            assert text.count("<|user|>") == 1
            assert (answer in ("Yes.<|end|>", "No.<|end|>")) == (kind == "yes_no"), text


def test_validation_asks_every_kind_alike_and_yes_is_as_often_right_as_no():
    rng, kinds, answers = random.Random(0), Counter(), Counter()
    for _ in range(2000):
        messages, _, kind = toy_dataset.asked(rng, "train", 16)
        kinds[kind] += 1
        answers[messages[1]["content"]] += kind == "yes_no"
    assert set(kinds) == set(toy_images.QUESTION_KINDS)
    assert all(abs(n / 2000 - 1 / len(kinds)) < 0.03 for n in kinds.values())
    assert abs(answers["Yes."] / kinds["yes_no"] - 0.5) < 0.1
    assert answers["Yes."] + answers["No."] == kinds["yes_no"]
