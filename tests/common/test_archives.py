"""The claims of common/archives.py about names, links and compression, and about files of the hub.
"""

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import unicodedata
import zipfile

import fake_hub
import pyarrow
import pytest

from common.archives import local_paths, open_images
from common.config import UserError
from common.images import ImageError

FORMS = ("folder", "a.zip", "a.tar", "a.tar.gz", "a.tar.zst", "a.tar.bz2", "a.tar.xz",
         "many_*.tar", "cut.tar.part-*", "cut.tar.zst.part-*", "cut.zip.part-*", "one.zip,two")
KINDS = ("folder", "a.zip", "a.tar")


def store(folder, form, files):
    """Store files, pairs of name and bytes, in a folder in one of the FORMS; returns the root."""
    if form == "folder":
        for name, content in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder
    root = folder / form
    if "," in form:
        first, second = form.split(",")
        store(folder, first, files[::2])
        store(folder / second, "folder", files[1::2])
        return f"{folder}/{first}, {folder}/{second}"
    if form.endswith("part-*"):
        complete = store(folder, form.removesuffix(".part-*"), files)
        content, n = complete.read_bytes(), complete.stat().st_size // 10 + 1
        for i in range(10):
            (folder / form.replace("*", str(i + 1))).write_bytes(content[i * n : i * n + n])
        complete.unlink()
    elif "*" in form:
        for i in range(3):
            store(folder, form.replace("*", str(i)), files[i::3])
    elif form.endswith(".zip"):
        with zipfile.ZipFile(root, "w", zipfile.ZIP_DEFLATED) as archive:
            for i, (name, content) in enumerate(files):
                archive.writestr(name, content, zipfile.ZIP_STORED if i % 2 else None)
    else:
        root.write_bytes(packed_tar(files, form.rpartition(".")[2]))
    return root


def packed_tar(files, ending="tar"):
    """A tar of pairs of a name and its bytes, or for a link (its type, its target)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files:
            member, data = tarfile.TarInfo(name), b""
            if isinstance(content, tuple):
                member.type, member.linkname = content
            else:
                data, member.size = content, len(content)
            archive.addfile(member, io.BytesIO(data))
    return compressed(file.getvalue(), ending)


def compressed(content, ending):
    """Bytes as a file with this ending has them."""
    if ending == "zst":
        with pyarrow.output_stream(sink := pyarrow.BufferOutputStream(), compression="zstd") as out:
            out.write(content)
        return sink.getvalue().to_pybytes()
    packers = {"gz": gzip, "bz2": bz2, "xz": lzma}
    return packers[ending].compress(content) if ending in packers else content


def opened(folder, form, files):
    return open_images(str(store(folder, form, files)))


def raw_zip(path, files):
    """A zip whose names, pairs of bytes and content, are said to be in no encoding."""
    with zipfile.ZipFile(path, "w") as archive:
        for number, (_, content) in enumerate(files):
            archive.writestr(f"{number:04}", content)
    packed = path.read_bytes()
    for number, (name, _) in enumerate(files):  # as long as the numbers
        packed = packed.replace(f"{number:04}".encode(), name)
    path.write_bytes(packed)
    return open_images(str(path))


@pytest.mark.parametrize(("raw", "names"), [
    ("ü.é".encode("cp437") + b"x", ["ü.éx"]), ("ü.j".encode(), ["ü.j", "├╝.j", "u\u0308.j"]),
    ("图片".encode("gbk"), ["图片", "═╝╞¼", "a/图片"])])
def test_a_zip_name_without_an_encoding_is_found_as_any_that_it_may_be(raw, names, tmp_path):
    find = raw_zip(tmp_path / "a.zip", [(raw[:4], b"one"), (b"two.", b"two")])
    for name in names:
        assert find(name) == b"one", name
    assert find("two.") == b"two"


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("kind", KINDS)
def test_composed_and_decomposed_names_are_the_same(kind, form, tmp_path):
    find = opened(tmp_path, kind, [(unicodedata.normalize(form, "bilder/é ü.jpg"), b"one")])
    for asked in "NFC", "NFD":
        for name in "bilder/é ü.jpg", "x\\é ü.jpg", "bilder/%C3%A9%20%C3%BC.jpg", "É Ü.JPG":
            assert find(unicodedata.normalize(asked, name)) == b"one"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stored", "found"), [
    ("vg/1.jpg train/1.jpg val/1.jpg 1.jpg val/2.jpg", {
        "coco/train/1.jpg": "train/1.jpg", "/x/val/1.jpg": "val/1.jpg", "1.jpg": "1.jpg",
        "x/2.jpg": "val/2.jpg", "x\\2.jpg": "val/2.jpg", "/content/val/./2.jpg": "val/2.jpg",
        "x/3.jpg": ""}),
    ("in/cats/1.png in/dogs/2.png birds/images/3.png 4.png", {  # dogs/1.png is not cats/1.png
        "dogs/1.png": "", "x/in/Dogs/1.png": "", "in/dogs/1.png": "", "dogs/4.png": "",
        "1.png": "in/cats/1.png", "in/1.png": "in/cats/1.png", "x/images/1.png": "in/cats/1.png",
        "birds/4.png": "4.png"})])
def test_the_path_decides_among_files_with_the_same_base_name(stored, found, kind, tmp_path):
    find = opened(tmp_path, kind, [(name, name.encode()) for name in stored.split()])
    for wanted, name in found.items():
        if name:
            assert find(wanted) == name.encode()
            continue
        with pytest.raises(ImageError, match=f"there is no image {wanted}"):
            find(wanted)


def test_two_archives_that_both_have_a_name_are_named(tmp_path):
    for name in "one.zip", "two.zip":
        store(tmp_path, name, [("1.png", name.encode())])
    with pytest.raises(ImageError, match=r"1.png fits 1.png in .*one.zip and 1.png in .*two.zip"):
        open_images(f"{tmp_path}/one.zip,{tmp_path}/two.zip")("1.png")


def test_backslashes_and_case_in_stored_names(tmp_path):
    (tmp_path / "cats\\1.JPG").write_bytes(b"cat")  # as unzip makes from a zip of Windows
    (tmp_path / "dogs").mkdir()
    (tmp_path / "dogs/1.jpg").write_bytes(b"dog")
    find = open_images(str(tmp_path))
    assert find("x/cats/1.jpg") == b"cat" and find("DOGS/1.JPG") == b"dog"
    assert find("birds/1.jpg") == b"dog" and find("birds/1.JPG") == b"cat"
    with pytest.raises(ImageError, match="fits"):
        find("1.Jpg")


def test_links_in_a_tar_lead_to_files_in_it_or_are_missing(tmp_path):
    hard, soft = tarfile.LNKTYPE, tarfile.SYMTYPE
    find = opened(tmp_path, "a.tar", [
        ("a/later.jpg", (soft, "1.jpg")), ("./a/1.jpg", b"one"), ("hard.jpg", (hard, "./a/1.jpg")),
        ("b/up.jpg", (soft, "../a/1.jpg")), ("b/twice.jpg", (soft, "../hard.jpg")),
        ("out.jpg", (soft, "../../etc/passwd")), ("root.jpg", (soft, "/etc/passwd")),
        ("loop.jpg", (soft, "pool.jpg")), ("pool.jpg", (soft, "loop.jpg")),
        ("gone.jpg", (hard, "x/1.jpg"))])
    for name in "a/later.jpg", "hard.jpg", "b/up.jpg", "b/twice.jpg":
        assert find(name) == b"one", name
    for name in "out", "root", "loop", "gone":
        with pytest.raises(ImageError, match=f"{name}.jpg is a link to no file") as why:
            find(f"{name}.jpg")
        assert why.value.reason == "a missing image"


@pytest.mark.parametrize("method", [
    zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_every_compression_of_a_zip_is_read_up_to_its_size(method, tmp_path):
    content = bytes(range(256)) * 3000
    with (zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive,
          archive.open("1.bin", "w", force_zip64=True) as file):
        file.write(content)
    find = open_images(str(tmp_path / "a.zip"))
    assert find("1.bin") == content
    offset, size, _, *rest = find.sources[0]["1.bin"]
    find.sources[0]["1.bin"] = offset, size, 1000, *rest
    if method:
        with pytest.raises(ImageError, match="damaged"):
            find("1.bin")


@pytest.mark.parametrize(("at", "value", "said"), [
    (8, 1, "encrypted; pack it without"), (10, 93, r"unknown method \(93\)")])
def test_a_zip_member_that_cannot_be_unpacked_is_named(at, value, said, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.jpg", "one")
    packed = bytearray((tmp_path / "a.zip").read_bytes())
    struct.pack_into("<H", packed, packed.index(b"PK\1\2") + at, value)
    (tmp_path / "a.zip").write_bytes(packed)
    with pytest.raises(ImageError, match=f"1.jpg in .*a.zip: .*{said}"):
        open_images(str(tmp_path / "a.zip"))("1.jpg")


def test_an_image_at_a_url_is_not_downloaded(tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"one")
    find = open_images(str(tmp_path))
    assert find("https://host.org/x/1.jpg?size=3") == b"one"
    for name in "http://host.org/2.jpg", "s3://x/2.jpg":
        with pytest.raises(ImageError, match=f"{name} is not downloaded") as why:
            find(name)
        assert "a URL" in why.value.reason


def test_patterns(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in "a/1.txt", "a/b/2.txt", "a/b/c/10.txt", "a/x[1].txt":
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for pattern, found in {"~/a/1.txt": "1", "~/a/**/*.txt": "1 x[1] 2 10", "a/**": "1 x[1] 2 10",
                           "a\\b\\*.txt": "2", "a\\1.txt": "1", "a/x[1].txt": "x[1]",
                           "a/**/c": "c"}.items():
        assert {path.stem for path in local_paths(pattern)} == set(found.split()), pattern


REPOSITORY = "someone/Some-Data"


def test_files_of_the_hub_and_what_it_says_of_others(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with fake_hub.running(monkeypatch) as server:
        names = "a.json", "in/b.json", "in/c/d.json"
        files = {name: name.encode() for name in names} | {"e.zip": store(tmp_path, "e.zip", [
            ("1.jpg", b"one")]).read_bytes()}
        server.repos["datasets", REPOSITORY] = files
        for pattern, found in {
                "someone/Some-Data/a.json": "a", "datasets/someone/Some-Data/in/b.json": "b",
                "someone/Some-Data@v1/e.zip": "e", "someone/Some-Data/in/**/*.json": "b d",
                "someone/Some-Data/*.zip": "e"}.items():
            assert {path.stem for path in local_paths(f"hf://{pattern}")} == set(found.split())
        assert server.times("resolve/v1/e.zip")
        assert open_images(f"hf://{REPOSITORY}/*.zip")("1.jpg") == b"one"
        server.repos["datasets", "someone/Gated"] = {"a.json": b"[]"}
        server.gated.add("someone/Gated")
        resumes, before = "the same command resumes", len(server.log)
        for pattern, said in {
                "someone/Some-Data/*.csv": "no file matches .* has a.json, e.zip, in/b.json",
                "someone/Some-Data": "names no file; use the form hf://OWNER/NAME/chat.json",
                "someone/Some-Data/no.json": "Entry Not Found for url",
                "someone/None/*.json": "Repository Not Found .*make sure you are authenticated",
                "someone/Gated/a.json": "Cannot access gated repo .*ask for access",
                "someone": "is no data set of the hub; use the form hf://OWNER/NAME"}.items():
            with pytest.raises(UserError, match=said) as why:
                local_paths(f"hf://{pattern}")
            assert resumes not in str(why.value)
        assert len(server.log) - before <= 5  # nothing is asked twice
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
                            "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
        with pytest.raises(UserError, match=f"cannot download .* refused; {resumes}"):
            local_paths(f"hf://{REPOSITORY}/x.json")
