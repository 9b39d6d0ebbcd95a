"""Files that were changed at random never crash a reader and never hang it; what is refused is
refused by name. The seeds are fixed, so each mutant is the same every time."""

import io
import json
import random
import signal
import tarfile
import zipfile

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
from faults.conftest import scale
from prep.schema import images_of, messages_of
from prep.sources import Files, parsed

SECONDS = 30  # for one mutant
VALUES = (None, True, -1, 0, 2**70, 1e308, float("nan"), "", " ", "\0", "\ud800", "<image>" * 6,
          "<|end|>", "../../x.png", "/dev/zero", "a" * 9999, "é\u202e\n\x1b[31m", [], {}, [[[]]],
          [None], {"bytes": None}, {"path": 3}, [{}], {"from": "gpt"})
SHAPES = (b"(5**9,)", b"(-5,)", b"(True,)", b"()", b"[[]]", b"(10**99,)", b"None", b"((((",
          b"(9" + b"9" * 20 + b",)")


def mutated(content, generator, other=b""):
    """`content` (bytes) changed at one to four places; half of the places are among the first."""
    for _ in range(generator.choice((1, 1, 1, 2, 4))):
        at = generator.randrange(max(1, min(len(content), generator.choice((64, len(content))))))
        n = generator.choice((1, 2, 4, 30))
        noise = bytes(generator.choices((0, 255, 127, 128, generator.randrange(256)), k=n))
        content = generator.choice((
            content[:at] + noise + content[at + n :],  # replaced
            content[:at] + noise + content[at:],  # inserted
            content[:at] + content[at + n :],  # deleted
            content[:at] + content[at : at + n] * 40 + content[at:],  # repeated
            content[:at] + bytes(c ^ 1 << n % 8 for c in content[at : at + 1]) + content[at + 1 :],
            content[:at] + other[at // 2 :],  # spliced
            content[: at + len(content) // 2],  # truncated
        ))
    return content


def mutated_value(value, generator):
    """A JSON value with something in it replaced, left out, doubled or renamed."""
    if isinstance(value, dict | list) and value and generator.random() < 0.8:
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        i = generator.randrange(len(items))
        key, inner = items[i]
        kind = generator.randrange(6)
        items[i : i + 1] = ([] if kind == 0 else [items[i]] * 2 if kind == 1
                            else [(str(key)[::-1], inner)] if kind == 2
                            else [(key, mutated_value(inner, generator))])
        return dict(items) if isinstance(value, dict) else [inner for _, inner in items]
    return generator.choice(VALUES)


def mutated_json(content, generator):
    return json.dumps(mutated_value(json.loads(content), generator)).encode()


def mutated_header(content, generator):
    """A .npy file with another shape or type."""
    old = generator.choice((b"(500,)", b"'<u2'", b"False"))
    return content[:128].replace(old, generator.choice(SHAPES)).ljust(128)[:128] + content[128:]


class Hang(BaseException):
    """Nobody who catches errors catches this."""


def stop(number, frame):
    raise Hang(f"{SECONDS} seconds for one mutant")


# ------------------------------------------------------------------------ original files by kind


def image_bytes(form, **options):
    noise = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((96, 72)).save(file, form, **options)
    return file.getvalue()


IMAGES = {
    "JPEG": [image_bytes("JPEG"), image_bytes("JPEG", progressive=True)],
    "PNG": [image_bytes("PNG"), image_bytes("PNG", compress_level=0)],
    "GIF": [image_bytes("GIF")],
    "WEBP": [image_bytes("WEBP"), image_bytes("WEBP", lossless=True)],
    "TIFF": [image_bytes("TIFF"), image_bytes("TIFF", compression="tiff_lzw")],
    "BMP": [image_bytes("BMP")]}
NAMES = [f"folder/{form}.{form}" for form in IMAGES]
TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
SAID = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
CHATS = [{"id": "7", "image": "a.JPEG", "conversations": TURNS},
         {"images": ["a.JPEG", "b.PNG"], "messages": SAID}, {"messages": SAID}]


def archive_bytes(kind):
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, [content, *_] in zip(NAMES, IMAGES.values(), strict=True):
                archive.writestr(name, content)
    else:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name, [content, *_] in zip(NAMES, IMAGES.values(), strict=True):
                header = tarfile.TarInfo(name)
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
    return file.getvalue()


def parquet_bytes():
    file = io.BytesIO()
    columns = {key: None for row in CHATS for key in row}
    table = pyarrow.Table.from_pylist([columns | row for row in CHATS] * 3)
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


def array_bytes():
    file = io.BytesIO()
    np.save(file, np.arange(500, dtype=np.uint16))
    return file.getvalue()


# ---------------------------------------------------------------------------------------- readers


def read_picture(path):
    assert to_pixels([read_image(path.read_bytes(), path.name, 32)], 32).shape == (1, 32, 32, 3)


def read_archive(path):
    """Every image of an archive; the last refusal is raised again."""
    images, refused = open_images(str(path)), None
    for name in NAMES:
        try:
            read_image(images(name), path.name)
        except UserError as error:
            refused = UserError(f"{path.name}: {error}")
    if refused:
        raise refused


def read_rows(path):
    for where, row, _ in Files(str(path)).rows():
        assert where.startswith(f"{path.name}:")
        try:
            row = parsed(row)
            images_of(row, messages_of(row))
        except (ValueError, TypeError) as error:  # as prepare.py counts them
            raise UserError(f"{where}: {error}") from None


def read_vocabulary(path):
    """One that is accepted gives text no special id, and its own text back or none."""
    tokenizer = tokenizers.load(path.parent)
    ids = tokenizer.encode("the cat <|end|> é \0 \ud800")
    assert max(ids, default=0) < tokenizer.end_of_text < tokenizer.n_vocab
    assert isinstance(tokenizer.decode(ids), str)


KINDS = {  # file: (original files, reader, another way to change them)
    **{f"a.{form}": (lambda form=form: IMAGES[form], read_picture, None) for form in IMAGES},
    "a.zip": (lambda: [archive_bytes("zip")], read_archive, None),
    "a.tar": (lambda: [archive_bytes("tar")], read_archive, None),
    "a.json": (lambda: [json.dumps(CHATS * 3).encode()], read_rows, mutated_json),
    "a.jsonl": (lambda: ["".join(json.dumps(row) + "\n" for row in CHATS * 3).encode()],
                read_rows, None),
    "a.parquet": (lambda: [parquet_bytes()], read_rows, None),
    "tokenizer.json": (lambda: [tokenizers.train(["the cat sat"] * 3, 300).source.encode()],
                       read_vocabulary, mutated_json),
    "a.npy": (lambda: [array_bytes()], lambda path: read_array(path, np.uint16), mutated_header),
}


@pytest.mark.filterwarnings("ignore")  # of NumPy, about headers of Python 2
@pytest.mark.parametrize("name", KINDS)
def test_a_mutated_file_is_read_or_refused_by_name(name, tmp_path):
    signal.signal(signal.SIGALRM, stop)
    make, read, other_way = KINDS[name]
    originals, generator, path = make(), random.Random(name), tmp_path / name
    for content in originals:
        path.write_bytes(content)
        read(path)
    refused, n = 0, scale(15, 150)
    for _ in range(n):
        content = generator.choice(originals)
        if other_way and generator.random() < 0.5:
            content = other_way(content, generator)
        else:  # from the start, or near the end, where a .zip and a .parquet have their tables
            at = max(0, len(content) - generator.choice((len(content), 2000, 200)))
            content = content[:at] + mutated(content[at:], generator, content)
        path.write_bytes(content)
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
    print(f"{name}: {n} mutants, {refused} refused")
