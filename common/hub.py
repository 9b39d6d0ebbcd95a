"""Token shards from the Hugging Face hub: listed, fetched, checked, and fetched ahead of training.

A folder that `stream` makes has a shards.json that lists what is to come, so that the order of the
data is known before they are there. A file appears under its name only when it is whole and has
the hub's sha256; what was fetched once is never fetched again.
"""

import fnmatch
import os
import shutil
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from common.checkpoint import file_sum, write_json
from common.checksums import damaged
from common.config import UserError, read_json, read_sealed, seal

PREFIX = "hf://"  # what a data setting begins with to name a data set of the hub
BESIDE = ("manifest.json", "tokenizer.json")  # what prepare.py writes beside shards
HEADER = 128  # bytes in front of the array in a .npy file of this kind
ATTEMPTS, PAUSE = 5, 2.0  # how often a file is tried, and the first pause in seconds; it doubles


class NotYet(Exception):
    """A file that is still on its way."""


@dataclass
class Remote:
    """A file of a hub repository: name, bytes and the hub's sha256 ("" where it has none)."""

    name: str
    size: int
    sha256: str

    def __post_init__(self):
        if not (isinstance(self.name, str) and isinstance(self.sha256, str)
                and isinstance(self.size, int)):
            raise TypeError
        if self.name.startswith("/") or ".." in self.name.split("/"):
            raise UserError(f"the hub lists a file outside of its data set, {self.name!r}, which "
                            "is not fetched")
        self.base = Path(self.name).name  # as it is called in a folder here


def listing(repository):
    """The .npy files (Remote) of a hub data set, by name, and what is BESIDE them; UserError if
    there are none."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    try:
        files = list(HfApi().list_repo_tree(repository, recursive=True, repo_type="dataset"))
    except Exception as error:  # whatever the library's network layer of the day raises
        raise UserError(f"the Hugging Face hub does not list the data set {repository}: "
                        f"{first_line(error)}") from None
    found = [Remote(file.path, file.size, file.lfs.sha256 if file.lfs else "")
             for file in files if isinstance(file, RepoFile)
             and (file.path.endswith(".npy") or file.path in BESIDE)]
    if not any(remote.name.endswith(".npy") for remote in found):
        raise UserError(f"the hub's data set {repository} has no .npy files")
    return sorted(found, key=lambda remote: remote.name)


def fetch(repository, remote, folder, say=print):
    """The path of a `remote` file in `folder`, fetched unless it is there and right.

    The library mends a transfer that breaks while it runs. Raises UserError when ATTEMPTS fail.
    """
    path = Path(folder) / remote.base
    # Of this process alone: several machines may fill the same folder.
    incoming = Path(folder) / f".incoming-{socket.gethostname()}-{os.getpid()}"
    for attempt in range(ATTEMPTS):
        if path.is_file() and is_right(path, remote):
            return path
        try:
            arrived = download(repository, remote.name, incoming)
            if is_right(arrived, remote):
                os.replace(arrived, path)
                shutil.rmtree(incoming)
                return path
            arrived.unlink()
            problem = "it arrived damaged"
        except Exception as error:  # as in listing
            problem = first_line(error)
        if attempt + 1 < ATTEMPTS:
            pause = PAUSE * 2**attempt
            say(f"{remote.name}: {problem}; trying again in {pause:.0f} s")
            time.sleep(pause)
    raise UserError(f"cannot fetch {remote.name} of {repository}: {problem}; the same command "
                    "goes on with this file")


def download(repository, name, folder):
    """One attempt; whoever asks for the file again gets it from the start."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, name, repo_type="dataset", local_dir=folder))


def is_right(path, remote):
    """Whether the file has the size and, where the hub tells it, the sha256 it should have."""
    return path.stat().st_size == remote.size and remote.sha256 in ("", file_sum(path))


def first_line(error):
    """What an error says, on one line; its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------- streaming


def stream(data, run):
    """The folder to read `data` from: itself, or for hf://OWNER/NAME a folder that fills.

    Waits for the validation shards and the first training shard; the others are fetched in the
    background by the first process of each machine, in the order in which they will be read.
    """
    if not data.startswith(PREFIX):
        return data
    repository = data.removeprefix(PREFIX).strip("/")
    folder = Path("data/hub") / repository.replace("/", "--")
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        remotes = known_listing(repository, folder)
        clear_incoming(folder)
        drop_damaged(remotes, folder, run.log.say)
        train = [remote for remote in remotes if fnmatch.fnmatch(remote.name, "*train*.npy")]
        others = [remote for remote in remotes if remote not in train]
        for remote in missing([*others, *train[:1]], folder):
            run.log.say(f"{folder / remote.name} ({remote.size / 1e6:.0f} MB)")
            fetch(repository, remote, folder, run.log.say)
        later = missing(train[1:], folder)
        threading.Thread(target=fetch_all, args=(repository, later, folder, run.log),
                         daemon=True).start()
    run.machine.barrier()
    return str(folder)


def clear_incoming(folder):
    """Remove what processes of this machine that were killed have fetched by halves."""
    for path in folder.glob(f".incoming-{socket.gethostname()}-*"):
        try:
            os.kill(int(path.name.rpartition("-")[2]), 0)  # asks whether it is alive
        except ProcessLookupError:
            shutil.rmtree(path)
        except OSError:  # somebody else's
            pass


def missing(remotes, folder):
    return [remote for remote in remotes if not (folder / remote.base).is_file()]


def known_listing(repository, folder):
    """The listing that `folder` has, or the hub's, which it gets."""
    if remotes := listed(folder):
        return remotes
    remotes = listing(repository)
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f".shards-{socket.gethostname()}.json"
    write_json(fresh, seal({"files": [asdict(remote) for remote in remotes]}))
    fresh.replace(folder / "shards.json")
    return remotes


def listed(folder):
    """The files (Remote) that the shards.json of a folder says are, or will be, in it; [] where
    there is none."""
    path = Path(folder) / "shards.json"
    if not path.is_file():
        return []
    content = read_json(path)
    if not isinstance(content, list):  # as it was written before it had a seal
        content = read_sealed(path).get("files")
    try:
        return [Remote(**entry) for entry in content]
    except TypeError:
        raise UserError(f"{path} is damaged: it is no list of files; remove it, and the hub is "
                        "asked again") from None


def drop_damaged(remotes, folder, say):
    """Remove what is in the folder and is not what the hub has, so that it is fetched again."""
    here = {remote.base: remote for remote in remotes if (folder / remote.base).is_file()}
    sums = {name: remote.sha256 for name, remote in here.items() if remote.sha256}
    wrong = damaged(folder, sums, say=say)
    for name, remote in here.items():
        if name in wrong or (folder / name).stat().st_size != remote.size:
            say(f"{folder / name} is damaged; it is fetched again")
            (folder / name).unlink(missing_ok=True)


def fetch_all(repository, remotes, folder, log):
    """Fetch one after the other, however long the network is away: training goes on meanwhile."""
    for remote in remotes:
        while True:
            try:
                fetch(repository, remote, folder, log.say)
                break
            except UserError as error:
                log.say(f"{error}; trying on")


def expected(folder, pattern):
    """{path: tokens} of the shards that shards.json says are, or will be, in `folder`."""
    return {Path(folder) / remote.base: (remote.size - HEADER) // 2 for remote in listed(folder)
            if fnmatch.fnmatch(remote.name, pattern)}


def is_coming(path):
    """Whether a file that is not there is still to come."""
    return Path(path) in expected(Path(path).parent, "*")
