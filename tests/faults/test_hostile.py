"""What comes from outside is data: it is never run, and never writes outside of its folder."""

import ast
import io
import json
import os
import pickle
import stat
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from PIL import Image

import tokenizer as tokenizers
from common import checkpoint, hub
from common.archives import open_images
from common.config import UserError, seal
from common.images import ImageError, read_image
from data import read_array
from export.from_original import import_original
from prep import convert

# ------------------------------------------------------------------------ nothing from outside runs

RUNS_CODE = {"eval", "exec", "__import__", "compile"}  # as plain names: `model.eval()` is another
UNPICKLES = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "torch.distributed"}
FORBIDDEN = ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen",
             "subprocess.getoutput", "shutil.unpack_archive", "pickle.load", "pickle.loads",
             "pickle.Unpickler", "runpy.run_path", "torch.jit.load", "torch.hub.load")
OUR_OWN_NAMES = {"train/log.py"}  # __import__ of libraries that it lists itself


def project_files():
    folders = ("", "common/", "prep/", "runs/", "configs/")
    return sorted({path for folder in folders for path in ROOT.glob(
        f"{folder}**/*.py" if folder else "*.py")})


def dangers(source, name=""):
    """Yield (line, what) of every call in some source code that could run what it reads."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called, last = ast.unparse(node.func), ast.unparse(node.func).split(".")[-1]
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        bad = (called in FORBIDDEN or (called in RUNS_CODE and name not in OUR_OWN_NAMES)
               or (called == "torch.load" and given.get("weights_only") != "True")
               or (last in ("load", "loads") and called.split(".")[0] in UNPICKLES)
               or last in ("extractall", "extract")
               or given.get("allow_pickle", "False") != "False"
               or given.get("shell", "False") != "False"
               or given.get("trust_remote_code", "False") != "False")
        if bad:
            yield node.lineno, ast.unparse(node)[:80]


def test_the_projects_code_runs_nothing_that_it_reads():
    files = project_files()
    assert len(files) > 60 and ROOT / "common/config.py" in files
    found = {f"{path.relative_to(ROOT)}:{line}": what for path in files for line, what in dangers(
        path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))}
    assert not found


@pytest.mark.parametrize("source", [
    "pickle.load(f)", "torch.load(p)", "torch.load(p, weights_only=False)", "eval(text)",
    "exec(open(p).read())", "yaml.load(f)", "np.load(p, allow_pickle=True)",
    "archive.extractall(folder)", "subprocess.run(command, shell=True)", "dill.loads(b)",
    "load_dataset(name, trust_remote_code=True)", "__import__(name)"])
def test_the_search_finds_what_it_looks_for(source):
    assert list(dangers(source))


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


@pytest.mark.parametrize("pickled", [
    lambda trap, path: torch.save({"current_step": 1, "model_state_dict": trap}, path),
    lambda trap, path: path.write_bytes(pickle.dumps(trap, protocol=2))])
def test_a_pickle_in_the_place_of_a_checkpoint_to_import_is_not_run(pickled, tmp_path):
    bait = tmp_path / "it_ran"
    pickled(Trap(bait), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth wants to run code .*not run"):
        import_original(tmp_path / "a.pth", tmp_path / "out")
    assert not bait.exists()


def test_a_pickle_in_the_place_of_weights_or_state_is_not_run(tmp_path):
    """Though the sums are right: who makes a checkpoint makes its sums. (test_checkpoint.py tries
    more ways.)"""
    bait, folder = tmp_path / "it_ran", tmp_path / "step_00000001"
    (folder / "state").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"kind": "decoder", "stage": "sft"}))
    torch.save(Trap(bait), folder / "state/training.pt")
    torch.save(Trap(bait), folder / "model.safetensors")
    checkpoint.write_json(folder / "manifest.json", seal({"sha256": checkpoint.sums(folder)}))
    with pytest.raises(UserError, match=r"cannot read .*model\.safetensors"):
        checkpoint.read(folder, with_state=True)
    with pytest.raises(UserError, match=r"cannot read .*training\.pt"):
        checkpoint.read_state(folder, ["state/training.pt"])
    assert not bait.exists()


# --------------------------------------------------------------------- archives stay where they are


def picture():
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "PNG")
    return file.getvalue()


OUTSIDE = ("../outside.png", "/tmp/../outside.png", "a/../../outside.png", "..\\outside.png",
           "C:\\outside.png", "\\\\host\\outside.png", "./../../../outside.png")


def member(name, kind=tarfile.REGTYPE, target="", size=None):
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, target
    header.size = len(picture()) if size is None else size
    return header


def tar_of(path, headers, mode="w"):
    with tarfile.open(path, mode) as archive:
        for header in headers:
            archive.addfile(header, io.BytesIO(picture().ljust(header.size, b"\0")))
    return path


def zip_of(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            header = zipfile.ZipInfo(name)
            archive.writestr(header, picture())
        link = zipfile.ZipInfo("link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    return path


@pytest.mark.parametrize("form", ["zip", "tar", "tar.gz"])
def test_an_archive_cannot_write_outside_its_folder(form, world_data, tmp_path):
    """Names that lead out, and links: the pictures are used, and no file appears but the data."""
    home = tmp_path / "one/two/three"
    home.mkdir(parents=True)
    if form == "zip":
        path = zip_of(home / "a.zip", OUTSIDE)
    else:
        kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE,
                 tarfile.FIFOTYPE, tarfile.DIRTYPE)
        odd = [member(f"odd{i}.png", kind, "/etc/passwd", 0) for i, kind in enumerate(kinds)]
        path = tar_of(home / f"a.{form}", [*map(member, OUTSIDE), *odd],
                      "w:gz" if form == "tar.gz" else "w")
    names = [*OUTSIDE, "link.png", *(f"odd{i}.png" for i in range(6))]
    rows = [{"image": name, "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": name}]}
        for name in names]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("prepare.py", "images", f"--files={home}/rows.jsonl", f"--image_root={path}",
                 f"--tokenizer={world_data}/text", f"--out={home}/out",
                 f"--val_files={home}/rows.jsonl")
    assert result.status == 0, result.err
    found = {file.relative_to(tmp_path).parts[:4] for file in tmp_path.rglob("*")
             if not file.is_dir() or file.is_symlink()}
    assert found == {("one", "two", "three", name) for name in ("out", "rows.jsonl", path.name)}
    manifest = json.loads((home / "out/manifest.json").read_text())
    assert manifest["train"]["chats"] == manifest["val"]["chats"] == len(OUTSIDE)
    refused = manifest["left_out"].values()
    assert sum(reason["rows"] for reason in refused) == 2 * (len(names) - len(OUTSIDE))


def header(name=b"b.png", size=b"00000000005\0", kind=b"0"):
    """A tar header of one's own, for sizes that no library writes."""
    block = bytearray(512)
    for at, value in ((0, name), (100, b"0000644\0"), (124, size), (136, b"00000000000\0"),
                      (148, b" " * 8), (156, kind), (257, b"ustar\x0000")):
        block[at : at + len(value)] = value
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def sized(number):
    """A size of twelve bytes as GNU writes those that are large or below zero."""
    return (b"\xff" if number < 0 else b"\x80") + (number % 256**11).to_bytes(11, "big")


def small_tar():
    content = picture()
    return header(b"a.png", b"%011o\0" % len(content)) + content + bytes(-len(content) % 512)


@pytest.mark.parametrize("behind", [
    header(size=sized(-1024)) + bytes(1024), header(size=sized(-(10**15))) + bytes(1024),
    header(size=sized(10**17)) + bytes(1024), header(size=sized(10**12), kind=b"L") + bytes(512),
    header(size=sized(10**11), kind=b"x") + bytes(512), (header(kind=b"L") + bytes(512)) * 5000,
    (header(size=b"00000000012\0", kind=b"x") + b"11 a=bbbb\n".ljust(512, b"\0")) * 5000,
], ids=["back", "far back", "far", "long name", "long header", "names of names", "endless headers"])
def test_sizes_that_lie_neither_hang_nor_break_a_tar(behind, tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(small_tar() + behind)
    try:
        images = open_images(str(path))
    except UserError as error:
        assert "a.tar is incomplete or damaged" in str(error)
        return
    assert read_image(images("a.png")).size == (16, 16)
    with pytest.raises(ImageError):
        read_image(images("b.png"))


def test_a_zip_bomb_is_refused_before_it_fills_the_memory(tmp_path):
    """A picture said to be small that unpacks to 1 GB, and one that says so."""
    bomb = zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED)
    with bomb, bomb.open("bomb.png", "w", force_zip64=True) as file:
        for _ in range(300):
            file.write(bytes(1 << 20))
    pictures = open_images(str(tmp_path / "a.zip"))
    with pytest.raises(ImageError, match=r"bomb\.png is larger than 256 MiB"):
        pictures("bomb.png")
    archive, = pictures.sources
    offset, size, _, method, crc = archive.members["bomb.png"]
    archive.members["bomb.png"] = offset, size, 1000, method, crc
    with pytest.raises(ImageError, match=r"bomb\.png in .*a\.zip.*damaged"):
        pictures("bomb.png")


def test_a_compressed_tar_that_would_fill_the_disk_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "ROOM", 1 << 20)
    path = tar_of(tmp_path / "a.tar.gz", [member("a.png"), member("b.png", size=30 << 20)], "w:gz")
    with pytest.raises(UserError, match=r"a\.tar\.gz unpacks to more than 100 times its size"):
        convert.unpacked([path], "gzip", tmp_path / "unpacked")
    assert not any((tmp_path / "unpacked").iterdir())


def test_a_pipe_or_device_in_the_place_of_a_picture_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    pictures = open_images(str(tmp_path))
    for name in "pipe.png", "device.png":
        with pytest.raises(ImageError, match=f"{name}: not a regular file"):
            pictures(name)


# -------------------------------------------------------------------------------- pictures and more


def test_no_other_program_is_started_for_a_picture(monkeypatch):
    """Pillow hands PostScript to Ghostscript."""
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("it was started"))
    script = (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
              b"(%pipe%mkdir it_ran) (w) file\n%%EOF\n")
    assert Image.open(io.BytesIO(script)).format == "EPS"
    with pytest.raises(ImageError, match=r"a\.png is not a readable image"):
        read_image(script, "a.png")


def test_a_jpeg_with_scans_without_end_is_refused():
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    last = content.rindex(b"\xff\xda")
    assert read_image(content).size == (64, 64)
    with pytest.raises(ImageError, match=r"a\.jpg is a JPEG of more than 100 scans"):
        read_image(content[:-2] + content[last:-2] * 1000 + content[-2:], "a.jpg")


def test_a_vocabulary_cannot_give_text_the_ids_of_special_tokens(tmp_path):
    source = tokenizers.train(["the cat sat on the mat"] * 3, 300).source
    forged = json.loads(source)
    word = next(iter(forged["model"]["vocab"]))
    forged["model"]["vocab"][word] = len(forged["model"]["vocab"]) + 4  # where <|end|> will be
    (tmp_path / "tokenizer.json").write_text(json.dumps(forged))
    with pytest.raises(UserError, match=r"tokenizer\.json .*tokens are not numbered from 0 to"):
        tokenizers.load(tmp_path)


def test_a_vocabulary_cannot_pad_or_cut_text(tmp_path):
    forged = json.loads(tokenizers.train(["the cat sat on the mat"] * 3, 300).source)
    forged["padding"] = {"strategy": {"Fixed": 10**6}, "direction": "Right", "pad_id": 0,
                         "pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "!"}
    forged["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst",
                            "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(forged))
    tokenizer = tokenizers.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("the cat sat")) == "the cat sat"


@pytest.mark.parametrize("name", ["../../evil_train.npy", "/etc/evil_train.npy", "a/../../b.npy"])
def test_a_hub_cannot_name_a_file_outside_the_folder(name):
    with pytest.raises(UserError, match="the hub lists a file outside of its data set"):
        hub.Remote(name, 10, "")


def test_a_row_cannot_name_a_file_outside_the_pictures(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside.png").write_bytes(picture())
    pictures = open_images(str(tmp_path / "inside"))
    for name in ("../outside.png", str(tmp_path / "outside.png"), "x/../../outside.png",
                 "..\\outside.png", "\0", "\ud800", "a" * 5000):
        with pytest.raises(ImageError):
            pictures(name)
