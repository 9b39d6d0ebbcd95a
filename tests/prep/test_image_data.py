"""The claims of prepare.py images: images from any container, used or counted by reason."""

import struct
import zlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import run
from PIL import Image, PngImagePlugin
from test_archives import FORMS, store
from test_prepare import asked, chats, encoded, left_out, manifest, prepared, write_rows
from test_resumable import about

import tokenizer as tokenizers
from common.checkpoint import sums
from data import Chats, ImageSpec
from train.packing import Captions

RED, BLUE, GREY, WHITE = (250, 10, 10), (10, 10, 250), (122, 116, 104), (255, 255, 255)


def red(width=40, height=20, mode="RGB"):
    return Image.new("RGB", (width, height), RED).convert(mode)


def bomb():
    """A PNG whose header claims 60000 x 60000 pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
            + struct.pack(">I", zlib.crc32(chunk)) + encoded(red(), "PNG")[33:])


def wild_images():
    """{name: (bytes, reason why it is refused or "", colors as (y, x, color))}."""
    text = PngImagePlugin.PngInfo()
    text.add_text("text", "x" * 3_000_000, zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = red()
    rotated.paste(BLUE, (20, 0, 40, 20))  # blue on the right: at the bottom after rotation
    palette = Image.new("P", (40, 20), 1)
    palette.putpalette([0, 0, 0, *RED])
    palette.paste(0, (0, 0, 20, 20))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    gif = encoded(red(), "GIF", save_all=True, append_images=[Image.new("RGB", (40, 20), "blue")])
    wide = [(16, 16, RED), (2, 16, GREY)]  # padded above and below
    unreadable, truncated, large = ("an unreadable image", "a truncated image",
                                    "an image that is too large")
    return {
        "red.png": (encoded(red(), "PNG"), "", wide),
        "red.webp": (encoded(red(), "WEBP"), "", wide),
        "one.png": (encoded(red(1, 1), "PNG"), "", [(2, 2, RED)]),
        "long.png": (encoded(red(20000, 10), "PNG"), "", [(2, 16, GREY), (30, 16, GREY)]),
        "cmyk.jpg": (encoded(red(mode="CMYK"), "JPEG"), "", wide),
        "palette.png": (encoded(palette, "PNG", transparency=0), "",
                        [(16, 6, WHITE), (16, 26, RED)]),
        "moving.gif": (gif, "", wide), "gif.jpg": (gif, "", wide),
        "rotated.jpg": (encoded(rotated, "JPEG", exif=exif, quality=95), "",
                        [(6, 16, RED), (26, 16, BLUE), (16, 2, GREY)]),
        "text.png": (encoded(red(), "PNG", pnginfo=text), "", wide),
        "bomb.png": (bomb(), large, ()),
        "large.png": (encoded(Image.new("1", (8000, 6251)), "PNG"), large, ()),
        "cut.jpg": (encoded(noise, "JPEG")[:1500], truncated, ()),
        "cut.png": (encoded(noise, "PNG")[:1000], truncated, ()),
        "empty.jpg": (b"", unreadable, ()), "text.jpg": (b"not an image", unreadable, ()),
    }


WILD = wild_images()
GOOD = [name for name, (_, reason, _) in WILD.items() if not reason]


def convert(folder, vocabulary, rows, root, *flags, out="out"):
    """prepare.py images on some rows, all of them for training; returns what it printed."""
    path = write_rows(folder / "rows.json", list(rows))
    val = write_rows(folder / "val.jsonl", [{"prompt": "What?", "output": "It."}])
    return prepared("images", f"--files={path}", f"--val_files={val}", f"--image_root={root}",
                    "--image_size=32", f"--tokenizer={vocabulary}", f"--out={folder}/{out}", *flags)


def images_in(folder, split="train"):
    """The images of each chat, as arrays."""
    found = Chats(folder, split)
    return [[np.asarray(image).astype(int) for image in found.images(i)]
            for i in range(len(found))]


@pytest.fixture(scope="module")
def wild(tmp_path_factory, vocabulary):
    """A folder with a data set of every WILD image in `out`, made from a folder."""
    folder = tmp_path_factory.mktemp("wild")
    files = [(f"p/{name}", content) for name, (content, *_) in WILD.items()]
    root = store(folder / "images", "folder", files)
    (root / "p/folder.jpg").mkdir()
    convert(folder, vocabulary, [*map(asked, WILD), asked("p/folder.jpg")], root)
    return folder


@pytest.mark.parametrize("name", [*WILD, "folder.jpg"])
def test_an_image_is_decoded_or_counted_by_its_reason(name, wild):
    where = f"rows.json:{[*WILD, 'folder.jpg'].index(name) + 1}"
    _, reason, colors = WILD.get(name, (b"", "an unreadable image", ()))
    reasons = {reason for reason, found in manifest(wild / "out")["left_out"].items()
               if where in found["first"]}
    assert reasons == ({reason} if reason else set())
    if not reason:
        (image,) = images_in(wild / "out")[GOOD.index(name)]
        assert image.shape == (32, 32, 3)
        for y, x, color in colors:
            assert np.abs(image[y, x] - color).max() < 60, (name, y, x, image[y, x])


@pytest.mark.parametrize("form", FORMS)
def test_the_data_set_is_the_same_from_every_container(form, wild, vocabulary, tmp_path):
    root = store(tmp_path, form, [(f"./in/{name}", content)
                                  for name, (content, *_) in WILD.items()])
    convert(tmp_path, vocabulary, [*map(asked, WILD), asked("gone.jpg")], root)
    assert sums(tmp_path / "out") == sums(wild / "out")
    counts = left_out(wild / "out")
    counts["an unreadable image"] -= 1  # the folder with a file's name
    assert left_out(tmp_path / "out") == counts | {"a missing image": 1}


@pytest.mark.parametrize("kind", ["dict", "bytes", "list", "hub"])
def test_images_inside_parquet(kind, wild, vocabulary, tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    items = [{"bytes": content, "path": name} for name, (content, *_) in WILD.items()]
    values = {"bytes": [item["bytes"] for item in items],
              "list": [[item] for item in items]}.get(kind, items)
    columns = {"images" if kind == "list" else "image": values,
               "conversations": [turns] * len(values)}
    path = tmp_path / "rows/train.parquet"
    path.parent.mkdir()
    if kind == "hub":
        import datasets

        datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).to_parquet(path)
    else:
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    source = f"--dataset={tmp_path}/rows" if kind == "hub" else f"--files={path}"
    prepared("images", source, f"--val_files={wild}/val.jsonl", "--image_size=32",
             f"--tokenizer={vocabulary}", f"--out={tmp_path}/out")
    assert sums(tmp_path / "out/train") == sums(wild / "out/train")
    assert sum(left_out(tmp_path / "out").values()) == len(WILD) - len(GOOD)


@pytest.mark.parametrize("form", ["folder", "a.zip", "a.tar", "one.zip,two"])
def test_a_name_that_fits_several_images_is_refused_and_counted(form, vocabulary, tmp_path):
    shades = [encoded(Image.new("RGB", (9, 9), (80 * i, 0, 0)), "PNG") for i in range(3)]
    (tmp_path / "in").mkdir()
    root = store(tmp_path / "in", form, [("cats/1.png", shades[0]), ("dogs/1.png", shades[1]),
                                         ("cats/2.png", shades[2]), ("copy/2.png", shades[2])])
    names = ["birds/1.png", "1.png", "birds/cats/x/1.png",  # these fit both, or none of the folders
             "dogs/1.png", "images/cats/1.png", "2.png", "birds/2.png"]
    convert(tmp_path, vocabulary, map(asked, names), root)
    assert manifest(tmp_path / "out")["left_out"] == {"a name that fits several images": {
        "rows": 3, "first": ["rows.json:1", "rows.json:2", "rows.json:3"]}}
    assert [round(image[16, 16, 0] / 80) for image, in images_in(tmp_path / "out")] == [1, 0, 2, 2]


def numbered(n=12):
    rng = np.random.default_rng(0)
    return [(f"{i}.bmp", encoded(Image.fromarray(rng.integers(0, 8, (24, 24, 3), np.uint8)), "BMP"))
            for i in range(n)]


def cut_at(content, after):
    return content[: content.index(b"8.bmp") + after]


def flip(content, after):
    at = content.index(b"3.bmp") + after
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


@pytest.mark.parametrize("name, content, message", [
    ("page.zip", b"<html>not found</html>", "neither a folder nor"),
    ("none.tar", b"", "neither a folder nor"),
    ("gone.zip", None, "no file matches"),
    ("a.zip", b"PK\5\6" + bytes(18), "damaged"),  # no files
    ("a.zip", lambda whole: cut_at(whole, 9), "damaged"),
    ("a.tar", lambda whole: cut_at(whole, 900), "damaged"),
    ("a.tar", lambda whole: cut_at(whole, 300), "damaged"),
    ("a.tar.zst", lambda whole: whole[:-300], "damaged"),
    ("a.tar.gz", lambda whole: whole[: len(whole) // 2], "damaged"),
    ("a.tar.bz2", lambda whole: whole[:-300], "damaged"),
    ("a.tar.xz", lambda whole: whole[:-300], "damaged"),
])
def test_a_root_that_is_incomplete_or_has_no_images_is_refused(name, content, message, vocabulary,
                                                               tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [asked("1.bmp")] * 3)
    if callable(content):
        content = content(store(tmp_path, name, numbered()).read_bytes())
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refusal = run("prepare.py", "images", f"--files={rows}", f"--image_root={tmp_path}/{name}",
                  f"--tokenizer={vocabulary}", f"--out={tmp_path}/out").refusal
    assert message in refusal and str(tmp_path / name) in refusal
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("form, after, reason", [  # in the data of a zip, in the header of a tar
    ("a.zip", 40, "an unreadable image"), ("a.tar", 150, "a missing image")])
def test_a_flipped_byte_in_an_archive_loses_one_image(form, after, reason, vocabulary, tmp_path):
    root = store(tmp_path, form, numbered())
    root.write_bytes(flip(root.read_bytes(), after))
    convert(tmp_path, vocabulary, [asked(name) for name, _ in numbered()], root)
    assert left_out(tmp_path / "out") == {reason: 1}
    assert len(Chats(tmp_path / "out", "train")) == 11


def test_a_row_has_up_to_four_images_or_none(vocabulary, tmp_path):
    shades = {f"{i}.png": encoded(Image.new("RGB", (9, 9), (50 * i, 0, 0)), "PNG")
              for i in range(6)}
    root = store(tmp_path / "images", "folder", list(shades.items()))
    names = list(shades)
    rows = [about(names[:2], "What?", "Red."),
            about(names[1:5], "<image> or <image>, <image>, <image>?", "Red."),
            about("", "What?", "Red.", images=names[3:5]), about([], "What?", "Red."),
            about("", "What?", "Red.", image_path=names[5]),
            about(names[1], "Say <image> what?", "Red.")]
    convert(tmp_path, vocabulary, rows, root)
    found = [[round(image[16, 16, 0] / 50) for image in images]
             for images in images_in(tmp_path / "out")]
    assert found == [[0, 1], [1, 2, 3, 4], [3, 4], [], [5], [1]]
    texts = [text for text, _ in chats(tmp_path / "out")]
    assert [text.count("<|image|>") for text in texts] == [2, 4, 2, 0, 1, 1]
    assert "<|user|><|image|>What?" in texts[4] and "Say <|image|> what?" in texts[5]
    captions = Captions(Chats(tmp_path / "out", "train"), tokenizers.load(vocabulary),
                        ImageSpec(1, 32), 16)
    assert len(captions) == 2  # the rows with one image


BROKEN = {
    "a missing image": asked("gone.png"), "a truncated image": asked("cut.jpg"),
    "another number of images than of marks in the text": asked("red.png", "<image> or <image>?"),
    "an image that is neither a name nor bytes": asked({"size": 7}),
    "row is not a JSON object": "red.png", "turns of another form": ["red.png"],
}


def test_broken_rows_are_counted_and_change_nothing(wild, vocabulary, tmp_path):
    good = [asked(GOOD[i % len(GOOD)], f"<image>\nWhat {i}?") for i in range(3 * len(BROKEN))]
    mixed = [row for pair in zip(good, [*BROKEN.values()] * 3, strict=True) for row in pair]
    for name, rows in ("clean", good), ("mixed", mixed):
        convert(tmp_path, vocabulary, rows, wild / "images", out=name)
    assert left_out(tmp_path / "mixed") == dict.fromkeys(BROKEN, 3)
    assert sums(tmp_path / "clean") == sums(tmp_path / "mixed")


def test_images_are_split_over_files_at_image_boundaries(wild, vocabulary, tmp_path):
    sizes = {}
    for n in 1, 2500, 10**9:
        convert(tmp_path, vocabulary, map(asked, GOOD * 3), wild / "images", f"--shard_bytes={n}",
                out=f"{n}")
        shards = sorted((tmp_path / f"{n}/train").glob("images_*.bin"))
        sizes[n] = [path.stat().st_size for path in shards]
        ends = np.load(tmp_path / f"{n}/train/image_offsets.npy")
        assert set(np.cumsum(sizes[n])) <= set(ends) and ends[-1] == sum(sizes[n])
        assert str(images_in(tmp_path / f"{n}")) == str(images_in(tmp_path / "1"))
    assert len(sizes[1]) == len(GOOD) * 3 and len(sizes[10**9]) == 1
    assert 1 < len(sizes[2500]) < len(GOOD) * 3 and max(sizes[2500]) <= 2500


def test_the_short_side_is_stored_for_training_to_crop(vocabulary, tmp_path):
    sizes = {"wide.png": (90, 40), "high.jpg": (20, 50), "thin.png": (900, 1),
             "large.jpg": (900, 600)}
    root = store(tmp_path / "images", "folder", [
        (name, encoded(red(*size), name[-3:].replace("jpg", "jpeg"))) for name, size in
        sizes.items()])
    convert(tmp_path, vocabulary, map(asked, sizes), root, "--fit=short")
    assert [image.shape[:2] for (image,) in images_in(tmp_path / "out")] == [
        (32, 72), (80, 32), (32, 256), (32, 48)]
    assert manifest(tmp_path / "out")["stored_images"] == {"size": 32, "fit": "short"}


def test_a_replaced_archive_restarts_the_conversion(vocabulary, tmp_path, interrupted):
    root = store(tmp_path, "a.zip", numbered(20))
    rows = write_rows(tmp_path / "rows.json", [asked(f"{i % 40}.bmp") for i in range(160)])
    argv = ["images", f"--files={rows}", f"--image_root={root}", "--image_size=32",
            f"--tokenizer={vocabulary}", f"--out={tmp_path}/out"]
    interrupted(*argv)
    store(tmp_path, "a.zip", numbered(40))
    assert "left out" not in prepared(*argv)


def stored(folder, split):
    """The encoded images of each chat."""
    found = Chats(folder, split)
    return [{found._bytes(n) for n in range(*found.first_image[i : i + 2])}
            for i in range(len(found))]


def test_no_image_is_both_in_training_and_in_validation(vocabulary, tmp_path):
    files = numbered(60)
    root = store(tmp_path, "a.tar", files + [(f"copy{name}", image) for name, image in files[:10]])
    rng = np.random.default_rng(0)
    rows = [asked(f"{i % 60}.bmp") for i in range(120)]
    rows += [asked([f"copy{i}.bmp", f"{i + 30}.bmp"], "What?") for i in range(10)]  # links two
    rows += [{"prompt": f"Say {i}.", "output": "It."} for i in range(20)]
    rows = write_rows(tmp_path / "rows.json", [rows[i] for i in rng.permutation(len(rows))])
    held_out = []
    for seed in range(2):
        out = tmp_path / f"{seed}"
        prepared("images", f"--files={rows}", f"--image_root={root}", "--image_size=9",
                 f"--tokenizer={vocabulary}", f"--out={out}", f"--seed={seed}", "--val_share=0.2")
        train, val = stored(out, "train"), stored(out, "val")
        assert (len(train), len(val)) == (120, 30) and sum(map(len, val)) > 10
        assert not set().union(*train) & set().union(*val)
        held_out.append(set().union(*val))
    assert held_out[0] != held_out[1]


def test_the_smallest_of_large_groups_is_held_out_and_never_all(vocabulary, tmp_path):
    root = store(tmp_path, "folder", numbered(3))
    argv = ["images", f"--image_root={root}", "--image_size=9", f"--tokenizer={vocabulary}",
            f"--out={tmp_path}/out"]
    rows = write_rows(tmp_path / "a.json", [asked(f"{i}.bmp") for i in (0, 1, 2, 0, 2, 1, 0, 2)])
    prepared(*argv, f"--files={rows}", "--val_share=0.1")
    assert [len(stored(tmp_path / "out", split)) for split in ("train", "val")] == [6, 2]
    rows = write_rows(tmp_path / "b.json", [asked("0.bmp")] * 8)
    assert "no chat is left for validation" in run("prepare.py", *argv, f"--files={rows}").refusal
