"""What a batch, a document and a chat are, and how they lie on disk.

    text/     *train*.npy, *val*.npy      1-D uint16 token shards, documents behind <|endoftext|>

    chats/    {train,val}/ ids.npy, supervised.npy, offsets.npy    chats end to end
              images_*.bin, image_offsets.npy, first_image.npy     where there are pictures: their
              encoded bytes end to end, or their names where they stayed elsewhere; one <|image|> id
              stands for a picture

Beside the splits of chats lies a manifest.json of counts and sha256 sums. prepare.py makes all of
it; train/packing.py packs chats into rows, train/loader.py hands them out.
"""

import os
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

import tokenizer as tokenizers
from common import archives, hub
from common.checksums import check_together
from common.config import UserError, one_line, read_json, read_sealed
from common.images import read_image


@dataclass
class Batch:
    """One micro-batch on the device. Shapes as in GPT.forward and VisionLanguageModel.embed."""

    ids: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T), or (N,) for the positions `where`
    where: torch.Tensor | None = None  # (N,) flat positions that are supervised
    positions: torch.Tensor | None = None  # (B, T), from 0 in every chat
    segments: torch.Tensor | None = None  # (B, T), number of the chat in its row
    bounds: torch.Tensor | None = None  # (N + 1,) int32, where chats and padding begin in B * T
    longest: int = 0  # positions of the longest of those
    pixels: torch.Tensor | None = None  # (M, S, S, 3) uint8
    image_positions: torch.Tensor | None = None  # (M * P,)
    n_targets: int = 0  # supervised positions of the whole step, in all processes
    lost: list = field(default_factory=list)  # why chats were left out: pictures that are gone

    def inputs(self):
        """What GPT.forward takes, in its order."""
        return (self.ids, self.targets, self.where, self.positions, self.segments, self.bounds,
                self.longest)

    def to(self, device):
        """Itself, its tensors moved to the device (from pinned memory, so without a wait)."""
        if device.type == "cuda":
            self.pin_memory()
        return self._each(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def pin_memory(self):
        """Itself, its tensors in memory that a GPU can read by itself."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change):
        for name in (part.name for part in fields(self)):
            value = getattr(self, name)
            if isinstance(value, torch.Tensor):
                setattr(self, name, change(value))
        return self


# ------------------------------------------------------------------------------------------- text


class Text:
    """Windows of T + 1 tokens over all shards of a split; consecutive windows share one token.

    folder: a folder of shards, or of shards still to come (hub.stream makes it). Those are shuffled
    in groups that double, 1, 1, 2, 4 ... shards, so that training can begin with the first.
    """

    def __init__(self, folder, split, T, n_vocab):
        self.name, self.T, self.n_vocab = f"{folder} ({split})", T, n_vocab
        coming = hub.expected(folder, f"*{split}*.npy")
        self.paths = list(coming) or sorted(Path(folder).glob(f"*{split}*.npy"))
        if not self.paths:
            raise UserError(f"no *{split}*.npy in {folder}; prepare.py text makes such a folder")
        lengths = list(coming.values()) or [self._checked(path) for path in self.paths]
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
        window = opened[number][start : start + self.T + 1]
        if len(window) <= self.T:
            raise UserError(f"{self.paths[number]} is shorter than it was; fetch it again")
        return window

    def batch(self, rows):
        # Shards are mapped for one batch at a time: pages that were read belong to the process as
        # long as the mapping, and 10 B tokens would become 20 GB.
        opened = {}
        tokens = np.stack([self.window(i, opened) for i in rows]).astype(np.int64)
        self._check_ids(tokens, self.name)
        tokens = torch.from_numpy(tokens)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def _checked(self, path):
        """The length of a shard, after a look at 16 places of it."""
        shard = read_array(path, np.uint16)
        for start in range(0, len(shard), len(shard) // 16 + 1):
            self._check_ids(shard[start : start + 4096], path)
        return len(shard)

    def _check_ids(self, tokens, where):
        if tokens.size and tokens.max() >= self.n_vocab:
            raise UserError(f"{where} holds the id {tokens.max()}, but the vocabulary ends at "
                            f"{self.n_vocab - 1}: it was made with another tokenizer")


def read_array(path, dtype):
    """The 1-D array in `path`, memory-mapped, or a UserError that names the file."""
    if not Path(path).exists() and hub.is_coming(path):
        raise hub.NotYet(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy parses the header, and raises whatever it stumbles over
        raise UserError(f"{path} is not a whole .npy file: {one_line(error)}") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} is an archive, not a .npy file")
    if array.ndim != 1 or array.dtype != dtype:
        raise UserError(f"{path} holds {array.ndim}-D {array.dtype}, "
                        f"expected 1-D {np.dtype(dtype)}")
    return array


def check_tokenizer(folder, tokenizer=None):
    """The tokenizer that the data in `folder` was made with; UserError if it is not `tokenizer`,
    or if a file of the folder is not what it was when it was made.

    A folder without a manifest (the public token shards) is taken to be GPT-2's.
    """
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
        raise UserError(f"{folder} is no data set; name one of the folders in it")
    coming = {path.name for path in hub.expected(folder, "*")}  # hub.py checks those on arrival
    check_together(folder, info.get("sha256", {}), coming)
    if tokenizer is None:
        return tokenizers.load("gpt2" if info["tokenizer_name"] == "gpt2" else folder)
    if info["tokenizer"] != tokenizer.fingerprint:
        raise UserError(f"the data in {folder} was made with another tokenizer than the model's; "
                        "prepare it again with --tokenizer pointing at the model's")
    return tokenizer


# ------------------------------------------------------------------------------------------ chats


class Chats:
    """Chats of one split as ids, with their pictures; prepare.py writes it, see the top.

    manifest: what prepare.py says of the data set; empty for one made by hand.
    """

    def __init__(self, folder, split):
        self.root, self.split, self.folder = Path(folder), split, Path(folder) / split
        self.ids = read_array(self.folder / "ids.npy", np.uint16)
        self.supervised = read_array(self.folder / "supervised.npy", np.bool_)
        self.offsets = read_array(self.folder / "offsets.npy", np.int64)
        self.manifest = manifest_of(self.root / "manifest.json")
        shards = sorted(self.folder.glob("images_*.bin"))
        self.has_images = bool(shards)
        if not shards and (self.folder / "first_image.npy").exists():
            raise UserError(f"the pictures images_*.bin of {self.folder} are not there: an older "
                            "prepare.py made it, or they were lost; prepare it again")
        if self.has_images:
            self.first_image = read_array(self.folder / "first_image.npy", np.int64)
            self.image_offsets = read_array(self.folder / "image_offsets.npy", np.int64)
            self.shards = [open(path, "rb", buffering=0) for path in shards]  # noqa: SIM115
            self.shard_starts = np.cumsum([0, *(path.stat().st_size for path in shards)])
            if self.shard_starts[-1] != self.image_offsets[-1]:
                raise UserError(f"the pictures in {self.folder} are {self.shard_starts[-1]} bytes, "
                                f"and {self.image_offsets[-1]} were written; prepare them again")
            self.find = None if self.stored.get("copied", True) else self._find_in(
                self.stored["root"])

    def __reduce__(self):  # other processes open the files again
        return Chats, (self.root, self.split)

    @property
    def stored(self):
        """How the pictures are stored: size, fit, copied, root; empty where nobody says."""
        return self.manifest.get("stored_images", {})

    def _find_in(self, root):
        try:
            return archives.open_images(root)
        except UserError as error:
            raise UserError(f"the pictures of {self.root} are not where they were ({error}); put "
                            "them back or prepare it again") from None

    def __len__(self):
        return len(self.offsets) - 1

    def chat(self, i):
        """(ids, supervised) of chat i, one <|image|> id a picture."""
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[part].astype(np.int64), self.supervised[part]

    def n_images(self, i):
        return int(self.first_image[i + 1] - self.first_image[i]) if self.has_images else 0

    def images(self, i, size=0, how="pad"):
        """The pictures of chat i, as PIL images; size and how as in pictures.read_image."""
        numbers = range(*self.first_image[i : i + 2]) if self.has_images else ()
        found = []
        for n in numbers:
            source, name = self._bytes(n), f"picture {n} of {self.folder}"
            if self.find is not None:
                name = source.decode()
                source = self.find(name)
            found.append(read_image(source, name, size, how))
        return found

    def _bytes(self, n):
        """What is stored of picture n, read rather than mapped: pages of a map would count."""
        start, end = self.image_offsets[n : n + 2].tolist()
        shard = int(np.searchsorted(self.shard_starts, start, side="right")) - 1
        file = self.shards[shard].fileno()
        return os.pread(file, end - start, start - int(self.shard_starts[shard]))


def manifest_of(path):
    """What a data set's manifest.json says; {} if there is none, a UserError if it makes no sense.
    """
    manifest = read_json(path) if path.is_file() else {}
    stored = manifest.get("stored_images", {}) if isinstance(manifest, dict) else None
    kinds = {"size": int, "fit": str, "copied": bool, "root": str}
    if not isinstance(stored, dict) or any(
            name in stored and not isinstance(stored[name], kind) for name, kind in kinds.items()):
        raise UserError(f"{path} is not of the form that prepare.py writes it in: "
                        "stored_images should be like {\"size\": 224, \"fit\": \"pad\", "
                        "\"copied\": true}; correct it")
    if not stored.get("copied", True) and "root" not in stored:
        raise UserError(f"{path} says that the pictures were not copied, but not where they are; "
                        "add their folder as stored_images.root")
    return manifest


class Documents:
    """Windows of plain text in the place of chats, all of it to be learnt. length: positions."""

    has_images, manifest = False, {}

    def __init__(self, folder, split, length, tokenizer):
        self.folder, self._text = Path(folder), Text(folder, split, length, tokenizer.n_vocab)

    def __len__(self):
        return len(self._text)

    def chat(self, i):
        ids = self._text.window(i).astype(np.int64)
        return ids, np.arange(len(ids)) > 0

    def images(self, i, size=0, how="pad"):
        return []


class Share:
    """`count` chats of a Chats, drawn by a seed, some more than once if there are too few."""

    def __init__(self, chats, count, seed):
        self.folder, self.manifest, self._chats = chats.folder, chats.manifest, chats
        generator = np.random.default_rng(seed)
        rounds = -(-count // max(1, len(chats))) if len(chats) else 0
        order = [generator.permutation(len(chats)) for _ in range(rounds)]
        self._chosen = np.concatenate(order)[:count] if order else np.empty(0, int)

    def __len__(self):
        return len(self._chosen)

    def chat(self, i):
        return self._chats.chat(self._chosen[i])

    def images(self, i, size=0, how="pad"):
        return self._chats.images(self._chosen[i], size, how)
