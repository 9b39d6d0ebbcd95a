"""The files of a data set, see data.py: token shards, chats with images, manifest.json.

Everything is appended to files as it comes; only the offsets of chats and images stay in memory.
"""

from array import array
from pathlib import Path

import numpy as np

import tokenizer as tokenizers
from common.atomic import NewFolder
from common.checkpoint import sums, write_json
from common.config import UserError, seal


def new_data_set(path, keep=False):
    """The NewFolder of a data set; UserError if `path` is something else than a data set."""
    if Path(path).exists() and not (Path(path) / "manifest.json").is_file():
        raise UserError(f"{path} exists and is not a data set, so it is not replaced; choose "
                        "another --out")
    return NewFolder(path, keep)


def write_manifest(folder, tokenizer, **counts):
    """manifest.json of a data folder, and the tokenizer beside it."""
    tokenizer.save(folder)
    write_json(folder / "manifest.json", seal({
        "tokenizer_name": tokenizer.name, "tokenizer": tokenizer.fingerprint,
        **counts, "sha256": sums(folder),
    }))  # fmt: skip


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
    """Write chats, each (ids, supervised, encoded images), into the files that data.Chats reads;
    returns counts for the manifest.

    A file of images has at most shard_bytes, but for an image that is larger: none is split.
    """
    folder.mkdir(parents=True)
    all_ids, mask = Array(folder / "ids.npy", np.uint16), Array(folder / "supervised.npy", np.bool_)
    offsets, first_image, image_offsets = (array("q", [0]) for _ in range(3))
    shard, n_shards = None, 0
    for ids, supervised, images in chats:
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
