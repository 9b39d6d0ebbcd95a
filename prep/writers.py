"""The files of a data set, see data.py: token shards, chats with images, manifest.json.

Everything is appended to files as it comes; only the offsets of chats and images stay in memory.
"""

import os
from array import array
from functools import partial

import numpy as np

import tokenizer as tokenizers
from common.atomic import NewFolder
from common.checkpoint import sums, write_json
from common.checksums import NOTED
from common.config import UserError, read_json, seal

IGNORED = ("manifest.json", ".DS_Store")  # files that no manifest lists; the second is of macOS


def new_data_set(path, command):
    """The NewFolder of a data set by `prepare.py command`; UserError if `path` has anything that
    this command did not write."""
    return NewFolder(path, partial(check_replaceable, command=command))


def check_replaceable(path, command):
    """UserError unless `path` is new, empty, or holds only what `prepare.py command` wrote."""
    kept, advice = f"{path} is not replaced: ", "; choose another --out, or remove it"
    manifests = sorted(path.rglob("manifest.json")) if path.is_dir() else []
    if path / "manifest.json" not in manifests:
        if os.path.lexists(path) and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{kept}it is not a data set{advice}")
        return
    for manifest in manifests:
        found = read_json(manifest)
        made_by = isinstance(found, dict) and found.get("made_by")
        if made_by != f"prepare.py {command}":
            raise UserError(f"{kept}{manifest} is not of prepare.py {command}, but of "
                            f"{made_by or 'an older version or another program'}{advice}")
    known = read_json(path / "manifest.json").get("sha256", {})
    for file in sorted(path.rglob("*")):
        if (str(file.relative_to(path)) not in known and not file.name.startswith(NOTED)
                and file.name not in IGNORED and (file.is_symlink() or not file.is_dir())):
            raise UserError(f"{kept}prepare.py {command} did not make its file {file}; move that "
                            "elsewhere, or choose another --out")


def write_manifest(folder, command, tokenizer=None, **counts):
    """manifest.json of a data folder by `prepare.py command`, and the tokenizer beside it."""
    if tokenizer:
        tokenizer.save(folder)
        counts |= {"tokenizer_name": tokenizer.name, "tokenizer": tokenizer.fingerprint}
    if "sha256" not in counts:
        counts["sha256"] = sums(folder)
    write_json(folder / "manifest.json", seal({"made_by": f"prepare.py {command}", **counts}))


class Array:
    """A 1-D .npy file that grows; once closed it is what np.save would have written."""

    def __init__(self, path, dtype):
        self.dtype, self.size = np.dtype(dtype), 0
        self.file = open(path, "wb", buffering=1 << 18)  # noqa: SIM115 (closed by close)
        self.file.seek(128)  # bytes of the header of a 1-D array of any length

    def append(self, values):
        self.file.write(np.asarray(values, self.dtype).tobytes())
        self.size += len(values)

    def close(self):
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(self.file, {
            "descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False,
            "shape": (self.size,)})
        self.file.close()


def write_shards(folder, split, documents, shard_tokens=100_000_000):
    """The ids of documents, end to end, in files <split>_000000.npy, ... of shard_tokens ids each;
    returns the number of ids."""
    shard, n = None, 0
    for ids in documents:
        while len(ids):
            number, used = divmod(n, shard_tokens)
            if used == 0:
                if shard:
                    shard.close()
                shard = Array(folder / f"{split}_{number:06d}.npy", np.uint16)
            part, ids = ids[: shard_tokens - used], ids[shard_tokens - used :]
            shard.append(part)
            n += len(part)
    if shard:
        shard.close()
    return n


def write_split(folder, chats, shard_bytes=1_000_000_000):
    """Write chats, each beginning with (ids, supervised, images), into the files of data.Chats;
    returns counts for the manifest.

    A file of images has at most shard_bytes, but for an image that is larger: none is split.
    """
    folder.mkdir(parents=True)
    all_ids, mask = Array(folder / "ids.npy", np.uint16), Array(folder / "supervised.npy", np.bool_)
    offsets, first_image, image_offsets = (array("q", [0]) for _ in range(3))
    shard, n_shards = None, 0
    for ids, supervised, images, *_ in chats:
        all_ids.append(ids)
        mask.append(supervised)
        offsets.append(all_ids.size)
        for image in images:
            if not shard or shard.tell() + len(image) > shard_bytes:
                if shard:
                    shard.close()
                shard = open(folder / f"images_{n_shards:06d}.bin", "wb")  # noqa: SIM115
                n_shards += 1
            shard.write(image)
            image_offsets.append(image_offsets[-1] + len(image))
        first_image.append(len(image_offsets) - 1)
    arrays = {"offsets": offsets}
    if shard:
        shard.close()
        arrays |= {"first_image": first_image, "image_offsets": image_offsets}
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", np.array(values))
    for file in all_ids, mask:
        file.close()
    return {"chats": len(offsets) - 1, "tokens": all_ids.size, "images": len(image_offsets) - 1}


def write_chats(folder, tokenizer, items):
    """A split folder from (messages, encoded images) pairs; returns its counts."""
    def rendered():
        for messages, images in items:
            chat = tokenizers.render(tokenizer, messages, len(images))
            yield chat.ids, chat.supervised, images

    return write_split(folder, rendered())
