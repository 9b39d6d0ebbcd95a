"""What a batch, a document and a chat are, and how they are stored.

    text/   *_train_*.npy, *_val_*.npy  1-D uint16 token shards; <|endoftext|> begins each document

    chats/  {train,val}/ ids.npy, supervised.npy, offsets.npy            chats, concatenated
            images_*.bin, image_offsets.npy, first_image.npy             their encoded images; one
            <|image|> id marks the place of an image

Each data set has a manifest.json with counts and sha256 sums. prepare.py writes all of it.

One micro-batch from disk to loss, in vision_sft.py:
B rows of T positions, M images of P patches and S x S pixels, N supervised positions, width C.

    ids.npy, supervised.npy                          images_*.bin
       |  Chats.chat(i)                                 |  Chats.images(i, spec)
       v                                                v
    ids (n,), supervised (n,)                        PIL images
       |                                                |
       |  Packed.batch (train/packing.py) puts complete chats side by side into rows
       |  and repeats each <|image|> id for the P patches of its image
       v                                                v
    ids        (B, T)  |chat 1  |chat 2      |pad|   pixels (M, S, S, 3) uint8
    positions  (B, T)   0 1 2 3  0 1 2 3 4 5  0         |
    segments   (B, T)   1 1 1 1  2 2 2 2 2 2  0         |   attention stays within a segment
    where      (N,)     flat indices of the positions   |
    targets    (N,)     whose next id is supervised     |
       |                                                |
       |  Loader (train/loader.py): this process's share of the step, on its device
       v                                                v
    token_embedding (B, T, C)  <--image_positions--  vision_tower, projector (M, P, C)   vision.py
       |  GPT.hidden, model.py
       v
    (B, T, C)  --where-->  (N, C)  --head_loss-->  summed cross-entropy  --/ n_targets-->  loss
"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import tokenizer as tokenizers
from common import hub
from common.checkpoint import steps_in
from common.checksums import check_together
from common.config import UserError, one_line, read_sealed
from common.images import ImageError, read_image


@dataclass
class Batch:
    """One micro-batch of one process; shapes as in the drawing above."""

    ids: torch.Tensor  # (B, T)
    targets: torch.Tensor | None = None  # (N,), or (B, T) where every position is supervised
    where: torch.Tensor | None = None  # (N,), flat positions into B * T
    positions: torch.Tensor | None = None  # (B, T), from 0 in every chat
    segments: torch.Tensor | None = None  # (B, T), number of the chat in its row; 0 is padding
    bounds: torch.Tensor | None = None  # int32, where chats and pieces of padding begin in B * T
    longest: int = 0  # positions of the longest of those
    attended: int = 0  # pairs of positions of the same chat; 0: all of a row, B * T * T
    pixels: torch.Tensor | None = None  # (M, S, S, 3) uint8
    image_positions: torch.Tensor | None = None  # (M * P,), flat positions, image by image
    keys: torch.Tensor | None = None  # (B,), for CLIP: equal for identical captions
    n_targets: int = 0  # supervised positions of the complete step, in all processes
    is_last: bool = False  # of the micro-batches of its step

    def to(self, device):
        """This batch with its tensors on the device; copies to a GPU are asynchronous."""
        if device.type == "cuda":
            self.pin_memory()
        return self._each(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def pin_memory(self):
        """This batch with its tensors in pinned memory."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change):
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, change(value))
        return self


class ImageSpec(NamedTuple):
    """What a model expects of an image: its positions, its size, how it is made square."""

    n_patches: int  # positions in the text
    size: int  # side in pixels
    fit: str = "pad"  # see common.images.fit


class Text:
    """Windows of T + 1 tokens over all shards of a split; consecutive windows share one token.

    folder: of shards, or one that hub.stream is downloading. That is shuffled within groups of 1,
    1, 2, 4 ... shards (`groups`: window numbers), so that training can begin with the first shard.
    """

    def __init__(self, folder, split, T, n_vocab):
        self.name, self.T, self.n_vocab = f"{folder} ({split})", T, n_vocab
        coming = hub.expected(folder, split)
        self.paths = list(coming) or shards_in(folder, split)
        if not self.paths:
            raise UserError(f"no .npy file in {folder} has the word {split} in its name; "
                            "prepare.py text makes such a folder")
        lengths = list(coming.values()) or [len(read_array(p, np.uint16)) for p in self.paths]
        self.first = np.cumsum([0, *((length - 1) // T for length in lengths)])
        if len(self) == 0:
            raise UserError(f"the data set {self.name} is empty: no shard has {T + 1} tokens")
        if coming:
            ends = [0, *(2**i for i in range(len(lengths).bit_length()) if 2**i < len(lengths))]
            self.groups = self.first[[*ends, len(lengths)]]

    def __len__(self):
        return int(self.first[-1])

    def n_targets(self, rows):
        return len(rows) * self.T

    def window(self, i, opened=None):
        """The T + 1 tokens of window i. opened: dict of the shards that are open already."""
        number = int(np.searchsorted(self.first, i, side="right")) - 1
        opened = {} if opened is None else opened
        if number not in opened:
            opened[number] = read_array(self.paths[number], np.uint16)
        start = (i - int(self.first[number])) * self.T
        return opened[number][start : start + self.T + 1]

    def batch(self, rows):
        """The Batch of some windows: ids and targets (B, T)."""
        # Shards are mapped for one batch at a time: pages that were read count as memory of the
        # process as long as the mapping exists, and 10 B tokens would become 20 GB.
        opened = {}
        tokens = np.stack([self.window(i, opened) for i in rows]).astype(np.int64)
        if tokens.max() >= self.n_vocab:
            raise UserError(f"{self.name} holds the id {tokens.max()}, but the vocabulary has "
                            f"{self.n_vocab}: it was made with another tokenizer")
        tokens = torch.from_numpy(tokens)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def shards_in(folder, split):
    """The token shards of a split, sorted, by the words of their names (hub.split_of)."""
    return sorted(path for path in Path(folder).glob("*.npy") if hub.split_of(path) == split)


def read_array(path, dtype):
    """The 1-D array in `path`, memory-mapped, or a UserError that names the file."""
    if not Path(path).exists() and Path(path) in hub.expected(Path(path).parent):
        raise hub.NotYet(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        found = f"{array.ndim}-D {array.dtype}"
    except Exception as error:  # NumPy raises many types on malformed headers, and for archives
        raise UserError(f"{path} is not a complete .npy file: {one_line(error)}") from None
    if array.ndim != 1 or array.dtype != dtype:
        raise UserError(f"{path} holds {found}, expected 1-D {np.dtype(dtype)}")
    return array


# Kinds of data folders: what is in them, which settings take them, what makes them
KINDS = {
    "text": ("token shards of text", "pretrain.py and --replay", "prepare.py text"),
    "chats": ("text-only chats", "sft.py and --text_data", "prepare.py chat"),
    "images": ("chats about images", "clip_pretrain.py and the vision stages", "prepare.py images"),
    "several": ("several data sets, named text, chats, captions and scenes", "eval.py",
                "prepare.py demo"),
}


def kind_of(path):
    """The kind of the data in a folder, one of KINDS or "" for anything else."""
    folder = Path(path)
    if any(folder.glob("*/ids.npy")):
        return "images" if any(folder.glob("*/first_image.npy")) else "chats"
    if hub.listed(folder) or (any(folder.glob("*.npy")) and not (folder / "ids.npy").exists()):
        return "text"
    return "several" if any(folder.glob("*/*.npy")) or any(folder.glob("*/*/ids.npy")) else ""


def check_kind(path, *kinds, setting="--data="):
    """UserError that says what is at `path`, and what takes it, if that is of none of the kinds.
    A setting that is empty is only refused if it is --data."""
    found, folder, maker = kind_of(path), Path(path), KINDS[kinds[0]][2]
    if found in kinds or (not path and setting != "--data="):
        return
    suffixes = Counter(file.suffix for file in folder.glob("[!.]*.*") if file.is_file())
    if found == "several":
        fitting = [str(sub) for sub in sorted(folder.iterdir()) if kind_of(sub) in kinds]
        what = "holds several data sets: " + (f"use {fitting[0]}" if fitting else "none fits")
    elif found:
        what = f"holds {KINDS[found][0]}, for {KINDS[found][1]}"
    elif not folder.exists():
        what = "does not exist"
    elif (folder / "config.json").is_file() or steps_in(folder):
        what = "is a checkpoint or a run"
    elif "several" in kinds or not (suffixes or folder.is_file()):
        what = "holds no data set"
    else:
        suffix = max(suffixes, key=suffixes.get, default="")
        files = (f"--image_root={path}" if suffix.lower() in Image.EXTENSION else
                 f"--files='{path}/*{suffix}'" if suffix else f"--files={path}")
        what = f"is not prepared yet: {maker} {files}"
    needed = " or ".join(KINDS[kind][0] for kind in kinds)
    raise UserError(f"{setting}{path} {what}; needed are {needed}, as {maker} makes them")


def check_tokenizer(folder, tokenizer=None):
    """The tokenizer of the data in `folder`, which must be `tokenizer` if that is given, and whose
    files must have the manifest's sha256. A folder without a manifest (the public token shards) is
    taken to be GPT-2's."""
    manifest = Path(folder) / "manifest.json"
    if not Path(folder).is_dir():
        raise UserError(f"there is no data folder {folder}; prepare.py makes it")
    if not manifest.is_file():
        if tokenizer is not None and tokenizer.name != "gpt2":
            raise UserError(f"{folder} has no manifest.json, so its tokens are taken to be "
                            "GPT-2's, but the model has another tokenizer")
        return tokenizer or tokenizers.load("gpt2")
    info = read_sealed(manifest)
    if not {"tokenizer", "tokenizer_name"} <= info.keys():
        raise UserError(f"{folder} is not a data set; name one of the folders in it")
    coming = {path.name for path in hub.expected(folder)}  # checked on arrival by hub.py
    check_together(folder, info.get("sha256", {}), coming)
    if tokenizer is None:
        return tokenizers.load("gpt2" if info["tokenizer_name"] == "gpt2" else folder)
    if info["tokenizer"] != tokenizer.fingerprint:
        raise UserError(f"the data in {folder} was made with another tokenizer than the model's; "
                        "prepare it again with --tokenizer pointing at the model's")
    return tokenizer


class Chats:
    """The chats of one split of a folder that prepare.py made, and their images.

    What train.packing.Packed reads of it, Documents, Share and image_ablation.AblatedChats have
    too: `folder`, which names it in messages, `manifest`, which may be empty, the number of chats
    by len(), `chat` and `images`.
    """

    def __init__(self, folder, split):
        self.root, self.split, self.folder = Path(folder), split, Path(folder) / split
        self.ids = read_array(self.folder / "ids.npy", np.uint16)
        self.supervised = read_array(self.folder / "supervised.npy", np.bool_)
        self.offsets = read_array(self.folder / "offsets.npy", np.int64)
        manifest = self.root / "manifest.json"
        self.manifest = read_sealed(manifest) if manifest.is_file() else {}
        shards = sorted(self.folder.glob("images_*.bin"))
        self.has_images = bool(shards) or (self.folder / "first_image.npy").exists()
        if self.has_images:
            self.first_image = read_array(self.folder / "first_image.npy", np.int64)
            self.image_offsets = read_array(self.folder / "image_offsets.npy", np.int64)
            self.shards = [open(path, "rb", buffering=0) for path in shards]  # noqa: SIM115
            self.shard_starts = np.cumsum([0, *(path.stat().st_size for path in shards)])
            if self.shard_starts[-1] != self.image_offsets[-1]:
                raise UserError(f"images_*.bin in {self.folder} hold {self.shard_starts[-1]} bytes,"
                                f" expected {self.image_offsets[-1]}; prepare it again")

    def __reduce__(self):  # other processes open the files again
        return Chats, (self.root, self.split)

    def __len__(self):
        return len(self.offsets) - 1

    def chat(self, i):
        """(ids int64 (n,), supervised bool (n,)) of chat i, with one <|image|> id per image."""
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[part].astype(np.int64), self.supervised[part]

    def n_images(self, i):
        return int(self.first_image[i + 1] - self.first_image[i]) if self.has_images else 0

    def cluster(self, i):
        """The images of chat i as keys, else i: scores of chats that share one are dependent."""
        numbers = range(*self.first_image[i : i + 2]) if self.n_images(i) else ()
        return tuple(hash(self._bytes(n)) for n in numbers) or i

    def images(self, i, spec=None):
        """The PIL images of chat i; with an ImageSpec, decoded no finer than that needs."""
        size = spec[1:] if spec else ()
        numbers = range(*self.first_image[i : i + 2]) if self.has_images else ()
        try:
            return [read_image(self._bytes(n), f"image {n}", *size) for n in numbers]
        except ImageError as error:
            raise UserError(f"{self.folder} is damaged; prepare it again: {error}") from None

    def _bytes(self, n):
        """The encoded image n. Read, not mapped: mapped pages count as memory."""
        start, end = self.image_offsets[n : n + 2].tolist()
        shard = int(np.searchsorted(self.shard_starts, start, side="right")) - 1
        file = self.shards[shard].fileno()
        return os.pread(file, end - start, start - int(self.shard_starts[shard]))


class Documents:
    """Windows of `length` + 1 tokens of plain text as chats in which every token is supervised."""

    def __init__(self, folder, split, length, tokenizer):
        self.folder, self.manifest = Path(folder), {}
        self._text = Text(folder, split, length, tokenizer.n_vocab)

    def __len__(self):
        return len(self._text)

    def chat(self, i):
        ids = self._text.window(i).astype(np.int64)
        return ids, np.arange(len(ids)) > 0

    def images(self, i, spec=None):
        return []


class Share:
    """`count` chats of a source, drawn by a seed; some repeated if there are fewer than that."""

    def __init__(self, source, count, seed):
        self.folder, self.manifest, self._source = source.folder, source.manifest, source
        generator, n = np.random.default_rng(seed), len(source)
        rounds = -(-count // n) if n else 0
        order = [generator.permutation(n) for _ in range(rounds)]
        self._chosen = np.concatenate([np.empty(0, int), *order])[:count]

    def __len__(self):
        return len(self._chosen)

    def chat(self, i):
        return self._source.chat(self._chosen[i])

    def images(self, i, spec=None):
        return self._source.images(self._chosen[i], spec)
