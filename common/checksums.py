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
from tqdm import tqdm

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
    problems = [{}]
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        problems = [damaged(folder, {name: sums[name] for name in sums if name not in apart_from})]
    if dist.is_initialized():
        own, problems = problems[0], [{}] * dist.get_world_size()
        dist.all_gather_object(problems, own)
    for name, problem in (item for found in problems for item in found.items()):
        raise UserError(f"{folder} is damaged: {name} {problem}; prepare or copy it again")


def damaged(folder, sums):
    """{file: problem} of the files of a folder that do not have the sha256 in `sums`."""
    folder, noted, verified = Path(folder), {}, {}
    with contextlib.suppress(UserError, TypeError, ValueError):
        noted = dict(read_json(folder / NOTED))

    def problem_of(name):
        try:
            stat = (folder / name).stat()
            note = [sums[name], stat.st_size, stat.st_mtime_ns, stat.st_ino]
            if noted.get(name) == note:
                return None
            if file_sum(folder / name) != sums[name]:
                return "is not what manifest.json says (its sha256 differs)"
        except (OSError, ValueError):  # ValueError: a name that no file can have
            return "is missing or unreadable"
        if stat.st_size > SMALL:
            verified[name] = note
        return None

    with ThreadPoolExecutor(cores()) as pool:
        progress = tqdm(pool.map(problem_of, sums), f"checking the sha256 of {folder}", len(sums),
                        delay=2, disable=None)  # shown after 2 seconds, and only on a terminal
        problems = dict(zip(sums, progress, strict=True))
    if verified:
        new = folder / f"{NOTED}.{os.uname().nodename}-{os.getpid()}"
        with contextlib.suppress(OSError):  # without write permission there are no notes
            write_json(new, noted | verified)
            new.replace(folder / NOTED)
    return {name: problem for name, problem in problems.items() if problem}
