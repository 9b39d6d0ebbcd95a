"""sha256 checks of data folders before training.

Small files are hashed every time. A large file is hashed once: its size, modification time and
inode are noted in .verified.json, and it is hashed again when one of them changes. Damage on the
disk that changes none of these is not seen; remove .verified.json to hash everything again.
"""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from common.checkpoint import file_sum, write_json
from common.config import UserError, read_json
from common.device import cores

SMALL = 1 << 24  # bytes; hashing that many takes 20 ms
NOTED = ".verified.json"  # {file: [sha256, size, modification time, inode]}


def check_together(folder, sums, apart_from=()):
    """UserError in every process if a file of the folder is missing or does not have its sha256.

    The first process of each machine looks. sums: {file: sha256} of a manifest.json; apart_from:
    files that are not checked.
    """
    sums, problems = {name: sums[name] for name in sums if name not in apart_from}, [{}]
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        problems = [damaged(folder, sums)]
    if dist.is_initialized():
        own, problems = problems[0], [{}] * dist.get_world_size()
        dist.all_gather_object(problems, own)
    for name, problem in (item for found in problems for item in found.items()):
        raise UserError(f"{folder} is damaged: {name} {problem}; prepare or copy it again")


def damaged(folder, sums):
    """{file: problem} of the files of a folder that do not have the sha256 in `sums`."""
    noted = read_notes(folder)
    paths = {name: Path(folder, name) for name in sums}
    current = {name: [sums[name], *identity(path)] for name, path in paths.items()}
    unknown = [name for name in sums if noted.get(name) != current[name]]
    n_bytes = sum(current[name][1] for name in unknown)
    if n_bytes > 1e9:
        print(f"{folder}: checking the sha256 of {n_bytes / 1e9:.1f} GB", flush=True)
    with ThreadPoolExecutor(cores()) as pool:
        digests = list(pool.map(digest_of, [paths[name] for name in unknown]))
    differs = "is not what manifest.json says (its sha256 differs)"
    problems = {name: differs if digest else "is missing or unreadable"
                for name, digest in zip(unknown, digests, strict=True) if digest != sums[name]}
    verified = {name: current[name] for name in unknown
                if name not in problems and current[name][1] > SMALL}
    if verified:
        write_notes(folder, {**noted, **verified})
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
    with contextlib.suppress(UserError, TypeError, ValueError):
        return dict(read_json(Path(folder, NOTED)))
    return {}


def write_notes(folder, noted):
    """Replace the notes atomically; without write permission there are none."""
    new = Path(folder, f"{NOTED}.{os.uname().nodename}-{os.getpid()}")
    with contextlib.suppress(OSError):
        write_json(new, noted)
        new.replace(Path(folder, NOTED))
