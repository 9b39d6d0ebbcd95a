"""The claims of prepare.py: rows are converted without loss, or counted by the reason why not."""

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import DEMO, ROOT, run
from conftest import encoded as encoded  # for other files
from PIL import Image
from test_resumable import about, many_rows, prepared
from test_tokenizer import say

from common.checkpoint import sums
from common.config import UserError, seal
from data import Chats
from prep import toy_images
from prep.sources import pieces
from prep.writers import check_replaceable
from tokenizer import load


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def left_out(folder):
    """{reason: number of rows} of a data set."""
    counts = Counter()
    for reason, found in manifest(folder)["left_out"].items():
        counts[reason.split("; its columns")[0]] += found["rows"]
    return counts


def documents(folder, split):
    """The decoded texts of a split."""
    tokenizer = load(folder)
    ids = np.concatenate([np.load(path) for path in sorted(Path(folder).glob(f"{split}_*.npy"))])
    assert ids.dtype == np.uint16 and ids[0] == tokenizer.end_of_text
    parts = np.split(ids, np.flatnonzero(ids == tokenizer.end_of_text))[1:]
    return [tokenizer.decode(part[1:]) for part in parts]


def chats(folder, split="train"):
    """[(the complete chat, its supervised part)] of a split, decoded."""
    tokenizer, found = load(folder), Chats(folder, split)
    pairs = (found.chat(i) for i in range(len(found)))
    return [(tokenizer.decode(ids), tokenizer.decode(ids[supervised])) for ids, supervised in pairs]


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


def asked(name, text="<image>\nWhat?"):
    return about(name, text, "Red.", id=1)


@pytest.fixture
def usual(vocabulary, tmp_path):
    """Flags of a command that makes out with the small vocabulary; later ones replace them."""
    return f"--tokenizer={vocabulary}", f"--out={tmp_path}/out"


@pytest.mark.parametrize(("texts", "share"), [(["the fox ran " * 50], "0.0001"),
                                              (["one fox", "two foxes"], "0.9")])
def test_a_tiny_or_large_share_leaves_something_in_both_splits(texts, share, usual, tmp_path):
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    prepared("text", f"--files={tmp_path}/*.txt", *usual, f"--val_share={share}")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["train_tokens"] > 0 < manifest["val_tokens"]


KINDS = "captions", "scenes"
TEXTS = ["The fox ran.", "Füchse 🦊 laufen.\n\nSehr schnell.", "  spaces  and\ttabs \n",
         "Nobody can type a <|endoftext|> or a <|user|>.", "x" * 5000]


@pytest.mark.parametrize("ending", ["txt", "jsonl", "json", "parquet"])
def test_every_document_is_kept_unchanged(ending, usual, tmp_path):
    texts = TEXTS
    if ending == "txt":  # where <|endoftext|> separates documents
        texts = [text.replace("<|endoftext|>", "<|end|>") for text in TEXTS]
        for number, text in enumerate(texts):
            (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8", newline="")
    else:
        write_rows(tmp_path / f"all.{ending}", [{"text": text, "id": 1} for text in TEXTS])
    files = f"{tmp_path}/*.{ending}"
    said = prepared("text", f"--files={files}", f"--val_files={files}", *usual)
    assert sorted(documents(tmp_path / "out", "train")) == sorted(texts)
    assert documents(tmp_path / "out", "val") == texts
    assert f"{len(TEXTS)} documents" in said and "left out" not in said
    assert f"{len(TEXTS)} of {len(TEXTS)} validation rows equal a training row" in said


@pytest.mark.parametrize("command, read", [("text", documents), ("chat", chats)])
def test_equal_rows_stay_on_one_side_of_the_split(command, read, usual, tmp_path):
    rows = [{"text": f"Story {i}.", "prompt": f"say {i}", "output": "it"} for i in range(500)] * 2
    path = write_rows(tmp_path / "a.jsonl", random.Random(0).sample(rows, len(rows)))
    said = prepared(command, f"--files={path}", "--val_share=0.1", *usual)
    train, val = (read(tmp_path / "out", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (900, 100) and not set(train) & set(val)
    assert "1,000 of 1,000 rows equal another or show its image: they stay" in said
    assert sum(a == b for a, b in itertools.pairwise(train)) < 10  # copies are not neighbours


def test_several_patterns_another_field_a_vocabulary_and_small_shards(tmp_path):
    rows = [{"body": f"Gnorf gnorf {i}."} for i in range(40)]
    write_rows(tmp_path / "a.jsonl", rows[:20])
    write_rows(tmp_path / "b.parquet", rows[20:])
    prepared("text", f"--files={tmp_path}/*.jsonl, {tmp_path}/*.parquet", "--field=body",
             "--val_share=0.1", "--shard_tokens=50", "--vocabulary=280", f"--out={tmp_path}/out")
    shards = sorted((tmp_path / "out").glob("train_*.npy"))
    assert len(shards) > 2 and {len(np.load(path)) for path in shards[:-1]} == {50}
    train, val = (documents(tmp_path / "out", split) for split in ("train", "val"))
    assert len(val) == 4 and sorted(train + val) == sorted(row["body"] for row in rows)
    assert train != sorted(train)  # shuffled
    tokenizer = load(tmp_path / "out")
    assert len(tokenizer.encode("gnorf gnorf")) < 6 and tokenizer.n_vocab == 320
    assert manifest(tmp_path / "out")["tokenizer"] == tokenizer.fingerprint


def test_even_few_documents_leave_some_for_validation(usual, tmp_path):
    argv = "text", f"--files={tmp_path}/a.jsonl", *usual
    write_rows(tmp_path / "a.jsonl", [{"text": text} for text in ("One.", "Two.", "3.")])
    prepared(*argv)
    assert [len(documents(tmp_path / "out", split)) for split in ("train", "val")] == [2, 1]
    write_rows(tmp_path / "a.jsonl", [{"text": "Always the same."}] * 3)
    assert "no document is left for validation" in run("prepare.py", *argv).refusal


def test_only_the_first_rows_are_used(usual, tmp_path):
    files = f"--files={many_rows(tmp_path / 'a.jsonl', 2000)}"
    prepared("text", files, "--max_documents=110", *usual)
    found = [*documents(tmp_path / "out", "train"), *documents(tmp_path / "out", "val")]
    assert sorted(int(text.split()[1][:-1]) for text in found) == [
        i for i in range(111) if i != 100]  # row 100 has no text
    prepared("chat", files, "--max_chats=50", *usual, f"--out={tmp_path}/chats")
    assert sum(len(Chats(tmp_path / "chats", split)) for split in ("train", "val")) == 50


@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
def test_a_long_text_encoded_in_pieces_has_the_same_ids(kind, vocabulary, tmp_path, monkeypatch):
    monkeypatch.setattr("prep.sources.BLOCK", 5000)
    monkeypatch.setattr("prep.convert.LONG", 50_000)
    rng = random.Random(0)
    words = ["fox", " ", "  ", "\n", "\n\n", "\t ", "it's", "42", "!?", "\u00a0", "ü🦊", "\u2003",
             "\x1c", "\u0085", "don't", "9 lives", ". "]
    text = "".join(rng.choice(words) for _ in range(50_000))
    name = "gpt2" if kind == "gpt2" else vocabulary
    parts, tokenizer = list(pieces(text)), load(name)
    assert len(parts) > 10 and "".join(parts) == text
    ids = tokenizer.encode(text)
    assert [i for part in parts for i in tokenizer.encode(part)] == ids
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "b.txt").write_text("", encoding="utf-8")
    prepared("text", f"--files={tmp_path}/*.txt", "--val_share=0.1", f"--tokenizer={name}",
             f"--out={tmp_path}/out")
    train, val = (np.load(tmp_path / f"out/{split}_000000.npy") for split in ("train", "val"))
    assert [*train[1:], *val[1:]] == [*ids] and train[0] == val[0] == tokenizer.end_of_text
    assert left_out(tmp_path / "out") == {"an empty file": 1}


FORMS = [about("", "hello", "hi"), {"messages": say("user", "hello", "assistant", "hi")},
         {"instruction": "hello", "response": "hi"}, {"prompt": "hello", "output": "hi"}]
HELLO = ("<|endoftext|><|user|>hello<|end|><|assistant|>hi<|end|>", "hi<|end|>")


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_every_form_of_a_chat_gives_the_same_ids(ending, usual, tmp_path):
    files = write_rows(tmp_path / f"a.{ending}", FORMS)
    said = prepared("chat", f"--files={files}", f"--val_files={files}", *usual)
    assert chats(tmp_path / "out") == chats(tmp_path / "out", "val") == [HELLO] * 4
    assert "train: 4 chats" in said and "left out" not in said


def test_longer_chats_keep_every_turn_and_gpt2_is_the_default_vocabulary(usual, tmp_path):
    turns = say("system", "be kind", "user", "1", "assistant", "one", "user", "2 <|end|>",
                "assistant", "two", "user", "still there?")
    rows = [{"messages": turns}, {"instruction": "add", "input": "1 and 2", "output": "3"},
            FORMS[1]["messages"]]
    path = write_rows(tmp_path / "a.jsonl", rows)
    argv = "chat", f"--files={path}", f"--val_files={path}"
    prepared(*argv, *usual)
    assert chats(tmp_path / "out") == [
        ("<|endoftext|><|system|>be kind<|end|><|user|>1<|end|><|assistant|>one<|end|>"
         "<|user|>2 <|end|><|end|><|assistant|>two<|end|>", "one<|end|>two<|end|>"),
        ("<|endoftext|><|user|>add\n1 and 2<|end|><|assistant|>3<|end|>", "3<|end|>"), HELLO]
    ids, tokenizer = Chats(tmp_path / "out", "train").chat(0)[0], load(tmp_path / "out")
    assert np.count_nonzero(ids == tokenizer.end) == 5  # the typed <|end|> is ordinary text
    prepared(*argv, f"--out={tmp_path}/gpt2")
    ids = Chats(tmp_path / "gpt2", "train").chat(2)[0]
    assert ids.tolist() == [50256, 50258, 31373, 50260, 50259, 5303, 50260]
    assert manifest(tmp_path / "gpt2")["tokenizer_name"] == "gpt2"


GOOD = {"instruction": "hello", "response": "hi", "uuid": "a", "input_quality": "good",
        "instruct_reward": -1.5, "min_neighbor_distance": 0.1, "repeat_count": 1,
        "min_similar_uuid": None, "llama_guard_2": "safe", "language": "EN"}
POOR = {"input quality below average": {"input_quality": "poor"},
        "instruct reward below -10": {"instruct_reward": -10.5},
        "a near-duplicate of another row": {"min_similar_uuid": "b"},
        "a language other than EN": {"language": "ZH"},
        "not marked as safe": {"llama_guard_2": "unsafe\nS1"}}


def test_poor_chats_are_left_out_by_their_columns(usual, tmp_path):
    kept = [GOOD, {**GOOD, "min_similar_uuid": "a", "repeat_count": 2}, {**GOOD, "language": "en"},
            {**GOOD, "input_quality": "average"}, {**GOOD, "instruct_reward": None},
            {name: None if name not in FORMS[2] else value for name, value in GOOD.items()},
            {**GOOD, "input_quality": ["strange"], "instruct_reward": "high", "language": 7}]
    path = write_rows(tmp_path / "a.jsonl", [*kept, *({**GOOD, **poor} for poor in POOR.values())])
    val = write_rows(tmp_path / "val.jsonl", FORMS[:1])
    argv = "chat", f"--files={path}", f"--val_files={val}", *usual
    for flags, n_kept in (((), len(kept)), (("--min_quality=good",), len(kept) - 1), (
            ("--min_quality=very poor", "--min_reward=-99", "--language=",
             "--drop_duplicates=False", "--safe_only=False"), len(kept) + len(POOR))):
        prepared(*argv, *flags)
        assert len(Chats(tmp_path / "out", "train")) == n_kept
        if not flags:
            assert left_out(tmp_path / "out") == dict.fromkeys(POOR, 1)


@pytest.mark.parametrize("command, good, bad", [
    ("text", {"text": "good"}, {
        "no text in the field text": [{"text": " "}, {"title": "x"}, ["text"], {"text": 7}]}),
    ("chat", FORMS[0], {
        "turns out of order": [
            {"messages": say("assistant", "a", "user", "b")}, {"messages": say("user", "hello")},
            {"messages": say("user", "a", "user", "hello", "assistant", "hi")}],
        "an empty answer": [
            {"instruction": "hello", "response": " "}, {"instruction": "hello", "response": ""},
            about("", "x", ""), {"messages": say("user", "x", "assistant", "")}],
        "an empty question": json.loads(json.dumps(FORMS).replace("hello", " ")),
        "a turn without text": [
            {"messages": say("user", None, "assistant", "hi")}, about("", 7, "hi")],
        "no chat and no answer in it": [{"instruction": "hello"}, {"conversations": []}],
        "turns of another form": [{"messages": "hello"}, {"messages": ["hello", "hi"]}, ["hello"]],
        "row is not a JSON object": ["hello", 7, None],
        "a question that is not text": [{"instruction": ["hello"], "response": "hi"}],
        "an image in a row; use prepare.py images": [{"image": "a.png", **FORMS[0]}]})])
def test_unusable_rows_are_counted_by_reason_and_named(command, good, bad, usual, tmp_path):
    bad = bad | {"not a line of JSON": [b"not JSON", b'{"text": "cut'],
                 "not UTF-8; prepare.py reads other encodings with --encoding": [
                     b'{"prompt": "\xff", "output": "hi"}']}
    reasons = [reason for reason, rows in bad.items() for _ in rows]
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode()
             for rows in bad.values() for row in rows]
    path, val = tmp_path / "a.jsonl", write_rows(tmp_path / "val.jsonl", [good])
    argv = command, f"--files={path}", f"--val_files={val}", *usual
    path.write_bytes(b"\n".join(lines))
    refused = run("prepare.py", *argv)
    assert f"{path} holds no" in refused.refusal and "left out" in refused.out
    path.write_bytes(b"\n\n".join([*lines, json.dumps(good).encode()]))  # blank lines are no rows
    said = prepared(*argv)
    assert left_out(tmp_path / "out") == dict(Counter(reasons))
    for reason, found in manifest(tmp_path / "out")["left_out"].items():
        names = [f"a.jsonl:{2 * i + 1}" for i, other in enumerate(reasons)
                 if other == reason.split("; its columns")[0]]
        assert set(found["first"]) <= set(names) and found["rows"] <= len(names)
        assert f"left out {found['rows']} rows: {reason} ({', '.join(found['first'])}" in said


@pytest.mark.parametrize("value", [True, None, 7, 1.5, ["hello"], {"a": 1}, "\udc00", "NUL \0"])
def test_a_value_of_another_type_never_ends_the_conversion(value, usual, tmp_path):
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    turns = FORMS[0]["conversations"]
    rows = [{**row, name: value} for row in (asked("red.png"), GOOD) for name in row]
    rows += [{"messages": [{**turns[0], name: value}, turns[1]]} for name in turns[0]]
    rows += [{"conversations": [turns[0], value]}, value, {"text": value}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [asked("red.png"), *rows]))
    good = write_rows(tmp_path / "val.json", [{**FORMS[0], "text": "fine"}] * 2)
    for command in "text", "chat", "images":
        said = prepared(command, f"--files={path},{good}", f"--val_files={good}", *usual,
                        *[f"--image_root={tmp_path}"] * (command == "images"),
                        f"--out={tmp_path}/{command}")
        assert not re.search("object has no|must be|NoneType|expected str|unhashable|embedded|"
                             "codec", said), said  # Python's own messages


@pytest.mark.parametrize("command", ["text", "chat"])
def test_a_data_set_of_the_hub_gives_the_same_as_its_files(command, usual, tmp_path):
    (tmp_path / "stories").mkdir()
    many_rows(tmp_path / "stories/train.parquet")
    write_rows(tmp_path / "stories/test.parquet", [{"text": "Only one."}])  # another split
    for name, source in {"set": f"--dataset={tmp_path}/stories",
                         "file": f"--files={tmp_path}/stories/train.parquet"}.items():
        prepared(command, source, "--val_share=0.1", *usual, f"--out={tmp_path}/{name}")
    assert sums(tmp_path / "set") == sums(tmp_path / "file")


@pytest.mark.parametrize("command, flag", [(command, flag) for command, flags in (
    ("text", ["--shard_tokens=0", "--val_share=1", "--val_share=-0.1", "--val_share=nan",
              "--seed=-1", "--vocabulary=261", "--vocabulary=-3", "--max_documents=-1",
              "--dataset=books", "--out={tmp}/a.jsonl", "--out={tmp}/a.jsonl/x", "--out=/proc/x"]),
    ("chat", ["--val_share=2", "--max_chats=-1", "--seed=-7"]), ("images", ["--image_size=0"]),
    ("demo", ["--vocabulary=100", "--vocabulary=0", "--image_size=0", "--held_out=0",
              "--captions=0", "--stories=-1", "--questions=0"])) for flag in flags])
def test_invalid_settings_are_refused_by_name(command, flag, vocabulary, tmp_path):
    rows = [{"text": "The fox.", "prompt": "a", "output": "b"}] * 9
    files = f"--files={write_rows(tmp_path / 'a.jsonl', rows)}"
    name, value = flag.format(tmp=tmp_path).split("=")
    argv = [command, f"--out={tmp_path}/out", f"{name}={value}"]
    argv += [files, f"--tokenizer={vocabulary}"] * (command != "demo")
    argv += [f"--image_root={tmp_path}"] * (command == "images")
    assert (value if name == "--out" else name) in run("prepare.py", *argv).refusal
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_the_bytes_do_not_depend_on_the_number_of_cores(world_data, tmp_path):
    command = [sys.executable, ROOT / "prepare.py", "demo", f"--out={tmp_path}/again", *DEMO]
    pinned = {min(os.sched_getaffinity(0))}
    subprocess.run(command, check=True, capture_output=True,
                   env={**os.environ, "PYTHONHASHSEED": "7"},
                   preexec_fn=lambda: os.sched_setaffinity(0, pinned))  # one core, not all of them
    first, again = sums(world_data), sums(tmp_path / "again")
    assert len(first) > 30 and first == again


def test_only_the_test_seed_changes_the_test_split(world_data, tmp_path):
    prepared("demo", *DEMO, f"--out={tmp_path}/other", "--test_seed=7")
    first, other = sums(world_data), sums(tmp_path / "other")
    changed = {name for name in first if first[name] != other[name]}
    assert changed and all("test" in name or "manifest" in name for name in changed)
    assert {f"{kind}/test/ids.npy" for kind in ("chats", *KINDS)} <= changed
    assert "scenes/test_pairs/ids.npy" in changed and "text/test_000000.npy" in changed


def test_the_demo_has_the_requested_counts_and_checksums_and_nothing_in_two_splits(world_data):
    splits = "train", "val", "test"
    assert [len(documents(world_data / "text", split)) for split in splits] == [400, 64, 64]
    counts = {f"{kind}/{split}": 64 for kind in ("chats", *KINDS) for split in splits[1:]}
    counts |= {"chats/train": 150, "captions/train": 120, "scenes/train": 120,
               "scenes/val_pairs": 64, "scenes/test_pairs": 64}
    for name, n in counts.items():
        found = Chats(world_data / Path(name).parent, Path(name).name)
        sizes = [image.size for i in range(n) for image in found.images(i)]
        assert len(found) == n and sizes == ([] if "chats" in name else [(32, 32)] * n)
    costs = manifest(world_data)
    assert costs["seconds"] > 0 and costs["peak_rss_gb"] > 0  # which eval.py --report adds
    for kind in "text", "chats", *KINDS:
        assert manifest(world_data / kind)["sha256"] == sums(world_data / kind)
    for one, other in itertools.combinations(splits, 2):
        for read, kind in (documents, "text"), (chats, "chats"):
            assert not set(read(world_data / kind, one)) & set(read(world_data / kind, other))


@pytest.fixture
def books(tmp_path, monkeypatch):
    """The flags of prepare.py text in a folder where it has made data/books."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    prepared("text", "--files=rows.jsonl", "--out=data/books")
    return ["text", "--files=rows.jsonl"]


FOREIGN = {  # name: (what is at data/it, words of the refusal of --out=data/it)
    "a file": (lambda it: it.write_text("a"), "is not a data set"),
    "a folder": (lambda it: write(it / "a.txt"), "is not a data set"),
    "a file in the data set": (lambda it: write(copied(it) / "a/model.pt"),
                               r"file .*/data/it/a/model.pt; move that"),
    "a link in it": (lambda it: (copied(it) / "a").symlink_to(".."), "data/it/a; move"),
    "one of another command": (lambda it: sealed(it, made_by="prepare.py chat"),
                               "manifest.json is not of prepare.py text, but of prepare.py chat"),
    "an older one": (lambda it: sealed(it, tokenizer="a"), "but of an older version"),
    "a list": (lambda it: write(it / "manifest.json", "[1]"), "or another program"),
    "a checkpoint": (lambda it: sealed(it, sha256={"config.json": ""}), "older version"),
    "one below it": (lambda it: copied(copied(it) / "more"), "data/it/more/"),
    "another's below it": (lambda it: sealed(copied(it) / "a", made_by="prepare.py demo"),
                           "data/it/a/manifest.json is not of prepare.py text"),
    "several": (lambda it: copied(it / "a"), "not a data set"),
}


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def copied(folder):
    return shutil.copytree("data/books", folder)


def sealed(folder, **manifest):
    write(folder / "manifest.json", json.dumps(seal(manifest)))


@pytest.mark.parametrize("make, words, out", [
    *((*case, "data/it") for case in FOREIGN.values()),
    *((lambda it: None, "working folder", out) for out in (".", "/", "data/../.."))],
    ids=[*FOREIGN, "the inputs", "the root", "what contains it"])
def test_out_replaces_nothing_that_the_command_did_not_make(make, words, out, books, tmp_path):
    make(tmp_path / "data/it")
    before = sorted(tmp_path.rglob("*"))
    assert re.search(words, run("prepare.py", *books, f"--out={out}").refusal)
    assert sorted(tmp_path.rglob("*")) == before


def test_out_replaces_its_own_data_set_an_empty_folder_and_the_target_of_a_link(books, tmp_path):
    data = tmp_path / "data"
    (data / "empty").mkdir()
    (data / "link").symlink_to(tmp_path / "disk/a", target_is_directory=True)
    (data / "books/.verified.json").write_text("{}")
    write(tmp_path / "rows.jsonl", json.dumps({"text": "Another text."}))
    for out in "books", "empty", "link", "link":
        prepared(*books, f"--out=data/{out}")
        assert manifest(data / out)["train_tokens"] + manifest(data / out)["val_tokens"] < 9
    assert (data / "link").is_symlink() and sorted(os.listdir(tmp_path / "disk")) == ["a"]


def test_what_appears_at_out_meanwhile_is_kept(books, tmp_path, monkeypatch):
    monkeypatch.setattr("prep.convert.write_manifest", lambda *_, **__: write(tmp_path / "new/a"))
    assert "new is not replaced" in run("prepare.py", *books, "--out=new").refusal
    assert (tmp_path / "new/a").exists()


def test_the_demo_is_made_again_but_only_where_all_of_it_is_its_own(world_data, tmp_path):
    it = shutil.copytree(world_data, tmp_path / "demo")
    check_replaceable(it, "demo")
    write(it / "images/mine.png")
    with pytest.raises(UserError, match=r"images/mine\.png"):
        check_replaceable(it, "demo")


def test_validation_has_one_question_per_image_with_its_kind(world_data):
    for split in "val", "val_pairs", "test", "test_pairs":
        kinds = json.loads((world_data / "scenes" / split / "groups.json").read_text())
        texts = chats(world_data / "scenes", split)
        assert len(kinds) == len(texts) == 64 and set(kinds) == set(toy_images.FREQUENCIES)
        for kind, (text, answer) in zip(kinds, texts, strict=True):
            assert text.count("<|user|>") == 1
            assert (answer in ("Yes.<|end|>", "No.<|end|>")) == (kind == "yes_no"), text
