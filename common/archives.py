"""Image files by name, from folders, .zip and .tar, which may be compressed, complete or in parts.

    find = open_images("images_*.tar, more.zip")
    find("coco/train2017/000000000009.jpg")  # the bytes of that file

A name that does not exist matches the file with the same base name in any case. Of several, one is
taken whose complete path is the end of the name, or the other way round. Different images that fit
a name equally well are refused, and dogs/1.png is never cats/1.png where there is a folder dogs.
Names are only looked up, never written: ../ is harmless.
"""

import bisect
import bz2
import fnmatch
import glob
import io
import lzma
import os
import re
import struct
import tarfile
import threading
import unicodedata
import zipfile
import zlib
from itertools import accumulate
from pathlib import Path
from urllib.parse import unquote

from common import hub
from common.config import UserError, one_line
from common.images import ImageError, read_file

MAX_BYTES = 1 << 28  # a larger file is refused before it is read
BLOCK = 1 << 20  # bytes read, or characters tokenized, at once
MAGIC = {b"\x28\xb5\x2f\xfd": "zstd", b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "xz",
         b"PK\3\4": "zip", b"PK\5\6": "zip"}
DECOMPRESSORS = {  # of the members of a zip
    zipfile.ZIP_DEFLATED: lambda: zlib.decompressobj(-15), zipfile.ZIP_BZIP2: bz2.BZ2Decompressor,
    zipfile.ZIP_LZMA: lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=MAX_BYTES)}
MAX_LINKS = 40  # from one to the next


def open_images(root, unpack=None):
    """The ImageFiles in `root`: comma-separated paths and patterns, hf://OWNER/NAME/FILE too.

    An empty root stands for the current folder and /. unpack(paths, codec) returns the path of a
    plain tar for a compressed one. UserError where root has no images, or is compressed without it.
    """
    groups = []  # (kind, paths of its parts)
    for path in local_paths(root or ".,/", "--image_root"):
        kind = kind_of(path)
        if kind:
            groups.append((kind, [path]))
        elif groups and groups[-1][0] != "folder":  # the next part of a split archive
            groups[-1][1].append(path)
        else:
            raise UserError(f"{path} is neither a folder nor a .zip, .tar or .tar.{{zst,gz,bz2,xz}}"
                            "; correct --image_root")
    identity = identity_of(path for kind, paths in groups if kind != "folder" for path in paths)
    sources = []
    for kind, paths in groups:
        if kind not in ("folder", "zip", "tar"):
            if unpack is None:
                raise UserError(f"{paths[0]} is compressed and has no random access; unpack it")
            kind, paths = "tar", [unpack(paths, kind)]
        sources.append(Folder(paths[0]) if kind == "folder" else Archive(kind, paths))
    return ImageFiles(sources, identity, search=bool(root))


def kind_of(path):
    """What a path is: folder, tar, a value of MAGIC, or "" for anything else."""
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


class ImageFiles:
    """Images by name from some Folder and Archive; calling it returns an image's bytes.

    identity: of the archives' files; changes inside folders are not detected. search: whether to
    look for the base name of what does not exist.
    """

    def __init__(self, sources, identity, search):
        self.sources, self.identity, self.lock = sources, identity, threading.Lock()
        self.indexes = None if search else []  # (source, index_of(source)) pairs, when needed

    def __call__(self, name):
        """The bytes of an image; ImageError if it does not exist or cannot be read, or if several
        files fit the name and are not copies."""
        (source, found), *others = self._find(name)
        content = read_from(source, found)
        for place, other in others:
            if read_from(place, other) != content:
                raise ImageError("a name that fits several images", f"{name[:200]} fits {found} in "
                                 f"{source.name} and {other} in {place.name}")
        return content

    def _find(self, name):
        """The files that fit a name best, as [(source, name in it)]."""
        for wanted in spellings(name):
            if exact := [(source, wanted) for source in self.sources if wanted in source]:
                return exact
        with self.lock:
            if self.indexes is None:
                self.indexes = [(source, index_of(source)) for source in self.sources]
        for wanted in spellings(name):
            folder, base = os.path.split(wanted)
            same_folder, similar = f"{os.path.basename(folder)}/".casefold(), []
            for source, index in self.indexes:
                for known in index.get(base.casefold(), ()):
                    path = normalized(known)
                    n_parts, same = overlap(path, wanted), os.path.basename(path) == base
                    if n_parts > 1 or not any(overlap(other, folder)
                                              for other in index.get(same_folder, ())):
                        similar.append(((max(1, n_parts), same), (source, known)))
            if similar:
                best = max(agreement for agreement, _ in similar)
                return [file for agreement, file in similar if agreement == best]
        if re.match(r"\w{2,}://", name):
            raise ImageError("an image that is a URL, which is not downloaded: download it and use "
                             "--image_root", f"{name[:200]} is not downloaded; use --image_root")
        raise ImageError("a missing image", f"there is no image {name[:200]}")


def spellings(name):
    """Yield the normalized names to look for: as it is, decomposed (macOS), as in a URL."""
    plain = normalized(name)
    yield plain
    yield from {unicodedata.normalize("NFD", plain),
                normalized(unquote(re.split("[?#]", name)[0]))} - {plain}


def read_from(source, found):
    """The bytes of a file in a Folder or Archive, or an ImageError."""
    try:
        content = source.read(found)
    except (OSError, EOFError, ValueError, struct.error, zlib.error, lzma.LZMAError) as error:
        raise ImageError("an unreadable image", f"{found} in {source.name}: {error}") from None
    if content is None:
        raise ImageError("an image that is too large",
                         f"{found} is larger than {MAX_BYTES >> 20} MiB")
    return content


def index_of(source):
    """{lower-case base name: [name]} of the files of a source; with a slash those of folders."""
    index, folders = {}, set()
    for name in source:
        folder, base = os.path.split(normalized(name))
        index.setdefault(base.casefold(), []).append(name)
        folders.add(folder)
    for folder in folders - {""}:
        index.setdefault(f"{os.path.basename(folder)}/".casefold(), []).append(folder)
    return index


def overlap(path, other):
    """The number of parts of the shorter path if the longer ends with it, in any case, else 0."""
    short, long = sorted((path.casefold(), other.casefold()), key=len)
    return short.count("/") + 1 if f"/{long}".endswith(f"/{short}") else 0


def normalized(name):
    """A name in Unicode's composed form with single slashes, and none in front."""
    parts = unicodedata.normalize("NFC", name).replace("\\", "/").split("/")
    return "/".join([part for part in parts if part not in ("", ".")])


class Folder:
    """The files below a folder."""

    def __init__(self, path):
        self.name = path

    def __contains__(self, name):
        return bool(name) and ".." not in name.split("/") and os.path.exists(self.name / name)

    def __iter__(self):
        for folder, folders, files in os.walk(self.name):
            folders.sort()
            for file in sorted(files):
                yield os.path.relpath(os.path.join(folder, file), self.name)

    def read(self, name):
        """The bytes of a file, None if there are too many."""
        path = self.name / name
        return read_file(path) if path.stat().st_size <= MAX_BYTES else None


class Archive(dict):
    """{name: place, or for a link the name of its target} of the files of a zip or tar, which any
    number of threads may read."""

    def __init__(self, kind, paths):
        self.file, self.name = Joined(paths), paths[0]
        try:
            for (name, *more), place in (tar_members if kind == "tar" else zip_members)(self.file):
                for other in more:
                    self.setdefault(normalized(other), place)
                self[normalized(name)] = place  # of two with one name the later counts
            if not self:
                raise ValueError("there is no file in it")
        except Exception as error:  # tarfile and zipfile raise many types on damaged files
            raise UserError(f"{self.name} is incomplete or damaged ({one_line(error)}); "
                            "download it again") from None

    def read(self, name):
        place = name
        for _ in range(MAX_LINKS):
            place = self.get(place) if isinstance(place, str) else place
        if not isinstance(place, tuple):
            raise ImageError("a missing image", f"{name} is a link to no file in {self.name}")
        offset, size, full_size, method, crc = place
        if max(size, full_size) > MAX_BYTES:
            return None
        if method is None:  # tar
            return self.file.pread(size, offset)
        # The data follow a header of 30 bytes, which ends with the lengths of two names, and those.
        offset += 30 + sum(struct.unpack("<HH", self.file.pread(4, offset + 26)))
        content = self.file.pread(size, offset)
        if method == zipfile.ZIP_LZMA:  # as an .lzma file of unknown size
            content = content[4:9] + b"\xff" * 8 + content[9:]
        if method in DECOMPRESSORS:
            content = DECOMPRESSORS[method]().decompress(content, full_size + 1)
        if zlib.crc32(content) != crc:
            raise ValueError("it is encrypted; pack it without a password" if method == "encrypted"
                             else f"it is damaged, or compressed by an unknown method ({method})")
        return content


def decompressed(file, codec):
    """A stream of the content of an open file; codec: a value of MAGIC but zip."""
    import pyarrow  # supports zstd on every version of Python

    return lzma.LZMAFile(file) if codec == "xz" else pyarrow.input_stream(file, compression=codec)


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
    """Yield (possible names, (offset, size, full size, method, CRC)) of the files of a zip."""
    with zipfile.ZipFile(io.BufferedReader(file, BLOCK)) as archive:
        for member in archive.infolist():
            names = [member.filename]
            if not (member.flag_bits & 0x800 or member.filename.isascii()):  # of unknown encoding
                raw = member.orig_filename.encode("cp437")
                decoded = (raw.decode(encoding, "replace") for encoding in ("utf-8", "gbk"))
                names += [name for name in decoded if "\ufffd" not in name]
            method = "encrypted" if member.flag_bits & 1 else member.compress_type
            if not member.is_dir():
                yield names, (member.header_offset, member.compress_size, member.file_size, method,
                              member.CRC)


def tar_members(file):
    """The same of a tar, with the method None, or for a link the name of its target; blocks with a
    damaged header are skipped."""
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
            yield [member.name], (member.offset_data, member.size, member.size, None, 0)
        elif member.islnk() or member.issym():
            folder = os.path.dirname(member.name) if member.issym() else ""
            yield [member.name], normalized(os.path.normpath(f"{folder}/{member.linkname}"))


def local_paths(patterns, setting="the path"):
    """The paths that comma-separated paths and patterns match, part-9 before part-10.

    hf://OWNER/NAME/FILE is downloaded first. UserError names `setting` if one matches nothing.
    """
    paths = []
    for pattern in map(str.strip, patterns.split(",")):
        if pattern.startswith(hub.PREFIX):
            found = fetched(pattern)
        else:
            path = os.path.expanduser(pattern)
            found = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
            found = found or glob.glob(path.replace("\\", "/"), recursive=True)
            if "**" in path:  # which matches folders too
                found = list(filter(os.path.isfile, found)) or found
        if not found or not all(map(os.path.exists, found)):
            raise UserError(f"no file matches {pattern}, or a link is broken; correct {setting}")
        paths += map(Path, sorted(sorted(found), key=lambda path: [
            int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]))
    return paths


def identity_of(paths):
    """((path, size, modification time), ...) of files, which changes when one is replaced."""
    stats = [(path.absolute(), path.stat()) for path in paths]
    return tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats)


def fetched(pattern):
    """The local copies of the files that match hf://OWNER/NAME[@REVISION]/PATTERN."""
    from huggingface_hub import HfApi, hf_hub_download

    where, file = hub.address(pattern)
    if not file:
        raise UserError(f"{pattern} names no file; use the form hf://OWNER/NAME/chat.json")
    try:
        known = HfApi().list_repo_files(**where) if glob.has_magic(file) else [file]
        files = [file] if file in known else fnmatch.filter(known, file.replace("**/", "*"))
        paths = [hf_hub_download(filename=name, **where) for name in files]
    except Exception as error:  # the exception types depend on the library's HTTP client
        raise hub.failure(f"cannot download {pattern} from the Hugging Face Hub", error) from None
    if not paths:
        raise UserError(f"no file matches {pattern}; that data set has {', '.join(known[:9])}")
    return paths
