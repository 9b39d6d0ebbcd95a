"""Pictures by name, wherever people keep them: folders, .zip, .tar, .tar.zst, .tar.gz, in parts.

    find = open_images("images_*.tar, more.zip")
    find("coco/train2017/000000000009.jpg")  # the bytes of that file

A name that is not there as it stands means the file with the same base name; where several have it,
the one that agrees in the most folders before it. Names of members are only ever looked up: nothing
is written under one, so a name with ../ in it does no harm.
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
BLOCK = 1 << 20  # read at once
EXACT = 1 << 30  # more than any number of folders that agree
CODECS = {b"\x28\xb5\x2f\xfd": "zstd", b"\x1f\x8b": "gzip"}  # by the first bytes of a file
LOCAL_HEADER = struct.Struct("<6xHH4xLLLHH")  # zip: flags, method, CRC, sizes, lengths of two names
LATER, ENCRYPTED = 8, 1  # zip flags: sizes come behind the data; nobody told us the password


def open_images(root, unpack=None):
    """Pictures in `root`: paths or patterns separated by commas, hf://OWNER/NAME/FILE among them.

    An empty root means names as they stand. unpack(paths, codec) gives a plain tar for a compressed
    one; without it that is a UserError. So is a root that holds no pictures to look up.
    """
    if not root:
        return ImageFiles([Folder(Path.cwd(), search=False), Folder(Path("/"), search=False)], ())
    parts = []  # (kind, paths)
    for path in local_paths(root, "--image_root"):
        kind = kind_of(path)
        if kind:
            parts.append((kind, [path]))
        elif parts and parts[-1][0] != "folder":  # the next piece of one that was split
            parts[-1][1].append(path)
        else:
            raise UserError(f"{path} is neither a folder nor a .zip, .tar, .tar.zst or .tar.gz, so "
                            "there are no pictures to find in it; correct --image_root")
    files = [path for kind, paths in parts if kind != "folder" for path in paths]
    return ImageFiles([open_part(kind, paths, unpack) for kind, paths in parts], identity_of(files))


def open_part(kind, paths, unpack):
    if kind == "folder":
        return Folder(paths[0])
    if kind in CODECS.values():
        if unpack is None:
            raise UserError(f"{paths[0]} is compressed, so pictures cannot be read at any place of "
                            "it; unpack it, or copy them with --copy=True")
        return Archive([unpack(paths, kind)], "tar")
    return indexed(kind, *identity_of(paths))


@functools.cache
def indexed(kind, *files):
    """The Archive of files by their identity: several splits of a data set share its table."""
    return Archive([path for path, _, _ in files], kind)


def kind_of(path):
    """What a path is: folder, zip, tar, zstd, gzip; "" for anything else."""
    if path.is_dir():
        return "folder"
    try:
        with open(path, "rb") as file:
            start = file.read(tarfile.BLOCKSIZE)
    except OSError as error:
        raise UserError(f"cannot read the pictures in {path}: {error.strerror}") from None
    for magic, codec in CODECS.items():
        if start.startswith(magic):
            return codec
    if start.startswith((b"PK\3\4", b"PK\5\6")):
        return "zip"
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "replace")  # checks the sum of a header
        return "tar"
    except tarfile.HeaderError:
        return ""


class ImageFiles:
    """Pictures by name, out of some folders and archives; a call gives a picture's bytes.

    identity: of the files of the archives; nobody looks whether a folder changes.
    """

    def __init__(self, parts, identity):
        self.parts, self.identity = parts, identity

    def __call__(self, name):
        """The bytes; ImageError if there is no such picture, or it cannot be read."""
        part, found = self._find(name)
        return part.read(found)

    def name_of(self, name):
        """The name under which the picture is found, which finds it again."""
        return self._find(name)[1]

    def _find(self, name):
        wanted = plain(name)
        (_, found), part = max(((part.find(wanted), part) for part in self.parts),
                               key=lambda item: item[0][0])  # the first of equals
        if found is None:
            raise ImageError("a missing image", f"there is no picture {name[:200]}")
        return part, found


def plain(name):
    """A name with single slashes, and none in front."""
    return "/".join(p for p in name.replace("\\", "/").split("/") if p not in ("", "."))


def base(name):
    return name.rpartition("/")[2]


def likeliest(names, wanted):
    """(how many folders of it agree with the wanted name's, the name) of the best of some."""
    def agreeing(name):
        pairs = zip(reversed(name.split("/")), reversed(wanted.split("/")), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    return max(((agreeing(name), name) for name in names), default=(0, None), key=lambda i: i[0])


class Folder:
    """The files below a folder; with search, also those that only their base name finds."""

    def __init__(self, path, search=True):
        self.path, self.lock = path, threading.Lock()
        self.bases = None if search else {}

    def find(self, wanted):
        if wanted and ".." not in wanted.split("/") and os.path.exists(self.path / wanted):
            return EXACT, wanted
        with self.lock:  # many threads ask
            if self.bases is None:
                self.bases = self._search()
        return likeliest(self.bases.get(base(wanted), ()), wanted)

    def _search(self):
        """{base name: names} of all files."""
        bases = {}
        for folder, folders, files in os.walk(self.path):
            folders.sort()
            for file in sorted(files):
                name = os.path.relpath(os.path.join(folder, file), self.path)
                bases.setdefault(file, []).append(name)
        return bases

    def read(self, name):
        try:
            path = self.path / name
            if not path.is_file() and path.exists():  # a pipe or a device might never end
                raise ValueError("it is no file")
            with open(path, "rb") as file:
                content = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            raise ImageError("a missing image", f"there is no picture {name}") from None
        except (OSError, ValueError) as error:  # a folder; a name that no file can have
            raise unreadable(f"{self.path / name}: {error}") from None
        return small_enough(content, len(content), name)


def unreadable(message):
    return ImageError("an unreadable image", message)


def small_enough(content, size, name):
    if size > MAX_BYTES:
        raise ImageError("an image that is too large",
                           f"{name} is larger than {MAX_BYTES >> 20} MiB")
    return content


# ---------------------------------------------------------------------------------------- archives


class Archive:
    """The files of a zip or a tar, read at their places, by any number of threads."""

    def __init__(self, paths, kind):
        self.file, self.name = Joined(paths), str(paths[0])
        self.places, self.bases = {}, {}
        members = tar_members if kind == "tar" else zip_members
        try:
            for name, place in members(paths):
                name = plain(name)
                if name not in self.places:
                    self.bases.setdefault(base(name), []).append(name)
                self.places[name] = place  # of two with one name the later holds
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the pictures in {self.name}: {one_line(error)}") from None
        if not self.places:
            raise UserError(f"{self.name} is empty or damaged: there is no file in it")

    def find(self, wanted):
        if wanted in self.places:
            return EXACT, wanted
        return likeliest(self.bases.get(base(wanted), ()), wanted)

    def read(self, name):
        """The bytes of a member; those of a tar that ends early may be too few."""
        at, size, full_size, method, crc = self.places[name]
        small_enough(b"", max(size, full_size), name)
        try:
            if method is None:  # a tar: the bytes as they are
                return self.file.pread(size, at)
            *_, n_name, n_extra = LOCAL_HEADER.unpack(self.file.pread(LOCAL_HEADER.size, at))
            content = self.file.pread(size, at + LOCAL_HEADER.size + n_name + n_extra)
            if method == zipfile.ZIP_DEFLATED:
                content = zlib.decompressobj(-15).decompress(content, full_size + 1)
            elif method != zipfile.ZIP_STORED:
                raise ValueError("packed in an unknown way")
        except (ValueError, struct.error, zlib.error, OSError) as error:
            raise unreadable(f"{name} in {self.name}: {error}") from None
        if zlib.crc32(content) != crc:
            raise unreadable(f"{name} in {self.name} is damaged")
        return content


class Joined(io.RawIOBase):
    """Some files end to end as one, to read in order, or anywhere by pread from any thread."""

    def __init__(self, paths):
        self.files = [open(path, "rb", buffering=0) for path in paths]  # noqa: SIM115
        self.starts = [0, *accumulate(os.fstat(file.fileno()).st_size for file in self.files)]
        self.size, self.at = self.starts[-1], 0

    def pread(self, size, at):
        parts = []
        while size > 0 and at < self.size:
            k = bisect.bisect_right(self.starts, at) - 1
            part = os.pread(self.files[k].fileno(), size, at - self.starts[k])
            parts.append(part)
            at, size = at + len(part), size - len(part) if part else 0  # a file that was cut short
        return b"".join(parts)

    def readinto(self, buffer):
        part = self.pread(len(buffer), self.at)
        buffer[: len(part)] = part
        self.at += len(part)
        return len(part)

    def seek(self, offset, whence=os.SEEK_SET):
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def tell(self):
        return self.at

    def readable(self):
        return True

    seekable = readable


def zip_members(paths):
    """Yield (name, place) of the files of a zip; place: at, size, full size, method, CRC."""
    try:
        with zipfile.ZipFile(io.BufferedReader(Joined(paths), BLOCK)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, EOFError):
        print(f"the end of {paths[0]} is missing or damaged; what comes before it is used")
        yield from scanned(Joined(paths))
        return
    for member in members:
        if not member.filename.endswith("/"):
            method = -1 if member.flag_bits & ENCRYPTED else member.compress_type
            yield member.filename, (member.header_offset, member.compress_size, member.file_size,
                                    method, member.CRC)


def scanned(file):
    """Yield (name, place) of a zip without its table at the end, from one header to the next."""
    at = 0
    while (header := file.pread(LOCAL_HEADER.size, at).ljust(30)).startswith(b"PK\3\4"):
        flags, method, crc, size, full_size, n_name, n_extra = LOCAL_HEADER.unpack(header)
        if flags & LATER or size == 0xFFFFFFFF:
            return  # nobody can tell where the next one begins
        name = file.pread(n_name, at + len(header)).decode("utf-8" if flags & 2048 else "cp437",
                                                           "replace")
        if not name.endswith("/"):
            yield name, (at, size, full_size, -1 if flags & ENCRYPTED else method, crc)
        at += len(header) + n_name + n_extra + size


def tar_members(paths):
    """Yield (name, place) of the files of a tar; behind a damaged header the next one is sought."""
    file, at = Joined(paths), -1
    whole = file.size % tarfile.BLOCKSIZE == 0
    try:
        with tarfile.open(fileobj=io.BufferedReader(Joined(paths), BLOCK), mode="r:",
                          ignore_zeros=True) as archive:
            for member in archive:
                archive.members = []  # else it would keep all of them
                if archive.offset <= at:  # a size below zero leads back, and round and round
                    raise tarfile.ReadError
                at = archive.offset
                if member.isreg():
                    yield member.name, (member.offset_data, member.size, member.size, None, 0)
                whole = whole and archive.offset <= file.size
    except (tarfile.TarError, EOFError, MemoryError, RecursionError):  # of long chains of headers
        whole = False
    if not whole:
        print(f"the end of {paths[0]} is missing or damaged; what comes before it is used")


# ----------------------------------------------------------------------------- paths and patterns


def local_paths(patterns, setting="the path"):
    """The paths that comma-separated paths and patterns name, numbers in names in their order.

    hf://OWNER/NAME/FILE is fetched from the Hugging Face hub first. UserError if one names none,
    which says to correct `setting`.
    """
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
    """((path, size, time of the last change), ...) of files: shows whether one was replaced."""
    stats = [(path.absolute(), path.stat()) for path in paths]
    return tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats)


def by_numbers(path):
    """A key that puts part-10 behind part-9."""
    parts = re.split(r"(\d+)", str(path))  # text and numbers in turn
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(path)


def fetched(pattern):
    """The files of a hub data set that hf://OWNER/NAME/PATTERN names, in the hub's cache here."""
    from huggingface_hub import HfApi, hf_hub_download

    owner, name, file = [*pattern.removeprefix(hub.PREFIX).split("/", 2), "", ""][:3]
    if not file:
        raise UserError(f"{pattern} names no file; say it like hf://OWNER/NAME/chat.json")
    repository, files = f"{owner}/{name}", [file]
    try:
        if glob.has_magic(file):
            files = fnmatch.filter(HfApi().list_repo_files(repository, repo_type="dataset"), file)
        return [hf_hub_download(repository, file, repo_type="dataset") for file in files]
    except Exception as error:  # whatever the library's network layer of the day raises
        raise UserError(f"cannot fetch {pattern} from the Hugging Face hub: {hub.first_line(error)}"
                        "; the same command goes on with what is missing") from None
