"""Whether the files of a data folder are still what they were when they were made.

Every stage asks before it trains. Small files are summed every time. A large one is summed once:
its size, inode and time of change are noted in .verified.json beside it, and it is summed again
when one of them is another. Damage on the disk that changes none of these, behind a sum that was
right, goes unseen; without .verified.json everything is summed anew.
"""

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from common.checkpoint import file_sum, write_json
from common.config import UserError, read_json
from common.device import cores

SMALL = 1 << 24  # bytes; to sum that many takes 20 ms
NOTED = ".verified.json"  # {file: [sha256, size, time of change, inode]}
MUCH, SAY_SECONDS = 1 << 30, 10.0  # bytes worth a line before they are summed; between the lines


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
            problem = UserError(f"{folder} is damaged; another process says which file")
    if problem:
        raise problem


def check_sums(folder, sums, anew=False, apart_from=()):
    """UserError if a file of the folder is missing or has not the sha256 that `sums` says.

    sums: what a manifest.json says, {file: sha256}. anew: without what was noted. apart_from: files
    that are not looked at.
    """
    if not (isinstance(sums, dict) and all(isinstance(wanted, str) for wanted in sums.values())):
        raise UserError(f"{Path(folder) / 'manifest.json'} is damaged: it lists no sums of files")
    sums = {name: wanted for name, wanted in sums.items() if name not in apart_from}
    for name, problem in damaged(folder, sums, anew).items():
        raise UserError(f"{folder} is damaged: {name} {problem}; make it again")


def damaged(folder, sums, anew=False, say=print):
    """{file: what is wrong with it} of the files of a folder that are not what `sums` says."""
    folder = Path(folder)
    found = {name: identity(folder / name) for name in sums}
    noted = read_notes(folder)
    wanted = {name: [sums[name], *found[name]] for name in sums if found[name]}
    ahead = [name for name in wanted if anew or noted.get(name) != wanted[name]]
    n_bytes = sum(found[name][0] for name in ahead)
    began = said = time.monotonic()
    if n_bytes > MUCH:
        say(f"{folder}: checking the sums of {n_bytes / 1e9:.1f} GB")
    wrong = {name: "is missing" for name in sums if not found[name]}
    with ThreadPoolExecutor(cores()) as pool:
        for name, digest in zip(ahead, pool.map(lambda name: sum_of(folder / name), ahead),
                                strict=True):
            if digest != sums[name]:
                wrong[name] = "is not what manifest.json says (its sha256 differs)"
            elif time.monotonic() - said >= SAY_SECONDS:
                said = time.monotonic()
                say(f"the sum of {name} is right")
    if n_bytes > MUCH and not wrong:
        say(f"{folder}: all sums are right, in {time.monotonic() - began:.0f} s")
    right = {name: note for name, note in wanted.items() if name not in wrong and note[1] > SMALL}
    fresh = {**{name: note for name, note in noted.items() if name not in sums}, **right}
    if fresh != noted:
        write_notes(folder, fresh)
    return wrong


def identity(path):
    """[size, time of change, inode] of a file; None if there is no such file."""
    try:
        stat = path.stat()
        return [stat.st_size, stat.st_mtime_ns, stat.st_ino] if path.is_file() else None
    except (OSError, ValueError):  # a name that no file can have
        return None


def sum_of(path):
    """The sha256 of a file, "" if the disk does not give it."""
    with contextlib.suppress(OSError):
        return file_sum(path)
    return ""


def read_notes(folder):
    with contextlib.suppress(UserError):
        noted = read_json(folder / NOTED)
        return noted if isinstance(noted, dict) else {}
    return {}


def write_notes(folder, noted):
    """Replace the notes at once, as several machines may; where nobody may write there are none."""
    fresh = folder / f"{NOTED}.{os.uname().nodename}-{os.getpid()}"
    with contextlib.suppress(OSError):
        try:
            write_json(fresh, noted)
            fresh.replace(folder / NOTED)
        finally:
            fresh.unlink(missing_ok=True)
