"""Token shards from the Hugging Face Hub, downloaded while training already runs.

The folder that `stream` fills has a shards.json that lists every shard, so the data order is known
before the shards have arrived. A file gets its name only when it is complete and has the hub's
sha256. Broken transfers are retried by huggingface_hub.
"""

import os
import re
import shutil
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from common.checkpoint import file_sum, write_json
from common.checksums import damaged
from common.config import UserError, one_line, read_sealed, seal

PREFIX = "hf://"  # of a data setting that names a data set of the hub
PREPARED = ("manifest.json", "tokenizer.json")  # files that prepare.py writes beside the shards
INCOMING = ".incoming"  # folder of files that are not yet complete and checked
PAUSE = 30.0  # seconds before a failed background download is tried again
ADDRESS = re.compile(r"(?:hf://)?(?:datasets/)?([^/@]+/[^/@]+)(?:@(refs/[^/]+/[^/]+|[^/]+))?/?(.*)")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
          "test": "test"}  # words in the names of shards


class NotYet(Exception):
    """A shard that has not arrived yet."""


@dataclass
class Remote:
    """A file of a hub repository."""

    name: str
    size: int  # bytes
    sha256: str  # "" where the hub has none

    def __post_init__(self):
        if self.name.startswith("/") or ".." in self.name.split("/"):
            raise UserError(f"the hub lists a file outside of its data set, {self.name!r}; it is "
                            "not downloaded")
        self.base = Path(self.name).name  # its name in the local folder
        self.split = split_of(self.name)


def split_of(name):
    """The split of a token shard by the words of its base name, "" if none is in SPLITS: that of
    pretrain/medieval_train_000.npy is train. UserError for the words of two splits."""
    words = re.findall("[a-z]+", Path(name).name.lower())
    splits = sorted({SPLITS[word] for word in words if word in SPLITS})
    if len(splits) > 1:
        raise UserError(f"the name of {name} has the words of two splits, {' and '.join(splits)}; "
                        "rename it")
    return "".join(splits)


def address(text):
    """({argument of huggingface_hub: value}, file or "") of OWNER/NAME[@REVISION][/FILE]."""
    match = ADDRESS.fullmatch(text)
    if not match:
        raise UserError(f"{text} is no data set of the hub; use the form hf://OWNER/NAME")
    repository, revision, file = match.groups()
    return {"repo_id": repository, "repo_type": "dataset", "revision": revision}, file


def failure(what, error):
    """The UserError of a failed request, with the library's whole advice, and whether to repeat it:
    not after a refusal (status 4xx, but not 408 or 429) or for a malformed name."""
    if isinstance(error, FileNotFoundError):  # that there is no local copy either
        error = error.__cause__ or error
    status = getattr(getattr(error, "response", None), "status_code", 500)
    final = status < 500 and status not in (408, 429)
    final = final or isinstance(error, ValueError | FileNotFoundError)
    resumes = "" if final else "; the same command resumes"
    return UserError(f"{what}: {one_line(error, 1000)}{resumes}")


def listing(repository):
    """The .npy files of a hub data set and those that prepare.py wrote beside them, as [Remote]
    sorted by name; UserError if a split is missing or two files have the same base name."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    where, _ = address(repository)
    try:
        files = list(HfApi().list_repo_tree(recursive=True, **where))
    except Exception as error:  # the exception types depend on the library's HTTP client
        raise failure(f"cannot list the data set {repository} of the hub", error) from None
    found = [Remote(file.path, file.size, file.lfs.sha256 if file.lfs else "")
             for file in files if isinstance(file, RepoFile)
             and (file.path.endswith(".npy") or file.path in PREPARED)]
    by_base = {}
    for remote in sorted(found, key=lambda remote: remote.name):
        if by_base.setdefault(remote.base, remote) is not remote:
            raise UserError(f"the hub's data set {repository} has two files of the same name, "
                            f"{by_base[remote.base].name} and {remote.name}; rename one of them")
    if lacking := {"train", "val"} - {remote.split for remote in found}:
        raise UserError(f"the hub's data set {repository} has no .npy file with the word "
                        f"{min(lacking)} in its name; names of folders do not count")
    return list(by_base.values())


def fetch(repository, remote, folder):
    """The path of a `remote` file in `folder`, downloaded unless it is there with the right sha256.

    Raises UserError if the download fails or arrives damaged.
    """
    from huggingface_hub import hf_hub_download

    path = Path(folder) / remote.base
    if matches(path, remote):
        return path
    try:
        arrived = Path(hf_hub_download(filename=remote.name, local_dir=Path(folder) / INCOMING,
                                       **address(repository)[0]))
        if not matches(arrived, remote):
            arrived.unlink()
            raise OSError("it arrived damaged")
        arrived.replace(path)
    except Exception as error:  # as in listing
        if not matches(path, remote):  # else another process was faster
            raise failure(f"cannot download {remote.name} of {repository}", error) from None
    return path


def matches(path, remote):
    """Whether there is a file with the size and, if the hub has it, the sha256 of `remote`."""
    return (path.is_file() and path.stat().st_size == remote.size
            and remote.sha256 in ("", file_sum(path)))


def stream(data, run):
    """The folder to read `data` from: `data` itself, or for hf://OWNER/NAME one that is filled.

    Waits for the validation shards and the first training shard. The first process of each machine
    downloads the others in the background, in the order in which training reads them.
    """
    if not data.startswith(PREFIX):
        return data
    repository, say = data.removeprefix(PREFIX).removeprefix("datasets/").strip("/"), run.log.say
    folder = Path("data/hub") / repository.replace("/", "--")
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        if not listed(folder):
            folder.mkdir(parents=True, exist_ok=True)
            content = seal({"files": [asdict(remote) for remote in listing(repository)]})
            new = folder / f".shards-{os.uname().nodename}.json"  # machines may share the folder
            write_json(new, content)
            new.replace(folder / "shards.json")
        remotes = listed(folder)
        present = {remote.base: remote.sha256 for remote in remotes
                   if remote.sha256 and (folder / remote.base).is_file()}
        wrong = damaged(folder, present)
        for path, size in ((folder / remote.base, remote.size) for remote in remotes):
            if path.is_file() and (path.name in wrong or path.stat().st_size != size):
                say(f"{path} is damaged; it is downloaded again")
                path.unlink()
        first, *train = [remote for remote in remotes if remote.split == "train"]
        for remote in [remote for remote in remotes if remote.split != "train"] + [first]:
            if not (folder / remote.base).is_file():
                say(f"{folder / remote.name} ({remote.size / 1e6:.0f} MB)")
                fetch(repository, remote, folder)
        threading.Thread(target=fetch_all, args=(repository, train, folder, say),
                         daemon=True).start()
    run.machine.barrier()
    return str(folder)


def fetch_all(repository, remotes, folder, say):
    """Download what is missing, one file after another, however long the network is down."""
    for remote in remotes:
        while not (folder / remote.base).is_file():
            try:
                fetch(repository, remote, folder)
            except UserError as error:
                say(f"{error}; trying again in {PAUSE:.0f} s")
                time.sleep(PAUSE)
    shutil.rmtree(folder / INCOMING, ignore_errors=True)


def listed(folder):
    """The [Remote] that a folder's shards.json says are, or will be, in it; [] without one."""
    path = Path(folder) / "shards.json"
    return [Remote(**file) for file in read_sealed(path)["files"]] if path.is_file() else []


def expected(folder, split=None):
    """{path: tokens} of the files of a split, or of all, that shards.json says are, or will be, in
    `folder`."""
    return {Path(folder) / remote.base: (remote.size - 128) // 2  # a header of 128 bytes
            for remote in listed(folder) if split in (None, remote.split)}
