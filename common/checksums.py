"""sha256 checks of data folders before training.

Small files are hashed every time. A large file is hashed once: its size, modification time and
inode are noted in .verified.json, and it is hashed again when one of them changes. Damage on the
disk that changes none of these is not seen; remove .verified.json to hash everything again.
"""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from common.checkpoint import file_sum, write_json
from common.config import UserError, read_json
from common.device import cores

SMALL = 1 << 24  # bytes; hashing that many takes 20 ms
NOTED = ".verified.json"  # {file: [sha256, size, modification time, inode]}
ANNOUNCED = 1 << 30  # hashing more bytes than these is worth a line


def check_together(folder, sums, apart_from=()):
    """check_sums by the first process of each machine; every process raises what it finds."""
    problem = None
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        try:
            check_sums(folder, sums, apart_from=apart_from)
        except UserError as error:
            problem = error
    if dist.is_initialized():
        found = torch.tensor(problem is not None, dtype=torch.float32,
                             device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(found)
        if found.item() and problem is None:
            problem = UserError(f"{folder} is damaged; another process names the file")
    if problem:
        raise problem


def check_sums(folder, sums, anew=False, apart_from=()):
    """UserError if a file of the folder is missing or does not have the sha256 in `sums`.

    sums: {file: sha256} of a manifest.json. anew: hash also what .verified.json knows. apart_from:
    files that are not checked.
    """
    if not (isinstance(sums, dict) and all(isinstance(digest, str) for digest in sums.values())):
        raise UserError(f"{Path(folder) / 'manifest.json'} is damaged: it has no sha256 sums")
    sums = {name: digest for name, digest in sums.items() if name not in apart_from}
    for name, problem in damaged(folder, sums, anew=anew).items():
        raise UserError(f"{folder} is damaged: {name} {problem}; prepare or copy it again")


def damaged(folder, sums, say=print, anew=False):
    """{file: problem} of the files of a folder that do not have the sha256 in `sums`."""
    folder = Path(folder)
    noted = {} if anew else read_notes(folder)
    current = {name: [sums[name], *identity(folder / name)] for name in sums}
    unknown = [name for name in sums if noted.get(name) != current[name]]
    n_bytes = sum(current[name][1] for name in unknown)
    if n_bytes > ANNOUNCED:
        say(f"{folder}: checking the sha256 of {n_bytes / 1e9:.1f} GB")
    with ThreadPoolExecutor(cores()) as pool:
        digests = dict(zip(unknown, pool.map(digest_of, [folder / n for n in unknown]),
                           strict=True))
    differs = "is not what manifest.json says (its sha256 differs)"
    problems = {name: differs if digest else "is missing or unreadable"
                for name, digest in digests.items() if digest != sums[name]}
    verified = {name: note for name, note in current.items()
                if name not in problems and note[1] > SMALL}
    new = {name: note for name, note in noted.items() if name not in sums} | verified
    if new != noted:
        write_notes(folder, new)
    return problems


def identity(path):
    """(size, modification time, inode) of a file; zeros if it cannot be looked at."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: a name that no file can have
        stat = path.stat()
        return stat.st_size, stat.st_mtime_ns, stat.st_ino
    return 0, 0, 0


def digest_of(path):
    """The sha256 of a file; "" if it is missing or cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        return file_sum(path)
    return ""


def read_notes(folder):
    with contextlib.suppress(UserError):
        noted = read_json(folder / NOTED)
        return noted if isinstance(noted, dict) else {}
    return {}


def write_notes(folder, noted):
    """Replace the notes atomically; without write permission there are none."""
    new = folder / f"{NOTED}.{os.uname().nodename}-{os.getpid()}"
    with contextlib.suppress(OSError):
        write_json(new, noted)
        new.replace(folder / NOTED)
