"""Files that were changed at random never crash a reader and never hang it; what is refused is
refused by name. The seeds are fixed, so each mutant is the same every time."""

import json
import random
import re
import shutil
import signal
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

import tokenizer as tokenizers
from common.archives import open_images
from common.config import UserError
from common.images import read_image, to_pixels
from data import read_array
from faults.harness import scale
from prep.schema import chats_of
from prep.sources import Files, parsed

SECONDS = 30  # for one mutant
PARTS = {  # in a text: what is replaced by one of the values
    "json": (rb'"[^"]*"|\d+|null|\[|\{[^{}]*\}', [json.dumps(value).encode() for value in (
        None, True, -1, 0, 2**70, 1e308, float("nan"), "", " ", "\0", "\ud800", "<image>" * 6,
        "<|end|>", "../../x.png", "/dev/zero", "a" * 9999, "é\u202e\n\x1b[31m", [], {}, [[[]]],
        [None], {"bytes": None}, {"path": 3}, [{}], {"from": "gpt"})]),
    "npy": (rb"\(500,\)|'<u2'|False", [
        b"(5**9,)", b"(-5,)", b"(True,)", b"()", b"[[]]", b"(10**99,)", b"None", b"((((",
        b"(9" + b"9" * 20 + b",)"]),
}


def mutated(content, generator, parts=None):
    """`content` (bytes) changed at one to four places: parts of a text replaced by other values, or
    any bytes, most of them near the start or near the end, where archives have their tables."""
    text = parts if parts and generator.random() < 0.5 else None
    near = generator.choice((64, 64, 64, 200, 2000, len(content)))
    for _ in range(generator.choice((1, 1, 1, 2, 4))):
        if text:
            found = list(re.finditer(text[0], content)) or [re.search(b"^", content)]
            start, end = generator.choice(found).span()
            content = content[:start] + generator.choice(text[1]) + content[end:]
            continue
        at = generator.randrange(max(1, min(near, len(content))))
        at = at if generator.random() < 0.7 else max(0, len(content) - at)
        n = generator.choice((1, 2, 4, 30))
        noise = bytes(generator.choices((0, 255, 127, 128, generator.randrange(256)), k=n))
        content = content[:at] + generator.choice((
            noise + content[at + n :],  # replaced
            noise + content[at:],  # inserted
            content[at + n :],  # deleted
            content[at : at + n] * 40 + content[at:],  # repeated
            bytes(c ^ 1 << n % 8 for c in content[at : at + 1]) + content[at + 1 :],
            content[at // 2 :],  # spliced
            content[at : at + len(content) // 2],  # truncated
        ))
    return content


IMAGES = {"JPEG": {"progressive": True}, "PNG": {"compress_level": 0}, "GIF": {},
          "WEBP": {"lossless": True}, "TIFF": {"compression": "tiff_lzw"}, "BMP": {}}
SAID = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
CHATS = 3 * [
    {"id": "7", "image": "a.JPEG", "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]},
    {"images": ["a.JPEG", "b.PNG"], "messages": SAID}, {"messages": SAID}]


def originals(kind, folder):
    """The paths of one or two files of a kind."""
    path = folder / f"1.{kind}"
    if kind in IMAGES:
        noise = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
        for number, options in enumerate(({}, IMAGES[kind])):
            Image.fromarray(noise).resize((96, 72)).save(folder / f"{number}.{kind}", **options)
        return sorted(folder.iterdir())
    if kind in ("zip", "tar"):
        for form in IMAGES:
            (folder / "in" / form).mkdir(parents=True)
            originals(form, folder / "in" / form)
        shutil.make_archive(path.with_suffix(""), kind, folder / "in")
    elif kind == "parquet":
        rows = [dict.fromkeys(("id", "image", "images", "conversations", "messages")) | row
                for row in CHATS]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "npy":
        np.save(path, np.arange(500, dtype=np.uint16))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    else:
        path.write_text(json.dumps(CHATS) if kind == "rows.json" else tokenizers.train(
            ["the cat sat"] * 3, 300).source)
    return [path]


def read_picture(path):
    assert to_pixels([read_image(path.read_bytes(), path.name, 32)], 32).shape == (1, 32, 32, 3)


def read_archive(path):
    """Every image of an archive; the last refusal is raised again."""
    images, refused = open_images(str(path)), None
    for form in IMAGES:
        try:
            read_image(images(f"{form}/1.{form}"), path.name)
        except UserError as error:
            refused = UserError(f"{path.name}: {error}")
    if refused:
        raise refused


def read_rows(path):
    for where, row, _ in Files(str(path)).rows():
        assert where.startswith(f"{path.name}:")
        try:
            chats_of(parsed(row))
        except (ValueError, TypeError) as error:  # as prepare.py counts them
            raise UserError(f"{where}: {error}") from None


def read_vocabulary(path):
    """One that is accepted gives text no special id, and its own text back or none."""
    tokenizer = tokenizers.load(path.parent)
    ids = tokenizer.encode("the cat <|end|> é \0 \ud800")
    assert max(ids, default=0) < tokenizer.end_of_text < tokenizer.n_vocab
    assert isinstance(tokenizer.decode(ids), str)


KINDS = {  # kind of file: its reader
    **dict.fromkeys(IMAGES, read_picture), "zip": read_archive, "tar": read_archive,
    "rows.json": read_rows, "jsonl": read_rows, "parquet": read_rows,
    "tokenizer.json": read_vocabulary, "npy": lambda path: read_array(path, np.uint16)}


@pytest.mark.filterwarnings("ignore")  # of NumPy, about headers of Python 2
@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_file_is_read_or_refused_by_name(kind, tmp_path):
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(f"{SECONDS} seconds for one mutant"))
    (tmp_path / "originals").mkdir()
    contents = [path.read_bytes() for path in originals(kind, tmp_path / "originals")]
    name = kind if kind == "tokenizer.json" else f"a.{kind}"
    read, generator, path = KINDS[kind], random.Random(kind), tmp_path / name
    for content in contents:
        path.write_bytes(content)
        read(path)
    refused, n = 0, scale(15, 150)
    for _ in range(n):
        path.write_bytes(mutated(generator.choice(contents), generator,
                                 PARTS.get(kind.rpartition(".")[2])))
        signal.alarm(SECONDS)
        try:
            read(path)
        except UserError as error:
            refused, said = refused + 1, str(error)
            assert name in said and said.encode() and len(said) < 1000, said
            assert len(said.splitlines()) == 1, said
        finally:
            signal.alarm(0)
    assert refused > n / 10
    print(f"{kind}: {n} mutants, {refused} refused")
