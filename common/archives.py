"""Image files by name, from folders, .zip, .tar, .tar.zst and .tar.gz, complete or in parts.

    find = open_images("images_*.tar, more.zip")
    find("coco/train2017/000000000009.jpg")  # the bytes of that file

A name that does not exist matches the file with the same base name; of several, the one that shares
the most folders before it. Names of members are only looked up and never written to the disk, so a
name with ../ in it is harmless.
"""

import bisect
import fnmatch
import functools
import glob
import io
import os
import re
import struct
import tarfile
import threading
import zipfile
import zlib
from itertools import accumulate, takewhile
from pathlib import Path

from common import hub
from common.config import UserError, one_line
from common.images import ImageError

MAX_BYTES = 1 << 28  # a larger file is refused before it is read
BLOCK = 1 << 20  # bytes read at once
MAGIC = {b"\x28\xb5\x2f\xfd": "zstd", b"\x1f\x8b": "gzip", b"PK\3\4": "zip", b"PK\5\6": "zip"}
LOCAL_HEADER = struct.Struct("<26xHH")  # zip: the lengths of two names in front of the data
ENCRYPTED = 1  # zip: flag of a member


def open_images(root, unpack=None):
    """The ImageFiles in `root`: comma-separated paths and patterns, hf://OWNER/NAME/FILE too.

    An empty root stands for the current folder and /. unpack(paths, codec) returns the path of a
    plain tar for a compressed one. UserError where root has no images, or is compressed without it.
    """
    if not root:
        return ImageFiles([Folder(Path.cwd(), search=False), Folder(Path("/"), search=False)], ())
    groups = []  # (kind, paths of its parts)
    for path in local_paths(root, "--image_root"):
        kind = kind_of(path)
        if kind:
            groups.append((kind, [path]))
        elif groups and groups[-1][0] != "folder":  # the next part of a split archive
            groups[-1][1].append(path)
        else:
            raise UserError(f"{path} is neither a folder nor a .zip, .tar, .tar.zst or .tar.gz; "
                            "correct --image_root")
    files = [path for kind, paths in groups if kind != "folder" for path in paths]
    return ImageFiles([open_group(*group, unpack) for group in groups], identity_of(files))


def kind_of(path):
    """What a path is: folder, zip, tar, zstd, gzip, or "" for anything else."""
    if path.is_dir():
        return "folder"
    try:
        with open(path, "rb") as file:
            start = file.read(tarfile.BLOCKSIZE)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    for magic, kind in MAGIC.items():
        if start.startswith(magic):
            return kind
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "replace")  # verifies the header's checksum
        return "tar"
    except tarfile.HeaderError:
        return ""


def open_group(kind, paths, unpack):
    """The Folder, or the Archive whose parts `paths` are."""
    if kind == "folder":
        return Folder(paths[0])
    if kind in ("zip", "tar"):
        return indexed(kind, *identity_of(paths))
    if unpack is None:
        raise UserError(f"{paths[0]} is compressed and has no random access; unpack it, or copy "
                        "the images with --copy=True")
    return Archive("tar", [unpack(paths, kind)])


@functools.cache
def indexed(kind, *files):
    """The Archive of files given by their identity; the splits of a data set share its index."""
    return Archive(kind, [path for path, _, _ in files])


class ImageFiles:
    """Images by name from several folders and archives; calling it returns an image's bytes.

    identity: of the archives' files; changes inside folders are not detected.
    """

    def __init__(self, sources, identity):
        self.sources, self.identity = sources, identity

    def __call__(self, name):
        """The bytes of an image; ImageError if it does not exist or cannot be read."""
        source, found = self._find(name)
        return source.read(found)

    def name_of(self, name):
        """The exact name of the image that `name` finds."""
        return self._find(name)[1]

    def _find(self, name):
        wanted = normalized(name.replace("\\", "/"))
        for source in self.sources:
            if source.has(wanted):
                return source, wanted
        base = os.path.basename(wanted)
        similar = [(source, found) for source in self.sources for found in source.with_base(base)]
        if not similar:
            raise ImageError("a missing image", f"there is no image {name[:200]}")
        return max(similar, key=lambda item: n_shared(item[1], wanted))  # the first of equals


def normalized(name):
    """A name with single slashes, and none in front."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def n_shared(name, other):
    """How many parts, from the end, two names have in common."""
    pairs = zip(reversed(name.split("/")), reversed(other.split("/")), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def check_size(size, name):
    if size > MAX_BYTES:
        raise ImageError("an image that is too large",
                         f"{name} is larger than {MAX_BYTES >> 20} MiB")


class Folder:
    """The files below a folder; with search also those that match by their base name only."""

    def __init__(self, path, search=True):
        self.path, self.lock = path, threading.Lock()
        self.by_base = None if search else {}  # {base name: names}, filled when first needed

    def has(self, name):
        return name and ".." not in name.split("/") and os.path.exists(self.path / name)

    def with_base(self, base):
        """The names whose last part is `base`."""
        with self.lock:
            if self.by_base is None:
                self.by_base = {}
                for folder, folders, files in os.walk(self.path):
                    folders.sort()
                    for file in sorted(files):
                        name = os.path.relpath(os.path.join(folder, file), self.path)
                        self.by_base.setdefault(file, []).append(name)
        return self.by_base.get(base, ())

    def read(self, name):
        try:
            path = self.path / name
            if not path.is_file() and path.exists():  # reading a pipe or device may never end
                raise ValueError("not a regular file")
            with open(path, "rb") as file:
                content = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            raise ImageError("a missing image", f"there is no image {name}") from None
        except (OSError, ValueError) as error:
            raise ImageError("an unreadable image", f"{self.path / name}: {error}") from None
        check_size(len(content), name)
        return content


# ---------------------------------------------------------------------------------------- archives


class Archive:
    """The files of a zip or tar, read at their offsets by any number of threads."""

    def __init__(self, kind, paths):
        self.file, self.name = Joined(paths), str(paths[0])
        self.members, self.by_base = {}, {}
        try:
            for name, member in (tar_members if kind == "tar" else zip_members)(self.file):
                name = normalized(name)
                if name not in self.members:
                    self.by_base.setdefault(os.path.basename(name), []).append(name)
                self.members[name] = member  # of two with the same name the later counts
        except Exception as error:  # tarfile and zipfile raise many types on damaged files
            raise UserError(f"{self.name} is incomplete or damaged ({one_line(error)}); "
                            "download it again") from None
        if not self.members:
            raise UserError(f"{self.name} is incomplete or damaged: there is no file in it")

    def has(self, name):
        return name in self.members

    def with_base(self, base):
        """The names whose last part is `base`."""
        return self.by_base.get(base, ())

    def read(self, name):
        offset, size, full_size, method, crc = self.members[name]
        check_size(max(size, full_size), name)
        try:
            if method is None:  # tar
                return self.file.pread(size, offset)
            header = self.file.pread(LOCAL_HEADER.size, offset)
            offset += LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(header))
            content = self.file.pread(size, offset)
            if method == zipfile.ZIP_DEFLATED:
                content = zlib.decompressobj(-15).decompress(content, full_size + 1)
            elif method != zipfile.ZIP_STORED:
                raise ValueError("it is encrypted or has an unknown compression")
            if zlib.crc32(content) != crc:
                raise ValueError("it is damaged")
            return content
        except (ValueError, struct.error, zlib.error, OSError) as error:
            raise ImageError("an unreadable image", f"{name} in {self.name}: {error}") from None


class Joined(io.RawIOBase):
    """Several files as one: read in order, or at any offset by pread from any thread."""

    def __init__(self, paths):
        self.files = [open(path, "rb", buffering=0) for path in paths]  # noqa: SIM115
        self.starts = [0, *accumulate(os.fstat(file.fileno()).st_size for file in self.files)]
        self.size, self.at = self.starts[-1], 0

    def pread(self, size, offset):
        parts = []
        while size > 0 and offset < self.size:
            k = bisect.bisect_right(self.starts, offset) - 1
            part = os.pread(self.files[k].fileno(), size, offset - self.starts[k])
            if not part:  # the file was truncated since it was opened
                break
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)

    def readinto(self, buffer):
        part = self.pread(len(buffer), self.at)
        buffer[: len(part)] = part
        self.at += len(part)
        return len(part)

    def seek(self, offset, whence=os.SEEK_SET):
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readable(self):
        return True

    seekable = readable


def zip_members(file):
    """Yield (name, (offset, size, full size, method, CRC)) of the files of a zip."""
    with zipfile.ZipFile(io.BufferedReader(file, BLOCK)) as archive:
        members = archive.infolist()
    for member in members:
        if not member.is_dir():
            method = -1 if member.flag_bits & ENCRYPTED else member.compress_type
            yield member.filename, (member.header_offset, member.compress_size, member.file_size,
                                    method, member.CRC)


def tar_members(file):
    """Yield (name, (offset, size, size, None, 0)) of the files of a tar; blocks with a damaged
    header are skipped."""
    if file.size % tarfile.BLOCKSIZE:
        raise ValueError("unexpected end of data")
    archive = tarfile.open(fileobj=io.BufferedReader(file, BLOCK), mode="r:",  # noqa: SIM115
                           ignore_zeros=True)
    at = -1
    for member in archive:
        archive.members = []  # else tarfile keeps all of them in memory
        if not at < archive.offset <= file.size:  # a negative or too large size
            raise ValueError("a member with a wrong size")
        at = archive.offset
        if member.isreg():
            yield member.name, (member.offset_data, member.size, member.size, None, 0)


# ----------------------------------------------------------------------------- paths and patterns


def local_paths(patterns, setting="the path"):
    """The paths that comma-separated paths and patterns match, part-9 before part-10.

    hf://OWNER/NAME/FILE is downloaded first. UserError names `setting` if one matches nothing.
    """
    def by_numbers(path):
        pieces = re.split(r"(\d+)", str(path))  # text and numbers alternate
        return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], str(path)

    paths = []
    for pattern in map(str.strip, patterns.split(",")):
        if pattern.startswith(hub.PREFIX):
            found = fetched(pattern)
        else:
            found = [pattern] if os.path.exists(pattern) else glob.glob(pattern)
        if not found:
            raise UserError(f"no file matches {pattern}; correct {setting}")
        paths += map(Path, sorted(found, key=by_numbers))
    return paths


def identity_of(paths):
    """((path, size, modification time), ...) of files, which changes when one is replaced."""
    stats = [(path.absolute(), path.stat()) for path in paths]
    return tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats)


def fetched(pattern):
    """The files of a hub data set that match hf://OWNER/NAME/PATTERN, in the local hub cache."""
    from huggingface_hub import HfApi, hf_hub_download

    owner, name, file = [*pattern.removeprefix(hub.PREFIX).split("/", 2), "", ""][:3]
    if not file:
        raise UserError(f"{pattern} names no file; use the form hf://OWNER/NAME/chat.json")
    repository, files = f"{owner}/{name}", [file]
    try:
        if glob.has_magic(file):
            files = fnmatch.filter(HfApi().list_repo_files(repository, repo_type="dataset"), file)
        return [hf_hub_download(repository, file, repo_type="dataset") for file in files]
    except Exception as error:  # the exception types depend on the library's HTTP client
        raise UserError(f"cannot download {pattern} from the Hugging Face Hub: "
                        f"{one_line(error)}; the same command resumes") from None
