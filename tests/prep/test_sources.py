"""The claims of prep/readers.py and sources.py: a file is read whole, or refused by name."""

import itertools
import json
import os

import fake_hub
import pyarrow
import pyarrow.parquet
import pytest
from conftest import run
from test_archives import compressed, packed_tar

from common.config import UserError
from prep import sources
from prep.readers import rows_of
from prep.sources import Dataset, Files, parsed
from prepare import Text

ROWS = [{"text": "Füchse laufen."}, {"text": "Two.\nLines"}, {"text": "3", "n": [1, {"x": None}]}]
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
TURNS = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
DOCUMENT = "Füchse laufen.\n\n  Sehr schnell. \n" * 9


def rows(path, content=None, encoding=""):
    """The parsed rows of a file, written first; those that are refused as their reasons."""
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = []
    for row, _ in rows_of(path, encoding):
        try:
            found += [parsed(row)] if row != b"" else []
        except ValueError as error:
            found.append(str(error))
    return found


def lines(rows, **options):
    return "".join(json.dumps(row, **options) + "\n" for row in rows)


LIST, OBJECT, RAW = json.dumps(ROWS), json.dumps(ROWS[0]), {"ensure_ascii": False}
TABLE = {"images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
         "annotations": [{"image_id": 8, "caption": "B."}, {"image_id": 7, "caption": "A."},
                         {"image_id": 7, "caption": "Again."}]}
CAPTIONS = [{"image": f"{name}.jpg", "caption": text} for name, text in (
    ("b", "B."), ("a", "A."), ("a", "Again."))]
JSON = {
    "lines": (lines(ROWS), ROWS),
    "lines, the first broken": ('{"text": "cut\n' + lines(ROWS), ["not a line of JSON", *ROWS]),
    "blank lines": ("\n\n" + lines(ROWS).replace("\n", "\r\n\r\n"), ROWS),
    "a list in a line": (LIST, ROWS),
    "a list over lines": (json.dumps(ROWS, indent=2), ROWS),
    "rows in brackets": ("[\n" + lines(ROWS).replace("}\n", "},\n")[:-2] + "\n]\n", ROWS),
    "one row in brackets": (f"[\n{OBJECT}\n]", ROWS[:1]),
    "commas in front": (f"[{OBJECT}\n, {OBJECT}\n]", ROWS[:1] * 2),
    "rows with commas": (lines(ROWS).replace("}\n", "},\n"), ROWS),
    "two lists": (LIST + "\n" + LIST, ROWS * 2),
    "lists without a space": (LIST + LIST + "[]" + LIST, ROWS * 3),
    "a list in each line": (lines([ROWS, ROWS[:1]]), ROWS + ROWS[:1]),
    "objects over lines": ("".join(json.dumps(row, indent=1) + "\n" for row in ROWS), ROWS),
    "one object": (OBJECT, ROWS[:1]),
    "a chat in each line": (lines([CHAT, TURNS]), [CHAT, TURNS]),
    "a single chat": (json.dumps(CHAT, indent=1), [CHAT]),
    "a list of chats": (json.dumps([CHAT, TURNS]), [CHAT, TURNS]),
    "chats over lines": (json.dumps(CHAT, indent=1) + json.dumps(TURNS, indent=1), [CHAT, TURNS]),
    "an object with a chat": (json.dumps({"conversations": TURNS}), [{"conversations": TURNS}]),
    "COCO": (json.dumps({"info": {}, **TABLE, "licenses": [{"id": 1}]}), CAPTIONS),
    "COCO without an image": (json.dumps({**TABLE, "images": TABLE["images"][:1]}), [
        "a caption of an image that is not listed", *CAPTIONS[1:]]),
    "data": (json.dumps({"version": "1", "data": ROWS}), ROWS),
    "a list of another name": (json.dumps({"stories": ROWS}, indent=1), ROWS),
    "a row with a list": (json.dumps({"text": "x", "spans": [{"a": 1}]}), [
        {"text": "x", "spans": [{"a": 1}]}]),
    "a row with an image": (json.dumps({"image": "a.jpg", "data": ROWS}), [
        {"image": "a.jpg", "data": ROWS}]),
    "documents": (json.dumps(["one", "two"]), ["one", "two"]),
    "a book": (lines([{"text": "word " * 9999}] * 2), [{"text": "word " * 9999}] * 2),
    "no rows": ("[]\n", []), "blank": (" ", []), "nothing": ("", ["an empty file"]),
    "joined files": (LIST + "\ufeff" + LIST, ROWS * 2),
}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "b.NDJSON", "c"])
@pytest.mark.parametrize("form", JSON)
def test_json_is_read_by_its_content(form, name, tmp_path):
    content, expected = JSON[form]
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        if content or encoding == "utf-8":
            assert rows(tmp_path / name, content.encode(encoding)) == expected


@pytest.mark.parametrize("block", [2, 7, 100, 10**6])
@pytest.mark.parametrize("options", [{}, {"indent": 1}, RAW])
def test_a_json_list_is_read_row_by_row(options, block, tmp_path, monkeypatch):
    monkeypatch.setattr("prep.readers.BLOCK", block)
    listed = [{"text": "ü" * (i % 50), "n": [i, {"x": None}]} for i in range(50)]
    listed += [1.5, "a", None, 2**70, "\ud800"] if options.get("ensure_ascii", True) else [None]
    text = json.dumps(listed, **options)
    for end in "\n", "", text:
        assert rows(tmp_path / "a.json", f" {text}{end}") == listed * (1 + (end == text))


@pytest.mark.parametrize("text, line, n_before", [
    ("[", 1, 0), ("[1, 2", 1, 2), ('[{"a": 1},\n {"b"', 2, 1), ('"rows"', 1, 0), ("Once.", 1, 0),
    ("[" * 100_000, "", 0), (LIST + "\nthe end", 2, 3), ('[{"a": 1},\n{"b": 2]\n}]', 2, 1),
    ('[{"a": 1},\n\n\n{"b": "cut', 4, 1), ("<p>", 1, 0), ('{"a": 1', 1, 0)])
def test_malformed_json_is_refused_by_file_and_line_after_its_rows(text, line, n_before, tmp_path):
    path, before = tmp_path / "a.json", []
    path.write_text(text)
    with pytest.raises(UserError, match=f"{path}.*{line and f'line {line}'}"):
        before.extend(row for _, row, _ in Files(str(path)).rows())
    assert len(before) == n_before


def test_a_malformed_row_does_not_read_the_rest_of_the_file(tmp_path, monkeypatch):
    endless = itertools.chain(['[{"a" 1}, '], itertools.repeat('{"a": 1}, '))
    monkeypatch.setattr("prep.readers.text_blocks", lambda *_, **__: endless)
    with pytest.raises(UserError, match="line 1: Expecting ':'"):
        rows(tmp_path / "a.json", "[")


CSV = "image , text\n a.jpg,\"Two,\nlines\"\nb.jpg,x\n"
TABLE_ROWS = [{"image": " a.jpg", "text": "Two,\nlines"}, {"image": "b.jpg", "text": "x"}]
FORMS = {"a.jsonl": (lines(ROWS), ROWS), "a.json": (LIST, ROWS), "a.TXT": (DOCUMENT, [DOCUMENT]),
         "a.csv": (CSV, TABLE_ROWS)}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", ["gz", "zst", "bz2", "xz"])
def test_compressed_files_are_known_by_their_content(kind, name, tmp_path):
    content, expected = FORMS[name]
    whole = compressed(content.encode(), kind)
    for ending in f".{kind}", "":
        assert rows(tmp_path / (name + ending), whole) == expected
    assert rows(tmp_path / "again.jsonl", compressed(lines(ROWS).encode(), kind) * 2) == ROWS * 2
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 99]) + whole[middle + 1 :]
    for damaged in [whole[:-5], flipped][: 1 + (kind != "zst")]:  # this zstd has no checksum
        with pytest.raises(UserError, match=f"cannot read .*{name}.*: .*it is damaged"):
            rows(tmp_path / name, damaged)


@pytest.mark.parametrize("start, kind", [
    (b"PK\3\4", "zip archive"), (b"%PDF-1.7", "PDF"), (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"\xd0\xcf\x11\xe0\xa1", "Office"), (b"Rar!\x1a", "rar"), (b"<!doctype HTML>", "HTML page"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull")])
def test_a_file_of_another_kind_is_named(start, kind, tmp_path):
    for name in "a.txt", "a.jsonl", "a.csv", "a.json.gz":
        with pytest.raises(UserError, match=rf"{name}: it is .*{kind}"):
            rows(tmp_path / name, start + bytes(range(99)))


def test_parquet_is_known_by_its_content(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:2]), tmp_path / "data")
    assert rows(tmp_path / "data") == ROWS[:2]


@pytest.mark.parametrize("ending, content, expected", [
    ("txt", DOCUMENT, [DOCUMENT]), ("csv", f"text\n{'Füchse' * 9}\n", [{"text": "Füchse" * 9}]),
    ("json", json.dumps(ROWS * 9, **RAW), ROWS * 9), ("jsonl", lines(ROWS, **RAW), ROWS)])
def test_encodings_are_known_by_the_mark_or_told(ending, content, expected, tmp_path):
    path = tmp_path / f"a.{ending}"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert rows(path, content.encode(encoding)) == expected
    for encoding in ("cp1252", "latin-1", "utf-16-le", "utf-16-be"):
        assert rows(path, content.encode(encoding), encoding) == expected
        assert rows(path, content.encode("utf-16"), encoding) == expected  # the mark knows better
    if ending == "jsonl":
        assert "--encoding" in rows(path, content.encode("cp1252"))[0]
        assert rows(path, content.encode("cp1252"))[1:] == ROWS[1:]


@pytest.mark.parametrize("encoding, text", [
    ("cp1252", "“Füchse” laufen. "), ("latin-1", "Où? "), ("utf-16-le", "Foxes. "),
    ("utf-16-be", "Foxes. "), ("gbk", "狐狸跑得很快。"), ("shift_jis", "キツネは走る。"),
    ("koi8-r", "Лиса бежит. "), ("utf-16-le", "狐狸跑得很快。")])
def test_text_that_is_not_utf8_is_refused_or_read_as_told(encoding, text, tmp_path):
    content = (text * 20).encode(encoding)
    for name in "a.txt", "a.csv":
        with pytest.raises(UserError, match=f"{name}: .*--encoding"):
            rows(tmp_path / name, b"text\n" * (name == "a.csv") + content)
    assert rows(tmp_path / "a.txt", content, encoding) == [text * 20]


def test_a_few_bad_bytes_in_a_book_are_replaced(tmp_path):
    text = "A long story. " * 5000
    assert rows(tmp_path / "a.txt", text.encode() + b"\xe9") == [text + "\ufffd"]
    with pytest.raises(UserError, match="8 unreadable characters"):
        rows(tmp_path / "a.txt", b"\xe9." * 8 + text.encode())


def test_an_unknown_encoding_is_refused_by_name(vocabulary, tmp_path):
    (tmp_path / "a.txt").write_bytes((DOCUMENT * 3).encode("cp1252"))
    argv = ["text", f"--files={tmp_path}/a.txt", f"--tokenizer={vocabulary}",
            f"--out={tmp_path}/out"]
    for name in "klingon", "base64", "undefined":
        assert f"--encoding={name}" in run("prepare.py", *argv, f"--encoding={name}").refusal
    assert run("prepare.py", *argv, "--encoding=cp1252").status == 0


@pytest.mark.parametrize("block", [3, 40, 1 << 20])
@pytest.mark.parametrize("text, expected", [
    ("One.\n<|endoftext|>\nTwo.\n\n2.\n<|endoftext|>\n", ["One.", "Two.\n\n2."]),
    ("<|endoftext|>One.<|endoftext|><|endoftext|>\n\n Two.", ["One.", " Two."]),
    (DOCUMENT, [DOCUMENT]), (" \n", [" \n"])])
def test_marks_separate_the_documents_of_a_text(text, expected, block, tmp_path, monkeypatch):
    monkeypatch.setattr("prep.readers.BLOCK", block)
    assert rows(tmp_path / "a.txt", text) == expected


def test_a_document_may_be_too_long_but_not_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("prep.readers.BLOCK", 10)
    monkeypatch.setattr("prep.readers.LONGEST_TEXT", 100)
    assert len(rows(tmp_path / "a.txt", "A story.\n<|endoftext|>\n" * 50)) == 50
    with pytest.raises(UserError, match="split it"):
        rows(tmp_path / "a.txt", "A story.\n" * 50)


@pytest.mark.parametrize("name, content, expected", [
    ("a.csv", "\n a ;b\n1;2,3\n\n\"x;\"\"y\"\"\";\n", [
        {"a": "1", "b": "2,3"}, {"a": 'x;"y"', "b": ""}]),
    ("a.TSV", "a\tb, c\r\n1\t2\r\n", [{"a": "1", "b, c": "2"}]),
    ("a.csv", "text\n" + "x" * 200_000, [{"text": "x" * 200_000}]),
    ("a.csv", "a|b\n1\n1|2|3\n\"1\"x|2\n3|4\n", [
        *["more or fewer fields than the header"] * 2, "malformed CSV: '|' expected after '\"'",
        {"a": "3", "b": "4"}]),
    ("a.csv", "a,b\n", ["a header without rows"]), ("a.csv", "", ["an empty file"])])
def test_tables_are_read_row_by_row(name, content, expected, tmp_path):
    assert rows(tmp_path / name, content) == expected


@pytest.mark.parametrize("content, message", [
    ("a,a\n1,2\n", "two columns"), ('a,b\n1,2\n3,"4\n5,6\n', "line 3: a quoted field has no end")])
def test_a_table_that_would_lose_data_is_refused(content, message, tmp_path):
    with pytest.raises(UserError, match=f"a.csv: {message}"):
        rows(tmp_path / "a.csv", content)


MEMBERS = {"a/0.jpg": b"\xff0", "a/0.txt": "Füchse.\n".encode(), "a/._0.jpg": b"\0",
           "a/1.json": json.dumps({"conversations": TURNS, "image": "1.png"}).encode(),
           "a/1.PNG": b"\xff1", "b/1.txt": b"No image.", "b/2.json": b"[1]", "b/3.cls": b"7"}
SAMPLES = [{"image": [b"\xff0"], "caption": "Füchse."},
           {"conversations": TURNS, "image": [b"\xff1"]}, {"caption": "No image."},
           "a sample whose .json is not a JSON object", {"cls": "7"}]


@pytest.mark.parametrize("ending, name", [("", "a.tar"), ("gz", "a.tar.gz"), ("xz", "a.bin"),
                                          ("bz2", "a.tbz"), ("gz", "a.tgz")])
def test_members_of_a_tar_with_one_key_are_a_row(ending, name, tmp_path):
    assert rows(tmp_path / name, packed_tar(MEMBERS.items(), ending)) == SAMPLES


def test_a_damaged_tar_is_refused(tmp_path):
    whole = packed_tar(MEMBERS.items())
    broken = bytearray(whole)
    broken[1024 + 150] ^= 1  # the checksum of the second member
    for content in whole[:1024], whole[:1500], whole[:1536], bytes(broken), whole * 2, b"", b"x":
        with pytest.raises(UserError, match=r"a\.tar: .*it is damaged"):
            rows(tmp_path / "a.tar", content)


CARD = b"""---
configs:
- {config_name: a, data_files: a.jsonl}
- {config_name: b, data_files: b.jsonl}
---
"""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    import datasets  # before its settings are changed
    with fake_hub.running(monkeypatch) as hub:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        content = lines(ROWS[:2]).encode()
        hub.repos["datasets", "me/one"] = {"a.jsonl": content}
        hub.repos["datasets", "me/two"] = {"README.md": CARD, "a.jsonl": content,
                                           "b.jsonl": content}
        hub.gated.add("me/gated")
        yield hub


@pytest.mark.parametrize("name, subset, split, said", [
    ("me/two", "", "train", r"\['a', 'b'\]"), ("me/two", "c", "train", "'a', 'b'"),
    ("me/one", "", "test", r"\['train'\]"), ("me/no", "", "train", "private or gated"),
    ("me/gated", "", "train", "ask for access"), ("no/such/folder", "", "train", "any data file")])
def test_what_will_not_change_is_not_called_a_failing_network(name, subset, split, said, hub):
    with pytest.raises(UserError, match=f"{name}.*{said}") as refused:
        list(Dataset(name, subset, split).rows())
    assert "same command resumes" not in str(refused.value) and "..." not in str(refused.value)


def test_a_revision_of_a_data_set_of_the_hub(hub, tmp_path, monkeypatch):
    assert [row for _, row, _ in Dataset("me/one@v2", "", "train").rows()] == ROWS[:2]
    assert hub.times("resolve/v2")
    monkeypatch.chdir(tmp_path)
    os.makedirs("my@folder")
    (tmp_path / "my@folder/a.jsonl").write_text(lines(ROWS[:2]))
    assert [row for _, row, _ in Dataset("my@folder", "", "train").rows()] == ROWS[:2]


def test_a_mixture_has_its_shares_of_bytes_and_ends_with_its_first_data_set(hub, monkeypatch,
                                                                            capsys, tmp_path):
    hub.repos["datasets", "me/long"] = {"a.jsonl": lines([{"text": "l" * 900}] * 20).encode()}
    hub.repos["datasets", "me/short"] = {"README.md": CARD, "a.jsonl": b'{"text": "no"}',
                                         "b.jsonl": lines([{"text": "s" * 90}] * 90).encode()}
    monkeypatch.setitem(sources.NAMED, "Shorts", ("me/short:b", "CC BY-NC 4.0: not for sale"))
    mixture = sources.data_set(Text(dataset="me/long=3,Shorts=1", split="train"))
    texts = [row["text"] for _, row, _ in mixture.rows()]
    n_long, n_short = (sum(len(t) for t in texts if t[0] == kind) for kind in "ls")
    assert n_long == 20 * 900 and n_short == pytest.approx(n_long / 3, rel=0.15)
    assert [row["text"] for _, row, _ in mixture.rows()] == texts and texts[:2] != texts[2:4]
    said = capsys.readouterr().out
    assert "me/short:b" in said and "not for sale" in said and "last row of me/long" in said
    said = run("prepare.py", "text", "--dataset=me/long=3,Shorts=1", f"--out={tmp_path}/mix",
               "--vocabulary=300").out
    assert "me/long: 20 rows used, " in said and "me/short:b: 6" in said and ", 0 images" in said


@pytest.mark.parametrize("wrong", ["a=0", "a=-1,b=1", "a=x", "a=nan", "a=inf", "a,,b", "=2"])
def test_a_weight_that_is_none_is_refused(wrong):
    with pytest.raises(UserError, match=r"NAME=WEIGHT"):
        sources.data_set(Text(dataset=wrong))
