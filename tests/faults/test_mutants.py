"""Files that were changed at random never crash a reader and never hang it; what is refused is
refused by name. The seeds are fixed, so each mutant is the same every time; run with -rP to see how
many of each kind were refused."""

import io
import json
import os
import random
import re
import tarfile
import zipfile
from functools import partial

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, run
from PIL import Image

import clip_pretrain
import pretrain
import sft
import tokenizer as tokenizers
import vision_pretrain
import vision_sft
from common.archives import open_images
from common.config import UserError, parse
from common.images import ImageError, read_image, to_pixels
from data import read_array
from faults.conftest import scale
from faults.mutants import Tally, limited, mutated, mutated_value
from prep.schema import images_of, messages_of
from prep.sources import Files, parsed

STAGES = (pretrain, sft, vision_pretrain, vision_sft, clip_pretrain)


# ---------------------------------------------------------------------------------------- pictures


def encoded(form, seed=0, **options):
    noise = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    image, file = Image.fromarray(noise).resize((96, 72)), io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


PICTURES = {
    "JPEG": [encoded("JPEG"), encoded("JPEG", progressive=True)],
    "PNG": [encoded("PNG"), encoded("PNG", compress_level=0)],
    "GIF": [encoded("GIF")], "WEBP": [encoded("WEBP"), encoded("WEBP", lossless=True)],
    "TIFF": [encoded("TIFF"), encoded("TIFF", compression="tiff_lzw")], "BMP": [encoded("BMP")]}


def picture_mutants(form, n):
    generator = random.Random(form)
    for i in range(n):
        other = generator.choice(PICTURES[generator.choice([*PICTURES])])
        yield i, mutated(generator.choice(PICTURES[form]), generator, other)


@pytest.mark.parametrize("form", PICTURES)
def test_mutated_pictures(form):
    def read(content, name="whole"):
        assert to_pixels([read_image(content, name, 32)], 32).shape == (1, 32, 32, 3)

    tally = Tally(form, lambda: [read(content) for content in PICTURES[form]])
    for i, content in picture_mutants(form, scale(12, 100)):
        tally.attempt([f"{i}.jpg"], partial(read, content, f"{i}.jpg"))
    tally.show()


@pytest.mark.parametrize("form", ["zip", "tar"])
def test_mutated_archives(form, tmp_path, capsys):
    file, generator = io.BytesIO(), random.Random(form)
    names = [f"folder/{name}.{name}" for name in PICTURES]
    if form == "zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.writestr(name, PICTURES[name.split(".")[1]][0])
    else:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name in names:
                header = tarfile.TarInfo(name)
                header.size = len(PICTURES[name.split(".")[1]][0])
                archive.addfile(header, io.BytesIO(PICTURES[name.split(".")[1]][0]))
    whole, path = file.getvalue(), tmp_path / f"whole.{form}"
    headers = [i for name in names for i in positions(whole, name.encode())]
    path.write_bytes(whole)
    tally = Tally(form, lambda: read_all(path, names))
    for i in range(scale(15, 100)):
        at = max(0, generator.choice(headers) - generator.choice((0, 30, 46)))
        path = tmp_path / f"{i}.{form}"
        path.write_bytes(whole[:at] + mutated(whole[at:], generator, whole))
        called = [name.split("/")[1] for name in names]  # found by that, if the folder is another
        tally.attempt([path.name, *called], partial(read_all, path, names))
    tally.show()


def read_all(path, names):
    """Every picture of an archive; the last refusal is raised again."""
    pictures, refused = open_images(str(path)), None
    for name in names:
        try:
            read_image(pictures(name), name)
        except ImageError as error:
            refused = error
    if refused:
        raise refused


def positions(content, part):
    at = -1
    while (at := content.find(part, at + 1)) >= 0:
        yield at


# -------------------------------------------------------------------------------------------- rows


def good_rows():
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
    return [{"id": "7", "image": "a.JPEG", "conversations": turns},
            {"image_path": "/home/someone/b.PNG", "caption": "A dog."},
            {"images": ["a.JPEG", "b.PNG"], "messages": said},
            {"messages": said}, {"text": "Once upon a time.", "prompt": "Why?", "output": "So."},
            {"instruction": "Add.", "input": 3, "response": "4", "input_quality": "good",
             "instruct_reward": 1.5, "language": "EN", "uuid": "u", "min_similar_uuid": "u"}]


def row_mutants(n, seed):
    """Lines of JSON, half of them changed as values, half as bytes."""
    generator = random.Random(seed)
    for _ in range(n):
        row = generator.choice(good_rows())
        line = json.dumps(row).encode()
        if generator.random() < 0.6:
            for _ in range(generator.choice((1, 1, 2))):
                row = mutated_value(row, generator)
            yield json.dumps(row).encode()
        else:
            yield mutated(line, generator, line).replace(b"\n", b" ").replace(b"\r", b" ") or b"!"


@pytest.fixture(scope="module")
def picture_folder(tmp_path_factory):
    """Pictures as they are, and mutants of them under names that rows may have."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "a.JPEG").write_bytes(PICTURES["JPEG"][0])
    (folder / "b.PNG").write_bytes(PICTURES["PNG"][0])
    for form in PICTURES:
        for i, content in picture_mutants(form, 5):
            (folder / f"{form}{i}.png").write_bytes(content)
    return folder


@pytest.mark.parametrize("flags", [
    ("images", "--image_size=16"), ("images", "--image_size=16", "--copy=False"),
    ("chat", "--min_quality=poor"), ("text",)], ids=" ".join)
def test_mutated_rows(flags, picture_folder, world_data, tmp_path):
    """Every line is used or counted as left out, with a reason and the names of the first ones."""
    lines = list(row_mutants(scale(60, 400), " ".join(flags)))
    lines += [json.dumps({"image": path.name, "caption": "A picture.", "text": path.name}).encode()
              for path in picture_folder.iterdir()]
    lines = [line for line in lines if line.strip()]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    pictures = [f"--image_root={picture_folder}"] if flags[0] == "images" else []
    with limited(flags):
        result = run("prepare.py", *flags, *pictures, f"--files={tmp_path}/rows.jsonl",
                     f"--tokenizer={world_data}/text", f"--out={tmp_path}/out", "--val_share=0.3")
    assert result.status == 0, result.err
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    refused = sum(found["rows"] for found in manifest["left_out"].values())
    numbers = re.findall(r"(\d+) (?:chats|documents)", result.out)
    used = sum(map(int, numbers))
    assert used + refused == len(lines) and used > 10 and refused > 10
    for reason, found in manifest["left_out"].items():
        assert reason and len(reason) < 200 and reason.isprintable(), reason
        assert all(name.startswith("rows.jsonl:") for name in found["first"]) and found["first"]
    print(f"{' '.join(flags)}: {len(lines)} rows, {refused} refused, {used} accepted")


def test_mutated_rows_are_looked_at_by_check(picture_folder, world_data, tmp_path):
    lines = list(row_mutants(scale(60, 400), "check"))
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    with limited("check"):
        result = run("prepare.py", "check", tmp_path / "rows.jsonl", f"--sheet={tmp_path}/s.png",
                     f"--image_root={picture_folder}", f"--tokenizer={world_data}/text")
    assert result.status == 0, result.err
    assert result.out.splitlines()[-1]


def test_a_file_with_a_name_that_is_no_text_is_read(world_data, tmp_path):
    """As from an old disk: what is said of its rows is text nevertheless, for any terminal."""
    path = os.fsencode(tmp_path) + b"/\xff\x1b[31m.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"text": "Once."}\n' * 20 + "{}\n")
    result = run("prepare.py", "text", f"--files={tmp_path}/*.jsonl", f"--out={tmp_path}/out",
                 f"--tokenizer={world_data}/text")
    assert result.status == 0, result.err
    assert "left out 1 rows: no text in the field text (??[31m.jsonl:21)" in result.out


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet"])
def test_mutated_files_of_rows(form, tmp_path):
    """The file is refused by its name, or its rows are read, each with a name."""
    generator, path = random.Random(form), tmp_path / f"rows.{form}"
    rows = [row for row in good_rows() if "conversations" in row or "messages" in row]
    if form == "parquet":
        columns = {key: None for row in rows for key in row}
        rows = [columns | row for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows * 3), path)
    else:
        path.write_text(json.dumps(rows * 3) if form == "json" else
                        "".join(json.dumps(row) + "\n" for row in rows * 3))
    whole, tally = path.read_bytes(), Tally(form, lambda: read_rows(path))
    for _ in range(scale(20, 150)):
        at = max(0, len(whole) - generator.choice((len(whole), 2000, 200)))  # a table is at the end
        path.write_bytes(whole[:at] + mutated(whole[at:], generator, whole))
        tally.attempt([path.name], lambda: read_rows(path))
    tally.show()


def read_rows(path):
    for where, row, _ in Files(str(path)).rows():
        assert where.startswith(f"{path.name}:")
        try:
            row = parsed(row)
            images_of(row, messages_of(row))
        except (ValueError, TypeError) as error:  # as journal.work counts them
            raise UserError(f"{where}: {error}") from None


# ------------------------------------------------------------------- settings, vocabularies, arrays

LITERALS = ("[]", "None", r'"\ud800"', r'"\0"', "1e999", "-1", "10**9", "'a' * 9", "(" * 500, "{}",
            "b'x'", "__import__('os').mkdir('it_ran')", "0x" + "F" * 5000, "9" * 5000, "lambda: 1",
            "-" * 5000 + "1", "[" * 3000 + "]" * 3000, "f'{1}'", "float('nan')", '"nan"', "1j",
            "...", "2**70", str(2**70), "True", "'''", "\\", "x := 5", "*a", "\N{DIGIT ONE}")


SHAPES = (b"(5**9,)", b"(-5,)", b"(True,)", b"()", b"'O'", b"[[]]", b"(10**99,)", b"None", b"((((",
          b"'V9'", b"'M8'", b"(9" + b"9" * 20 + b",)")


def test_mutated_config_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = [(path, stage.Config) for stage in STAGES
               for path in sorted(ROOT.glob(f"configs/*/{stage.__name__}.py"))]
    generator, tally = random.Random(5), Tally("config files", lambda: [
        parse(config, [str(path)]) for path, config in configs])
    for _ in range(scale(25, 150)):
        source, config = generator.choice(configs)
        text = source.read_bytes()
        if generator.random() < 0.6:
            lines = text.decode().splitlines()
            i = generator.choice([i for i, line in enumerate(lines) if " = " in line])
            lines[i] = lines[i].split(" = ")[0] + " = " + generator.choice(LITERALS)
            text = "\n".join(lines).encode()
        else:
            text = mutated(text, generator, text)
        (tmp_path / "config.py").write_bytes(text)
        tally.attempt(["config.py", "--"], partial(parse, config, ["config.py"]))
    assert not (tmp_path / "it_ran").exists()
    tally.show()


def test_mutated_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator, tally = random.Random(6), Tally("flags", lambda: parse(
        pretrain.Config, ["--seed=4", "--max_steps=3"]))
    fields = [field for stage in STAGES for field in stage.Config.__dataclass_fields__.values()]
    for _ in range(scale(25, 150)):
        field = generator.choice(fields)
        flag = f"--{field.name}={generator.choice((*LITERALS, field.default))}"
        if generator.random() < 0.5:
            flag = mutated(flag.encode(), generator, b"--out=x").decode("utf-8", "surrogateescape")
        flag = flag if flag.startswith("-") else f"-{flag}"
        name = flag.split("=")[0].removeprefix("--")
        tally.attempt([repr(name[:20])[1:-1], "--"],
                      partial(parse, pretrain.Config, [flag, "--max_steps=3"]))
    tally.show()


def test_mutated_vocabularies(tmp_path):
    """One that is taken gives text no special id, and its own text back or none."""
    def use():
        tokenizer = tokenizers.load(tmp_path)
        ids = tokenizer.encode("the cat <|end|> é \0 \ud800")
        assert max(ids, default=0) < tokenizer.end_of_text < tokenizer.n_vocab
        assert isinstance(tokenizer.decode(ids), str)

    source = tokenizers.train(["the cat sat on the mat, said the cat"] * 3, 300).source
    (tmp_path / "tokenizer.json").write_text(source)
    generator, tally = random.Random(7), Tally("tokenizer.json", use)
    for _ in range(scale(20, 150)):
        if generator.random() < 0.5:
            text = json.dumps(mutated_value(json.loads(source), generator)).encode()
        else:
            text = mutated(source.encode(), generator, source.encode())
        (tmp_path / "tokenizer.json").write_bytes(text)
        tally.attempt(["tokenizer.json"], use)
    tally.show()


@pytest.mark.filterwarnings("ignore")  # of NumPy, about headers of Python 2
@pytest.mark.parametrize("dtype", ["uint16", "int64", "bool"])
def test_mutated_arrays(dtype, tmp_path):
    def read():
        assert read_array(path, dtype).ndim == 1

    generator, path = random.Random(dtype), tmp_path / "a.npy"
    np.save(path, np.arange(500).astype(dtype))
    whole, tally = path.read_bytes(), Tally(f"npy of {dtype}", read)
    for _ in range(scale(15, 70)):
        header = generator.choice((whole[:128], whole))
        text = mutated(header, generator, header)
        if generator.random() < 0.3:  # a shape or type that a program might stumble over
            old, new = generator.choice((b"(500,)", b"'<u2'", b"False")), generator.choice(SHAPES)
            text = whole[:128].replace(old, new).ljust(128)[:128]
        path.write_bytes(text + whole[128:] if len(text) <= 128 else text)
        tally.attempt(["a.npy"], read)
    tally.show()
