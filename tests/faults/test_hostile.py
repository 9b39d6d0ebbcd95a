"""What comes from outside is data: it is never run, and never writes outside of its folder."""

import io
import json
import os
import pickle
import re
import stat
import tarfile
import zipfile

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import tokenizer as tokenizers
from common import hub
from common.archives import open_images
from common.config import UserError
from common.images import ImageError, read_image
from data import read_array
from prep import convert

UNSAFE = re.compile(r"allow_pickle=(?!False)|weights_only=(?!True)|trust_remote_code=(?!False)|"
                    r"torch\.(jit|hub)\.load|\b(dill|joblib|shelve|unpack_archive|popen)\b")


def test_no_code_of_the_project_runs_what_it_reads():
    """Ruff's rules S forbid eval, pickle, shell and extractall; here is what they do not know."""
    files = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")]
             if not path.is_relative_to(ROOT / "tests")]
    assert len(files) > 50 and ROOT / "common/config.py" in files
    found = {(path.name, line) for path in files
             for line in path.read_text(encoding="utf-8").splitlines() if UNSAFE.search(line)}
    assert not found


class Trap:
    """What unpickling this makes is a folder."""

    def __init__(self, bait):
        self.bait = bait

    def __reduce__(self):
        return os.mkdir, (str(self.bait),)


def test_a_pickle_in_the_place_of_an_array_is_not_run(tmp_path):
    """An object array, and a bare pickle, which NumPy would load from a file of any name."""
    path, bait = tmp_path / "train_0.npy", tmp_path / "it_ran"
    np.save(path, np.array([Trap(bait)], dtype=object), allow_pickle=True)
    for content in (path.read_bytes(), pickle.dumps(Trap(bait))):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"train_0\.npy"):
            read_array(path, np.uint16)
        assert not bait.exists()
        np.load(path, allow_pickle=True)  # so the trap does work
        bait.rmdir()


def test_a_vocabulary_cannot_give_text_the_ids_of_special_tokens(tmp_path):
    forged = json.loads(tokenizers.train(["the cat sat on the mat"] * 3, 300).source)
    words = forged["model"]["vocab"]
    words[next(iter(words))] = len(words) + 4  # where <|end|> will be
    (tmp_path / "tokenizer.json").write_text(json.dumps(forged))
    with pytest.raises(UserError, match=r"tokenizer\.json .*tokens are not numbered from 0 to"):
        tokenizers.load(tmp_path)


@pytest.mark.parametrize("name", ["../../evil_train.npy", "/etc/evil_train.npy", "a/../../b.npy"])
def test_a_hub_cannot_name_a_file_outside_the_folder(name):
    with pytest.raises(UserError, match="the hub lists a file outside of its data set"):
        hub.Remote(name, 10, "")


def encoded(form, **options):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, form, **options)
    return file.getvalue()


PNG = encoded("PNG")  # less than a block of a tar
OUTSIDE = ("../outside.png", "/tmp/../outside.png", "a/../../outside.png", "..\\outside.png",
           "C:\\outside.png", "\\\\host\\outside.png", "./../../../outside.png")
ODD = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE,
       tarfile.DIRTYPE)


def member(name, kind=tarfile.REGTYPE, target="", size=None):
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, target
    header.size = len(PNG) if size is None else size
    return header


def tar_of(path, headers, mode="w"):
    with tarfile.open(path, mode) as archive:
        for header in headers:
            archive.addfile(header, io.BytesIO(PNG.ljust(header.size, b"\0")))
    return path


@pytest.mark.parametrize("form", ["zip", "tar", "tar.gz"])
def test_an_archive_cannot_write_outside_its_folder(form, tmp_path):
    """Names that lead out, and links: the images are used, and no file appears elsewhere."""
    home = tmp_path / "one/two/three"
    home.mkdir(parents=True)
    path = archive = home / f"a.{form}"
    odd = [f"odd{number}.png" for number in range(len(ODD))]
    if form == "zip":
        link = zipfile.ZipInfo(odd[0])
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(link, "/etc/passwd")
            for name in OUTSIDE:
                file.writestr(zipfile.ZipInfo(name), PNG)
    else:
        links = [member(name, kind, "/etc/passwd", 0) for name, kind in zip(odd, ODD, strict=True)]
        tar_of(path, [*map(member, OUTSIDE), *links], "w:gz" if form == "tar.gz" else "w")
    if form == "tar.gz":
        path = convert.unpacked([path], "gzip", home)
    images = open_images(str(path))
    for name in OUTSIDE:
        assert read_image(images(name), name).size == (16, 16)
    for name in odd:
        with pytest.raises(ImageError):
            read_image(images(name), name)
    assert {file for file in tmp_path.rglob("*") if not file.is_dir()} == {archive, path}


def lying(size, kind=tarfile.REGTYPE):
    """The header of a member b.png that is said to have this size."""
    return member("b.png", kind, size=size).tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("behind", [
    lying(-1024), lying(-(10**15)), lying(10**17), lying(10**12, tarfile.GNUTYPE_LONGNAME),
    lying(10**11, tarfile.XHDTYPE), (lying(0, tarfile.GNUTYPE_LONGNAME) + bytes(512)) * 5000,
], ids=["back", "far back", "far", "long name", "long header", "names of names"])
def test_sizes_that_lie_neither_hang_nor_break_a_tar(behind, tmp_path):
    path = tar_of(tmp_path / "a.tar", [member("a.png")])
    path.write_bytes(path.read_bytes()[: 2 * 512] + behind + bytes(1024))  # instead of the end
    try:
        images = open_images(str(path))
    except UserError as error:
        assert "a.tar is incomplete or damaged" in str(error)
        return
    assert read_image(images("a.png")).size == (16, 16)
    with pytest.raises(ImageError):
        read_image(images("b.png"))


def test_a_zip_bomb_is_refused_before_it_fills_the_memory(tmp_path):
    """An image that says that it unpacks to 300 MiB, and one that is said to be small."""
    with (zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive,
          archive.open("bomb.png", "w", force_zip64=True) as file):
        for _ in range(300):
            file.write(bytes(1 << 20))
    images = open_images(str(tmp_path / "a.zip"))
    with pytest.raises(ImageError, match=r"bomb\.png is larger than 256 MiB"):
        images("bomb.png")
    members, = images.sources
    offset, size, _, method, crc = members["bomb.png"]
    members["bomb.png"] = offset, size, 1000, method, crc
    with pytest.raises(ImageError, match=r"bomb\.png in .*a\.zip.*damaged"):
        images("bomb.png")


def test_a_compressed_tar_that_would_fill_the_disk_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "ROOM", 1 << 20)
    path = tar_of(tmp_path / "a.tar.gz", [member("a.png"), member("b.png", size=30 << 20)], "w:gz")
    with pytest.raises(UserError, match=r"a\.tar\.gz unpacks to more than 100 times its size"):
        convert.unpacked([path], "gzip", tmp_path / "unpacked")
    assert not any((tmp_path / "unpacked").iterdir())


def test_a_row_cannot_name_a_file_outside_the_images_a_pipe_or_a_device(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "outside.png").write_bytes(PNG)
    os.mkfifo(inside / "pipe.png")
    (inside / "device.png").symlink_to("/dev/zero")
    images = open_images(str(inside))
    for name in (*OUTSIDE, str(tmp_path / "outside.png"), "\0", "\ud800", "a" * 5000, "pipe.png",
                 "device.png"):
        with pytest.raises(ImageError):
            images(name)


SCRIPT = (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
          b"(%pipe%mkdir it_ran) (w) file\n%%EOF\n")
JPEG = encoded("JPEG", progressive=True)
SCAN = JPEG[JPEG.rindex(b"\xff\xda") : -2]


@pytest.mark.parametrize(("content", "words"), [
    (SCRIPT, "is not a readable image"),  # Pillow hands PostScript to Ghostscript
    (JPEG[:-2] + SCAN * 1000 + JPEG[-2:], "is a JPEG of more than 100 scans")],
    ids=["program", "scans without end"])
def test_an_image_that_starts_a_program_or_never_ends_is_refused(content, words, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("it was started"))
    assert Image.open(io.BytesIO(content)).format in ("EPS", "JPEG")
    with pytest.raises(ImageError, match=f"a.img {words}"):
        read_image(content, "a.img")
