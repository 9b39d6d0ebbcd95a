"""Compressed tars made plain: once, for all the pictures that are wanted of them."""

import hashlib
import io
import os
import time

from common.archives import BLOCK, Joined, identity_of
from common.config import UserError
from prep.resumable import PROGRESS_SECONDS

RATIO, ROOM = 100, 1 << 30  # an archive that grows to more than RATIO times and ROOM is a trap


def unpacked(paths, codec, folder):
    """The path of a plain tar, made in `folder`, with what a compressed one holds.

    A compressed tar can be read only from its start, and pictures are wanted in the order of the
    rows: so it is unpacked to one file whose members are found by their places. After a stop, what
    is there already is compared with what it should be, and not written again.
    """
    key = hashlib.sha256(repr(identity_of(paths)).encode()).hexdigest()[:16]
    done, half = folder / f"{key}.tar", folder / f"{key}.part"
    if done.is_file():
        return done
    folder.mkdir(exist_ok=True)
    half.touch()
    source, at, said = Joined(paths), 0, time.monotonic()
    with open(half, "r+b") as file:
        for block in blocks(source, codec, paths[0]):
            if file.read(len(block)) != block:
                file.seek(at)
                file.write(block)
                file.truncate()
            at += len(block)
            if at > RATIO * source.size + ROOM:
                half.unlink()
                raise UserError(f"{paths[0]} unpacks to more than {RATIO} times its size, as no "
                                "pictures do; it was made to fill the disk, so do not use it")
            if time.monotonic() - said > PROGRESS_SECONDS:
                said = time.monotonic()
                print(f"unpacking {paths[0]}: {at / 1e9:.1f} GB, {source.at / source.size:.0%} "
                      "done", flush=True)
        file.truncate(at)
        file.flush()
        os.fsync(file.fileno())
    half.rename(done)
    return done


def blocks(source, codec, name):
    """Yield the bytes of a compressed stream, up to where it is damaged."""
    import pyarrow  # it brings zstd along, on any Python

    file = pyarrow.PythonFile(io.BufferedReader(source, BLOCK), "r")
    stream = pyarrow.CompressedInputStream(file, codec)
    while True:
        try:
            block = stream.read(BLOCK)
        except OSError:
            print(f"the end of {name} is missing or damaged; what comes before it is used")
            return
        if not block:
            return
        yield block
