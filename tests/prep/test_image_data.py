"""The claims of prepare.py images: pictures from anywhere, none lost or mixed up in silence."""

import io
import json
import os
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import logged, run
from PIL import Image, PngImagePlugin
from test_prepare import asked, chats, encoded, prepared, write_rows

import tokenizer as tokenizers
from common import archives
from common.checkpoint import sums
from common.config import UserError
from common.images import ImageError
from data import Chats
from prep.unpack import unpacked

RED = (250, 10, 10)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    tokenizers.train(["What is it? It is red. <image>"] * 9, 280).save(folder)
    return folder


def red(width=40, height=20, mode="RGB"):
    return Image.new("RGB", (width, height), RED).convert(mode)


def bomb():
    """A PNG whose header claims 60000 x 60000 pixels."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return (b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
            + struct.pack(">I", zlib.crc32(chunk)) + encoded(red(), "PNG")[33:])


def in_the_wild():
    """{name: (bytes, the reason why it cannot be used, or "")}."""
    story = PngImagePlugin.PngInfo()
    story.add_text("story", "x" * 3_000_000, zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = red()
    turned.paste((10, 10, 250), (20, 0, 40, 20))  # blue on the right: below, once it is turned
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    gif = encoded(red(), "GIF", save_all=True, append_images=[Image.new("RGB", (40, 20), "blue")])
    unreadable, large = "an unreadable image", "an image that is too large"
    return {
        "red.png": (encoded(red(), "PNG"), ""), "one.png": (encoded(red(1, 1), "PNG"), ""),
        "long.png": (encoded(red(20000, 10), "PNG"), ""),
        "cmyk.jpg": (encoded(red(mode="CMYK"), "JPEG"), ""),
        "deep.png": (encoded(Image.fromarray(ramp), "PNG"), ""),
        "palette.png": (encoded(red(mode="P"), "PNG", transparency=0), ""),
        "moving.gif": (gif, ""), "gif.jpg": (gif, ""),
        "turned.jpg": (encoded(turned, "JPEG", exif=exif, quality=95), ""),
        "story.png": (encoded(red(), "PNG", pnginfo=story), ""),
        "bomb.png": (bomb(), large), "cut.jpg": (encoded(noise, "JPEG")[:1500],
                                                 "a truncated image"),
        "empty.jpg": (b"", unreadable), "text.jpg": (b"not a picture", unreadable),
        "html.png": (b"<html>404</html>", unreadable),
    }


WILD = in_the_wild()
FORMS = ("folder", "a.zip", "a.tar", "a.tar.gz", "a.tar.zst", "many_*.tar", "cut.tar.part-*",
         "cut.tar.zst.part-*", "cut.zip.part-*", "one.zip,two")


def keep(folder, form, files):
    """Put files (pairs of name and bytes) into a folder in one of the FORMS; returns the root."""
    if form == "folder":
        for name, content in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder
    root = folder / form
    if "," in form:
        first, second = form.split(",")
        keep(folder, first, files[::2])
        keep(folder / second, "folder", files[1::2])
        return f"{folder}/{first}, {folder}/{second}"
    if form.endswith("part-*"):
        keep(folder, form.removesuffix(".part-*"), files)
        whole = folder / form.removesuffix(".part-*")
        content, n = whole.read_bytes(), whole.stat().st_size // 10 + 1
        for i in range(10):
            (folder / form.replace("*", str(i + 1))).write_bytes(content[i * n : i * n + n])
        whole.unlink()
    elif "*" in form:
        for i in range(3):
            keep(folder, form.replace("*", str(i)), files[i::3])
    elif form.endswith(".zip"):
        with zipfile.ZipFile(root, "w", zipfile.ZIP_DEFLATED) as archive:
            for i, (name, content) in enumerate(files):
                archive.writestr(name, content, zipfile.ZIP_STORED if i % 2 else None)
    else:
        root.write_bytes(packed_tar(files, form.rpartition(".")[2]))
    return root


def packed_tar(files, ending="tar"):
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    if ending == "tar":
        return tar.getvalue()
    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, {"zst": "zstd", "gz": "gzip"}[ending]) as stream:
        stream.write(tar.getvalue())
    return packed.getvalue().to_pybytes()


def made(folder, vocabulary, rows, root, *flags, out="out"):
    """prepare.py images on some rows, all of them for training; returns what it printed."""
    path = write_rows(folder / "rows.json", list(rows))
    if not (folder / "val.jsonl").exists():
        write_rows(folder / "val.jsonl", [{"prompt": "What?", "output": "It."}])
    return prepared("images", f"--files={path}", f"--val_files={folder}/val.jsonl",
                    f"--image_root={root}", "--image_size=32", f"--tokenizer={vocabulary}",
                    f"--out={folder}/{out}", *flags)


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def left_out(folder):
    return {reason: found["rows"] for reason, found in manifest(folder)["left_out"].items()}


def pictures(folder, split="train"):
    """The pictures of each chat, as arrays."""
    found = Chats(folder, split)
    return [[np.asarray(image).astype(int) for image in found.images(i)]
            for i in range(len(found))]


# ------------------------------------------------------------------------- pictures in the wild


@pytest.fixture(scope="module")
def wild(tmp_path_factory, vocabulary):
    """A folder with a data set of every WILD picture in `out`, made from a folder."""
    folder = tmp_path_factory.mktemp("wild")
    root = keep(folder / "pictures", "folder", [(f"p/{n}", c) for n, (c, _) in WILD.items()])
    (root / "p/folder.jpg").mkdir()
    made(folder, vocabulary, [*map(asked, WILD), asked("p/folder.jpg")], root)
    return folder


@pytest.mark.parametrize("name", [*WILD, "folder.jpg"])
def test_a_picture_in_the_wild_is_used_or_counted_by_its_reason(name, wild):
    names = [*WILD, "folder.jpg"]
    where, reason = f"rows.json:{names.index(name) + 1}", WILD.get(name, (0, ""))[1]
    reason = reason or ("an unreadable image" if name == "folder.jpg" else "")
    named = {reason for reason, found in manifest(wild / "out")["left_out"].items()
             if where in found["first"]}
    assert named == ({reason} if reason else set())
    if not reason:
        good = [name for name, (_, reason) in WILD.items() if not reason]
        (seen,) = pictures(wild / "out")[good.index(name)]
        assert seen.shape == (32, 32, 3)
        grey, blue = (122, 116, 104), (10, 10, 250)
        spots = {"turned.jpg": [(6, 16, RED), (26, 16, blue), (16, 2, grey)],
                 "deep.png": [(2, 16, (16,) * 3), (30, 16, (240,) * 3)],
                 "one.png": [(2, 2, RED)], "long.png": [(2, 16, grey), (30, 16, grey)],
                 }.get(name, [(16, 16, RED), (2, 16, grey)])
        for y, x, colour in spots:
            assert np.abs(seen[y, x] - colour).max() < 60, (name, y, x, seen[y, x])


@pytest.mark.parametrize("form", FORMS)
def test_pictures_are_the_same_wherever_they_are_kept(form, wild, vocabulary, tmp_path):
    files = [(f"./in/{name}", content) for name, (content, _) in WILD.items()]
    root = keep(tmp_path, form, files)
    made(tmp_path, vocabulary, [*map(asked, WILD), asked("gone.jpg")], root)
    assert sums(tmp_path / "out") == sums(wild / "out")
    counted = left_out(wild / "out") | {"a missing image": 1, "an unreadable image": 3}
    assert left_out(tmp_path / "out") == counted


# ------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("form", ["folder", "a.zip", "a.tar"])
def test_names_are_only_looked_up_and_never_lead_out_of_the_root(form, vocabulary, tmp_path):
    (tmp_path / "secret.png").write_bytes(WILD["red.png"][0])
    inside = tmp_path / "deep" / "root"
    inside.mkdir(parents=True)
    files = [("a/b.png", WILD["red.png"][0])]
    if form != "folder":
        files += [("../../evil.png", WILD["red.png"][0]), ("/tmp/evil2.png", WILD["red.png"][0])]
    root = keep(inside, form, files)
    before = sorted(tmp_path.rglob("*"))
    names = ["../../secret.png", f"{tmp_path}/secret.png", "a/b.png", "/x/b.png", "x\\b.png",
             "evil.png", "evil2.png"]
    made(tmp_path, vocabulary, map(asked, names), root)
    fresh = {p.relative_to(tmp_path).parts[0] for p in set(tmp_path.rglob("*")) - set(before)}
    assert fresh == {"out", "rows.json", "val.jsonl"}
    first = {"rows.json:1", "rows.json:2"} | ({"rows.json:6", "rows.json:7"}
                                              if form == "folder" else set())
    assert set(manifest(tmp_path / "out")["left_out"]["a missing image"]["first"]) == first


@pytest.mark.parametrize("form", ["folder", "a.zip", "a.tar"])
def test_of_several_with_one_base_name_the_folders_decide(form, tmp_path):
    names = ["vg/1.jpg", "train/1.jpg", "val/1.jpg", "1.jpg", "val/2.jpg"]
    find = archives.open_images(str(keep(tmp_path, form, [(n, n.encode()) for n in names])))
    for wanted, found in {"coco/train/1.jpg": "train/1.jpg", "/x/val/1.jpg": "val/1.jpg",
                          "1.jpg": "1.jpg", "x/2.jpg": "val/2.jpg"}.items():
        assert (find(wanted), find.name_of(wanted)) == (found.encode(), found)
    with pytest.raises(ImageError, match="no picture x/3"):
        find("x/3.jpg")


def test_parts_come_in_the_order_of_their_numbers(tmp_path):
    for i in (1, 2, 10):
        (tmp_path / f"part-{i}").write_text("x")
    assert [path.name for path in archives.local_paths(f"{tmp_path}/part-*")] == [
        "part-1", "part-2", "part-10"]


def test_a_root_without_pictures_is_refused_with_what_to_do(vocabulary, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [asked("red.png")] * 3)
    for name, content in {"page.zip": b"<html>not found</html>", "none.tar": b""}.items():
        (tmp_path / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "bare.zip", "w"):
        pass
    for root, said in {"page.zip": "neither a folder nor", "none.tar": "neither a folder nor",
                       "no": "no file matches", "bare.zip": "there is no file in it"}.items():
        result = run("prepare.py", "images", f"--files={rows}", f"--image_root={tmp_path}/{root}",
                     f"--tokenizer={vocabulary}", f"--out={tmp_path}/out")
        assert said in result.refusal and str(tmp_path / root) in result.refusal
    assert not list(tmp_path.glob("*out*"))


# ------------------------------------------------------------------------------- damaged archives


def numbered(n=12):
    rng = np.random.default_rng(0)
    return [(f"{i}.bmp", encoded(Image.fromarray(rng.integers(0, 8, (24, 24, 3), np.uint8)), "BMP"))
            for i in range(n)]


def spoilt_zip(content):
    content[content.index(b"3.bmp") + 40] ^= 255
    return content


def spoilt_tar(content):
    content[content.index(b"3.bmp") + 150] ^= 255  # in the header
    return content


@pytest.mark.parametrize("form, spoil, good, reason", [
    ("a.zip", lambda content: content[: content.index(b"8.bmp") + 9], 8, "a missing image"),
    ("a.zip", spoilt_zip, 11, "an unreadable image"),
    ("a.tar", lambda content: content[: content.index(b"8.bmp") + 900], 8, "a truncated image"),
    ("a.tar", lambda content: content[: content.index(b"8.bmp") + 300], 8, "a missing image"),
    ("a.tar", spoilt_tar, 11, "a missing image"),
])
def test_a_damaged_archive_loses_the_damaged_pictures_alone(form, spoil, good, reason, vocabulary,
                                                           tmp_path):
    root = keep(tmp_path, form, numbered())
    root.write_bytes(spoil(bytearray(root.read_bytes())))
    said = made(tmp_path, vocabulary, [asked(name) for name, _ in numbered()], root)
    found = left_out(tmp_path / "out")
    assert len(Chats(tmp_path / "out", "train")) == good and sum(found.values()) == 12 - good
    assert found[reason] > 0 and ("what comes before it is used" in said) == (good == 8)


def test_a_compressed_tar_that_ends_early_gives_what_it_has(vocabulary, tmp_path):
    rng = np.random.default_rng(1)
    files = [(f"{i}.png", encoded(Image.fromarray(rng.integers(0, 256, (256, 256, 3), np.uint8)),
                                  "PNG")) for i in range(20)]
    root = keep(tmp_path, "a.tar.zst", files)
    root.write_bytes(root.read_bytes()[:-500_000])
    said = made(tmp_path, vocabulary, [asked(name) for name, _ in files], root)
    assert f"the end of {root} is missing or damaged" in said
    assert 3 < len(Chats(tmp_path / "out", "train")) < 18


def test_unpacking_goes_on_after_a_stop_and_writes_no_byte_wrong(tmp_path):
    files = [(f"{i}.bin", os.urandom(300_000)) for i in range(12)]
    root, plain = keep(tmp_path, "a.tar.zst", files), packed_tar(files)
    done = unpacked([root], "zstd", tmp_path / "unpacked")
    assert done.read_bytes() == plain and len(list(done.parent.iterdir())) == 1
    for left in plain[:1_500_000], plain[:1_200_000] + bytes(900_000), b"", plain + b"more":
        done.unlink()
        done.with_suffix(".part").write_bytes(left)
        assert unpacked([root], "zstd", tmp_path / "unpacked").read_bytes() == plain[: len(plain)]


# -------------------------------------------------------------------------- rows and their pictures


def asked_of(names, text="What?", key="image"):
    return {key: names, "conversations": [{"from": "human", "value": text},
                                          {"from": "gpt", "value": "It is red."}]}


def test_a_row_has_up_to_four_pictures_or_none(vocabulary, tmp_path):
    shades = {f"{i}.png": encoded(Image.new("RGB", (9, 9), (50 * i, 0, 0)), "PNG")
              for i in range(6)}
    root = keep(tmp_path / "pictures", "folder", list(shades.items()))
    names = list(shades)
    rows = [asked_of(names[:2]), asked_of(names[1:5], "<image> or <image>, <image>, <image>?"),
            asked_of(names[3:5], key="images"), asked_of([]), asked_of(names[:5]),
            asked_of(names[:2], "One <image>?"), asked_of([], "An <image>?"),
            asked_of([names[0], 7]), asked_of([names[0], "gone.png"])]
    made(tmp_path, vocabulary, rows, root)
    found = [[round(image[16, 16, 0] / 50) for image in images]
             for images in pictures(tmp_path / "out")]
    assert found == [[0, 1], [1, 2, 3, 4], [3, 4], []]
    assert [text.count("<|image|>") for text, _ in chats(tmp_path / "out")] == [2, 4, 2, 0]
    assert left_out(tmp_path / "out") == {
        "more than 4 images": 1, "images and <image> marks do not match": 2,
        "an image that is neither a name nor bytes": 1, "a missing image": 1}


@pytest.mark.parametrize("kind", ["dict", "bytes", "list", "hub"])
def test_pictures_inside_parquet_are_used_as_they_are(kind, wild, vocabulary, tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    found = [(name, {"bytes": content, "path": name}) for name, (content, _) in WILD.items()]
    values = {"bytes": [item["bytes"] for _, item in found],
              "list": [[item] for _, item in found]}.get(kind, [item for _, item in found])
    columns = {"images" if kind == "list" else "image": values,
               "conversations": [turns] * len(values)}
    (tmp_path / "rows").mkdir()
    if kind == "hub":
        import datasets

        datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).to_parquet(
            tmp_path / "rows/train.parquet")
    else:
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows/train.parquet")
    source = (f"--dataset={tmp_path}/rows" if kind == "hub"
              else f"--files={tmp_path}/rows/train.parquet")
    prepared("images", source, f"--val_files={wild}/val.jsonl", "--image_size=32",
             f"--tokenizer={vocabulary}", f"--out={tmp_path}/out")
    assert sums(tmp_path / "out/train") == sums(wild / "out/train")
    assert left_out(tmp_path / "out") == left_out(wild / "out") | {"an unreadable image": 3}


@pytest.mark.parametrize("answers, asks", [
    (["Red."], True), (["It is red."], True), (["Red.", "Two of them."], True),
    (["It is quite red."], False), (["Red.", "There are two of them."], False)])
def test_short_answers_are_asked_for_where_all_are_short(answers, asks, vocabulary, tmp_path):
    root = keep(tmp_path / "pictures", "folder", [("red.png", WILD["red.png"][0])])
    turns = [{"role": "system", "content": "be kind"}]
    for answer in answers:
        turns += [{"role": "user", "content": "What?"}, {"role": "assistant", "content": answer}]
    made(tmp_path, vocabulary, [{"image": "red.png", "messages": turns}], root,
         "--short_answers=True")
    ((text, learnt),) = chats(tmp_path / "out")
    assert ("<|image|>What?\nAnswer with a word or a short phrase.<|end|>" in text) == asks
    assert text.count("Answer with") == asks and "Answer with" not in learnt


# -------------------------------------------------------------------- how pictures are written down


def test_pictures_are_divided_over_files_and_none_is_split(wild, vocabulary, tmp_path):
    names = [name for name, (_, reason) in WILD.items() if not reason] * 3
    for n in 1, 2500, 10**9:
        made(tmp_path, vocabulary, map(asked, names), wild / "pictures", f"--shard_bytes={n}",
             out=f"{n}")
    sizes = {}
    for n in 1, 2500, 10**9:
        folder = tmp_path / f"{n}" / "train"
        shards = sorted(folder.glob("images_*.bin"))
        sizes[n] = [path.stat().st_size for path in shards]
        assert [path.name for path in shards] == [
            f"images_{i:06d}.bin" for i in range(len(shards))]
        ends = np.load(folder / "image_offsets.npy")
        assert set(np.cumsum(sizes[n])) <= set(ends) and ends[-1] == sum(sizes[n])
        assert b"".join(path.read_bytes() for path in shards) == (
            tmp_path / "1000000000/train/images_000000.bin").read_bytes()
        assert str(pictures(tmp_path / f"{n}")) == str(pictures(tmp_path / "1"))
    assert len(sizes[1]) == len(names) and len(sizes[10**9]) == 1
    assert 1 < len(sizes[2500]) < len(names) and max(sizes[2500]) <= 2500


def test_the_short_side_can_be_kept_for_training_to_crop(vocabulary, tmp_path):
    sizes = {"wide.png": (90, 40), "high.jpg": (20, 50), "thin.png": (900, 1),
             "large.jpg": (900, 600)}
    root = keep(tmp_path / "pictures", "folder", [
        (name, encoded(red(*size), name[-3:].replace("jpg", "jpeg"))) for name, size in
        sizes.items()])
    made(tmp_path, vocabulary, map(asked, sizes), root, "--fit=short")
    assert [image.shape[:2] for (image,) in pictures(tmp_path / "out")] == [
        (32, 72), (80, 32), (32, 256), (32, 48)]
    assert manifest(tmp_path / "out")["stored_images"] == {
        "size": 32, "fit": "short", "copied": True}


@pytest.mark.parametrize("form", ["folder", "a.zip", "many_*.tar", "one.zip,two"])
def test_pictures_can_stay_where_they_are(form, vocabulary, tmp_path, monkeypatch):
    root = keep(tmp_path, form, [(f"in/{name}", content) for name, (content, _) in WILD.items()])
    monkeypatch.chdir(tmp_path)
    root = str(root).replace(f"{tmp_path}/", "").replace(f"{tmp_path}", ".")
    said = made(tmp_path, vocabulary, map(asked, WILD), root, "--copy=False")
    monkeypatch.chdir("/")
    good = [name for name, (_, reason) in WILD.items() if not reason]
    stored = (tmp_path / "out/train/images_000000.bin").read_bytes()
    assert stored.decode() == "".join(f"in/{name}" for name in good)
    assert "left out" in said and sum(left_out(tmp_path / "out").values()) == len(WILD) - len(good)
    entry = manifest(tmp_path / "out")["stored_images"]
    assert entry["copied"] is False and entry["root"].startswith(str(tmp_path))
    assert [images[0].shape[:2] for images in pictures(tmp_path / "out")][:3] == [
        (20, 40), (1, 1), (10, 20000)]


@pytest.mark.parametrize("pictures, why", [
    ({"copied": False}, "stored_images should be"),
    ({"copied": False, "root": 7}, "stored_images should be"),
    ({"size": "32", "fit": "pad"}, "stored_images should be"),
    ([32, "pad"], "stored_images should be"),
    ("pictures", "stored_images should be"),
    (None, "stored_images should be"),
])
def test_a_manifest_made_by_hand_that_makes_no_sense_is_a_sentence(
        pictures, why, vocabulary, tmp_path):
    root = keep(tmp_path / "pictures", "folder", [("red.png", WILD["red.png"][0])])
    made(tmp_path, vocabulary, [asked("red.png")], root, "--copy=False")
    file = tmp_path / "out/manifest.json"
    file.write_text(json.dumps(manifest(tmp_path / "out") | {"stored_images": pictures}))
    with pytest.raises(UserError, match=why) as error:
        Chats(tmp_path / "out", "train")
    assert str(file) in str(error.value)
    file.write_text("[]")
    with pytest.raises(UserError, match="malformed"):
        Chats(tmp_path / "out", "train")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted on Linux")
def test_chats_that_nobody_uses_any_more_keep_no_file_open(vocabulary, tmp_path):
    root = keep(tmp_path / "pictures", "folder", [("red.png", WILD["red.png"][0])])
    made(tmp_path, vocabulary, [asked("red.png")] * 3, root)

    def files():
        found = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        return [path for path in map(os.path.realpath, found) if str(tmp_path) in path]

    before, chats = len(files()), Chats(tmp_path / "out", "train")
    assert len(chats.images(0)) == 1 and len(files()) > before
    del chats
    assert len(files()) == before


def test_what_cannot_stay_where_it_is_is_an_error(vocabulary, tmp_path):
    root = keep(tmp_path, "a.tar.zst", [("red.png", WILD["red.png"][0])])
    path = write_rows(tmp_path / "rows.jsonl", [asked("red.png")] * 300)
    inside = tmp_path / "rows.parquet"
    images = [{"path": "red.png", "bytes": None}] * 299 + [{"bytes": WILD["red.png"][0]}]
    write_rows(inside, [{"image": image, "prompt": "What?", "output": "Red."} for image in images])
    argv = ("images", f"--tokenizer={vocabulary}", f"--out={tmp_path}/out", "--copy=False")
    assert "is compressed" in run("prepare.py", *argv, f"--files={path}",
                                  f"--image_root={root}").refusal
    assert "say --image_root" in run("prepare.py", *argv, f"--files={path}").refusal
    keep(tmp_path / "pictures", "folder", [("red.png", WILD["red.png"][0])])
    for _ in range(2):  # the second one goes on from what the first kept
        result = run("prepare.py", *argv, f"--files={inside}", f"--image_root={tmp_path}/pictures")
        assert "pictures inside the rows" in result.refusal
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------- the hub


def test_files_of_the_hub_are_fetched_by_their_name(vocabulary, tmp_path, monkeypatch):
    keep(tmp_path / "hub", "folder", [])
    (tmp_path / "hub").mkdir()
    keep(tmp_path / "hub", "many_*.tar", [("red.png", WILD["red.png"][0])] * 3)
    rows = [asked("red.png")] * 8
    write_rows(tmp_path / "hub/chat.json", [*rows, {"prompt": "What?", "output": "It."}])

    def download(repository, name, repo_type):
        assert (repository, repo_type) == ("owner/set", "dataset")
        if not (tmp_path / "hub" / name).exists():
            raise OSError(f"404: {name}\nsecond line")
        return str(tmp_path / "hub" / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, repository, repo_type:
                        sorted(path.name for path in (tmp_path / "hub").iterdir()))
    argv = ("images", f"--tokenizer={vocabulary}", f"--out={tmp_path}/out")
    said = prepared(*argv, "--files=hf://owner/set/chat.json",
                    "--image_root=hf://owner/set/many_*.tar")
    assert "train: 8 chats" in said and "left out" not in said
    for name, wanted in {"/no.json": "/no.json from the Hugging Face hub: 404: no.json; the same",
                         "": "names no file", "/*.csv": "no file matches"}.items():
        assert wanted in run("prepare.py", *argv, f"--files=hf://owner/set{name}").refusal


# ------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("form", ["a.zip", "a.tar", "a.tar.zst"])
def test_interrupted_and_resumed_it_makes_the_same_bytes(form, vocabulary, tmp_path, interrupted):
    root = keep(tmp_path, form, numbered(20))
    rows = write_rows(tmp_path / "rows.json", [asked(f"{i % 21}.bmp") for i in range(120)])
    argv = ["images", f"--files={rows}", f"--image_root={root}", "--image_size=32",
            f"--tokenizer={vocabulary}", "--shard_bytes=9000"]
    prepared(*argv, f"--out={tmp_path}/whole")
    interrupted(*argv, f"--out={tmp_path}/out")
    assert not (tmp_path / "out").exists()
    assert "resuming after 64" in prepared(*argv, f"--out={tmp_path}/out")
    assert sums(tmp_path / "out") == sums(tmp_path / "whole")
    assert manifest(tmp_path / "out") == manifest(tmp_path / "whole")
    assert len(list((tmp_path / "out/train").glob("images_*.bin"))) > 2


@pytest.mark.parametrize("form", ["a.zip", "a.tar"])
def test_an_archive_that_was_replaced_is_read_from_the_start(form, vocabulary, tmp_path,
                                                             interrupted):
    root = keep(tmp_path, form, numbered(40))
    whole = root.read_bytes()
    root.write_bytes(whole[: len(whole) // 2])
    rows = write_rows(tmp_path / "rows.json", [asked(f"{i % 40}.bmp") for i in range(160)])
    argv = ["images", f"--files={rows}", f"--image_root={root}", "--image_size=32",
            f"--tokenizer={vocabulary}", f"--out={tmp_path}/out"]
    interrupted(*argv)
    root.write_bytes(whole)
    said = prepared(*argv)
    assert "other settings or files: starting over" in said and "left out" not in said
    assert left_out(tmp_path / "out") == {}


def test_an_archive_is_indexed_once_until_it_is_replaced(tmp_path):
    root = str(keep(tmp_path, "a.zip", numbered(3)))
    first, again = (archives.open_images(root).parts[0] for _ in range(2))
    keep(tmp_path, "a.zip", numbered(4))
    other = archives.open_images(root).parts[0]
    assert first is again and (len(first.places), len(other.places)) == (3, 4)


# ---------------------------------------------------------------------------------- held-out rows


def stored(folder, split):
    """What is stored of the pictures of each chat: their bytes, or their names."""
    found = Chats(folder, split)
    return [{found._bytes(n) for n in range(*found.first_image[i : i + 2])}
            for i in range(len(found))]


@pytest.mark.parametrize("copied", [True, False])
def test_no_picture_is_trained_on_and_held_out_at_once(copied, vocabulary, tmp_path):
    shades = [encoded(Image.new("RGB", (9, 9), (4 * i, 200, 0)), "BMP") for i in range(60)]
    files = [(f"{i}.bmp", shade) for i, shade in enumerate(shades)]
    files += [(f"copy{i}.bmp", shade) for i, shade in enumerate(shades[:10])]
    root = keep(tmp_path, "a.tar", files)
    rng = np.random.default_rng(0)
    rows = [asked_of(f"{i % 60}.bmp") for i in range(120)]
    rows += [asked_of([f"copy{i}.bmp", f"{i + 30}.bmp"]) for i in range(10)]  # links two pictures
    rows += [{"prompt": f"Say {i}.", "output": "It."} for i in range(20)]
    rows = write_rows(tmp_path / "rows.json", [rows[i] for i in rng.permutation(len(rows))])
    held = []
    for seed in range(4):
        out = tmp_path / f"{seed}"
        prepared("images", f"--files={rows}", f"--image_root={root}", "--image_size=9",
                 f"--tokenizer={vocabulary}", f"--out={out}", f"--seed={seed}", "--val_share=0.2",
                 f"--copy={copied}")
        train, val = stored(out, "train"), stored(out, "val")
        assert (len(train), len(val)) == (120, 30) and sum(map(len, val)) > 10
        assert not set().union(*train) & set().union(*val)
        held.append(frozenset(set().union(*val)))
    assert len(set(held)) == 4


def test_of_large_groups_the_smallest_is_held_out_and_never_all(vocabulary, tmp_path):
    shades = [(f"{i}.bmp", encoded(Image.new("RGB", (9, 9), (90 * i, 0, 0)), "BMP"))
              for i in range(3)]
    root = keep(tmp_path, "folder", shades)
    argv = ["images", f"--image_root={root}", "--image_size=9", f"--tokenizer={vocabulary}",
            f"--out={tmp_path}/out"]
    rows = write_rows(tmp_path / "a.json", [asked(f"{i}.bmp") for i in (0, 1, 2, 0, 2, 1, 0, 2)])
    prepared(*argv, f"--files={rows}", "--val_share=0.1")
    assert list(map(len, (stored(tmp_path / "out", "train"), stored(tmp_path / "out", "val")))) == [
        6, 2]
    rows = write_rows(tmp_path / "b.json", [asked("0.bmp")] * 8)
    assert "no chat is left for validation" in run("prepare.py", *argv, f"--files={rows}").refusal


# -------------------------------------------------------------------------------- broken rows


BROKEN = {
    "a missing image": asked("gone.png"), "an unreadable image": asked("text.jpg"),
    "a truncated image": asked("cut.jpg"), "an image that is too large": asked("bomb.png"),
    "more than 4 images": asked_of(["red.png"] * 5),
    "images and <image> marks do not match": asked("red.png", "<image> or <image>?"),
    "an image that is neither a name nor bytes": asked({"url": "x"}),
    "an empty answer": {"image": "red.png", "prompt": "What?", "output": "  "},
    "turns out of order": {"image": "red.png", "conversations": [{"from": "gpt", "value": "Hi"}]},
    "a turn without text": {"image": "red.png", "prompt": "What?", "output": None},
    "turns of another form": {"image": "red.png", "conversations": ["What?"]},
    "a row that is no object": ["red.png"],
    "not a line of JSON": b'{"image": "red.png", "conv',
}


def corpora(vocabulary, tmp_path):
    """Data folders `clean`, of 50 good rows, and `mixed`, with 5 of every kind of broken row too;
    returns (those rows, the order of them in `mixed`)."""
    shades = [(f"{i}.png", encoded(Image.new("RGB", (9, 9), (25 * i, 0, 0)), "PNG"))
              for i in range(10)]
    root = keep(tmp_path, "a.zip", [*shades, *((name, WILD[name][0]) for name in WILD)])
    good = [*(asked(f"{i % 10}.png", f"<image>\nWhat {i}?") for i in range(30)),
            *(asked("turned.jpg", f"No. {i}?") for i in range(15)),
            *(asked("", f"{i}?") for i in range(5))]
    mixed = [*good, *(row for row in BROKEN.values() for _ in range(5))]
    order = np.random.default_rng(0).permutation(len(mixed))
    kept = [i for i in order if i < len(good)]
    for name, numbers in ("clean", kept), ("mixed", order):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode()
                 for row in (mixed[i] for i in numbers)]
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join(lines))
        prepared("images", f"--files={tmp_path}/{name}.jsonl", f"--image_root={root}",
                 "--image_size=32", f"--tokenizer={vocabulary}", "--val_share=0.2",
                 f"--out={tmp_path}/{name}")
    return good, order


def test_a_tenth_of_every_kind_of_broken_row_is_counted_and_changes_nothing(vocabulary, tmp_path):
    good, order = corpora(vocabulary, tmp_path)
    assert left_out(tmp_path / "clean") == {}
    assert left_out(tmp_path / "mixed") == dict.fromkeys(BROKEN, 5)
    for reason, found in manifest(tmp_path / "mixed")["left_out"].items():
        lines = [int(where.removeprefix("mixed.jsonl:")) for where in found["first"]]
        assert {list(BROKEN)[(order[n - 1] - len(good)) // 5] for n in lines} == {reason}
    first, second = sums(tmp_path / "clean"), sums(tmp_path / "mixed")
    assert first == second and "train/images_000000.bin" in first and "val/ids.npy" in first


def test_training_goes_on_with_the_good_rows_and_reports_the_others(pipeline, tmp_path):
    """To the same losses as if the broken rows had never been there."""
    corpora(pipeline.data / "captions", tmp_path)
    for name in "clean", "mixed":
        pipeline.run_stage("vision_pretrain", tmp_path / f"run_{name}", "--batch_tokens=512",
                           f"--data={tmp_path}/{name}")
    losses = [logged(tmp_path / f"run_{name}", "loss", "val_loss", "val_loss_mismatched_image")
              for name in ("clean", "mixed")]
    assert losses[0] == losses[1] and len(losses[0]) == 10
    report = (tmp_path / "run_mixed/report.md").read_text().replace("\\<", "<")  # escaped
    assert f"{5 * len(BROKEN)} rows were left out when it was prepared" in report
    assert all(f"5 {reason}" in report for reason in BROKEN)
    assert "left out" not in (tmp_path / "run_clean/report.md").read_text()


def test_the_error_of_a_root_is_the_users(tmp_path):
    with pytest.raises(UserError, match="no file matches"):
        archives.open_images(f"{tmp_path}/no.zip")
