"""The files of a data set, see data.py: token shards, chats with images, manifest.json.

Everything is appended to files as it comes, so a data set of any size takes the same memory.
"""

from pathlib import Path

import numpy as np

from common.atomic import NewFolder
from common.checkpoint import sums, write_json
from common.config import UserError, seal
from tokenizer import render


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


def check_size(tokenizer, cfg):
    """UserError if the ids of the tokenizer that cfg names do not fit into a data set."""
    if tokenizer.n_vocab > 65536:
        raise UserError(f"the tokenizer {cfg.tokenizer} has {tokenizer.n_vocab} ids, and data sets "
                        "hold 16-bit ids: at most 65536")


class Array:
    """A 1-D .npy file that grows; once closed it is what np.save would have written."""

    def __init__(self, path, dtype):
        self.dtype, self.size = np.dtype(dtype), 0
        self.file = open(path, "wb", buffering=1 << 18)  # noqa: SIM115 (closed by close)
        self._write_header()

    def append(self, values):
        values = np.asarray(values, self.dtype)
        self.file.write(values.tobytes())
        self.size += len(values)

    def close(self):
        self.file.seek(0)
        self._write_header()
        self.file.close()

    def _write_header(self):  # NumPy leaves room for the length to grow in place
        np.lib.format.write_array_header_1_0(self.file, {
            "descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False,
            "shape": (self.size,)})


class Shards:
    """Ids end to end in the files <split>_000000.npy, ..., of shard_tokens ids each."""

    def __init__(self, folder, split, shard_tokens):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.shard, self.n_shards, self.tokens = None, 0, 0

    def append(self, ids):
        while len(ids):
            if self.shard is None or self.shard.size == self.shard_tokens:
                self.close()
                name = f"{self.split}_{self.n_shards:06d}.npy"
                self.shard = Array(self.folder / name, np.uint16)
                self.n_shards += 1
            part = ids[: self.shard_tokens - self.shard.size]
            self.shard.append(part)
            self.tokens += len(part)
            ids = ids[len(part) :]

    def close(self):
        if self.shard is not None:
            self.shard.close()


def write_text(folder, split, documents, tokenizer, shard_tokens=100_000_000):
    """Shards of `documents` (strings), each after <|endoftext|>; returns the number of tokens."""
    shards = Shards(folder, split, shard_tokens)
    for document in documents:
        shards.append([tokenizer.end_of_text, *tokenizer.encode(document)])
    shards.close()
    return shards.tokens


class ChatWriter:
    """Writes chats and the encoded bytes of their images into the files that data.Chats reads.

    An image file has at most shard_bytes, but for an image that is larger: none is split.
    """

    def __init__(self, folder, shard_bytes=1_000_000_000):
        self.folder, self.shard_bytes = folder, shard_bytes
        folder.mkdir(parents=True)
        dtypes = {"ids": np.uint16, "supervised": np.bool_, "offsets": np.int64,
                  "first_image": np.int64, "image_offsets": np.int64}
        self.arrays = {name: Array(folder / f"{name}.npy", dtype)
                       for name, dtype in dtypes.items()}
        for name in "offsets", "first_image", "image_offsets":
            self.arrays[name].append([0])
        self.shard, self.n_shards, self.image_bytes = None, 0, 0

    def append(self, ids, supervised, images=()):
        """Append a chat: its ids, which of them are supervised, its encoded images."""
        self.arrays["ids"].append(ids)
        self.arrays["supervised"].append(supervised)
        self.arrays["offsets"].append([self.arrays["ids"].size])
        for image in images:
            self._append_image(image)
            self.arrays["image_offsets"].append([self.image_bytes])
        self.arrays["first_image"].append([self.arrays["image_offsets"].size - 1])

    def _append_image(self, image):
        if self.shard is None or self.shard.tell() + len(image) > self.shard_bytes:
            if self.shard:
                self.shard.close()
            path = self.folder / f"images_{self.n_shards:06d}.bin"
            self.shard = open(path, "wb")  # noqa: SIM115 (closed by close)
            self.n_shards += 1
        self.shard.write(image)
        self.image_bytes += len(image)

    def close(self):
        """Complete the files; returns counts for the manifest."""
        for file in (*self.arrays.values(), *([self.shard] if self.shard else [])):
            file.close()
        n_images = self.arrays["image_offsets"].size - 1
        if n_images == 0:
            for name in "first_image.npy", "image_offsets.npy":
                (self.folder / name).unlink()
        return {"chats": self.arrays["offsets"].size - 1, "tokens": self.arrays["ids"].size,
                "images": n_images}


def write_chats(folder, tokenizer, items):
    """A split folder from (messages, encoded images) pairs; returns its counts."""
    writer = ChatWriter(folder)
    for messages, images in items:
        chat = render(tokenizer, messages, len(images))
        writer.append(chat.ids, chat.supervised, images)
    return writer.close()
