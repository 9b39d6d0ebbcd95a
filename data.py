"""Data sets and the loader: token shards, packed chats, chats about pictures, captioned pictures.

Which rows a step reads is a pure function of (seed, step), the same for any number of processes, so
going on at any step needs no state. A data set has a length and `batch(rows)`; the one Loader asks
for this process's share of each step and prepares the next batch while the model computes.

On disk (made by prepare.py, every folder with a manifest.json of counts and sha256 sums):

    text/      *train*.npy, *val*.npy      1-D uint16 token shards, documents behind <|endoftext|>
    chats/     {train,val}/                ids.npy, supervised.npy, offsets.npy: chats end to end,
                                           and for pictures images.bin, image_offsets.npy,
                                           first_image.npy; one <|image|> id stands for a picture
"""

import bisect
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

import tokenizer as tokenizers
from common.config import UserError, read_json
from vision import read_image, to_pixels


@dataclass
class Batch:
    """One micro-batch on the device. Shapes as in GPT.forward and VisionLanguageModel.embed."""

    ids: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T), or (N,) for the positions `where`
    where: torch.Tensor | None = None  # (N,) flat positions that are supervised
    positions: torch.Tensor | None = None  # (B, T), from 0 in every chat
    segments: torch.Tensor | None = None  # (B, T), number of the chat in its row
    pixels: torch.Tensor | None = None  # (M, S, S, 3) uint8
    image_positions: torch.Tensor | None = None  # (M * P,)
    n_targets: int = 0  # supervised positions of the whole step, in all processes

    def to(self, device):
        """Itself, its tensors moved to the device (from pinned memory, so without a wait)."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor) and device.type == "cuda":
                setattr(self, field.name, value.pin_memory().to(device, non_blocking=True))
            elif isinstance(value, torch.Tensor):
                setattr(self, field.name, value.to(device))
        return self


class Loader:
    """Batches of a step, for this process. rows: how many the whole job reads a step."""

    def __init__(self, dataset, rows, micro_rows, run, seed):
        if len(dataset) == 0:
            raise UserError(f"the data set {dataset.name} is empty")
        self.dataset, self.rows, self.run, self.seed = dataset, rows, run, seed
        self.accumulate, self.micro_rows = run.split(rows, micro_rows)
        self.worker = ThreadPoolExecutor(1)
        self.ahead = {}  # (step, micro) -> the future of its batch
        self.orders = {}  # epoch -> its order of rows

    def step(self, step):
        """Yield this process's micro-batches of `step`."""
        for micro in range(self.accumulate):
            future = self._submit(step, micro)
            last = micro + 1 == self.accumulate
            self._submit(*((step + 1, 0) if last else (step, micro + 1)))
            del self.ahead[step, micro]
            yield future.result()

    def _submit(self, step, micro):
        if (step, micro) not in self.ahead:
            self.ahead[step, micro] = self.worker.submit(self._make, step, micro)
        return self.ahead[step, micro]

    def _make(self, step, micro):
        everyone = self.rows_of(step)
        share = everyone.reshape(self.accumulate, self.run.ranks, self.micro_rows)
        batch = self.dataset.batch(share[micro, self.run.machine.rank].tolist())
        batch.n_targets = self.dataset.n_targets(everyone)
        return batch.to(self.run.device)

    def rows_of(self, step):
        """The rows (numpy) that the whole job reads in `step`; every epoch has its own order."""
        n = len(self.dataset)
        numbers = np.arange(step * self.rows, (step + 1) * self.rows)
        found = np.empty_like(numbers)
        for epoch in np.unique(numbers // n):
            if epoch not in self.orders:
                self.orders = {e: o for e, o in self.orders.items() if e >= epoch - 1}
                generator = np.random.default_rng((self.seed, int(epoch)))
                self.orders[epoch] = generator.permutation(n)
            mine = numbers // n == epoch
            found[mine] = self.orders[epoch][numbers[mine] % n]
        return found


def validation_loss(run, dataset, micro_rows, loss_of, max_rows=512):
    """Mean loss in nats over the first rows of `dataset`, the same ones every time.

    loss_of(batch) gives the loss summed over the batch's supervised positions.
    """
    n = min(len(dataset), max_rows)
    total = torch.zeros(2, dtype=torch.float64)
    starts = range(run.machine.rank * micro_rows, n, run.ranks * micro_rows)
    for start in starts:
        batch = dataset.batch(list(range(start, min(start + micro_rows, n)))).to(run.device)
        with torch.no_grad(), run.machine.autocast():
            total[0] += loss_of(batch).item()
        total[1] += batch.targets.numel()
    total = run.machine.sum(total.to(run.device) if run.device.type == "cuda" else total)
    return (total[0] / total[1]).item()


# ------------------------------------------------------------------------------------------- text


class Text:
    """Windows of T + 1 tokens over all shards of a split; consecutive windows share one token."""

    def __init__(self, folder, split, T, n_vocab):
        self.name, self.T = f"{folder} ({split})", T
        paths = sorted(Path(folder).glob(f"*{split}*.npy"))
        if not paths:
            raise UserError(f"no *{split}*.npy in {folder}; prepare.py text makes such a folder")
        self.shards = [read_array(path, np.uint16) for path in paths]
        self.first = np.cumsum([0, *((len(shard) - 1) // T for shard in self.shards)])
        self.n_vocab = n_vocab
        if len(self) == 0:
            raise UserError(f"the data set {self.name} is empty: no shard has {T + 1} tokens")

    def __len__(self):
        return int(self.first[-1])

    def n_targets(self, rows):
        return len(rows) * self.T

    def window(self, i):
        shard = int(np.searchsorted(self.first, i, side="right")) - 1
        start = (i - int(self.first[shard])) * self.T
        return self.shards[shard][start : start + self.T + 1]

    def batch(self, rows):
        tokens = np.stack([self.window(i) for i in rows]).astype(np.int64)
        if tokens.max() >= self.n_vocab:
            raise UserError(f"{self.name} holds the id {tokens.max()}, but the vocabulary ends at "
                            f"{self.n_vocab - 1}: it was made with another tokenizer")
        tokens = torch.from_numpy(tokens)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def read_array(path, dtype):
    """The 1-D array in `path`, memory-mapped, or a UserError that names the file."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is not a whole .npy file: {error}") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} is an archive, not a .npy file")
    if array.ndim != 1 or array.dtype != dtype:
        raise UserError(f"{path} holds {array.ndim}-D {array.dtype}, "
                        f"expected 1-D {np.dtype(dtype)}")
    return array


def check_tokenizer(folder, tokenizer=None):
    """The tokenizer that the data in `folder` was made with; UserError if it is not `tokenizer`.

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
    info = read_json(manifest)
    if "tokenizer" not in info:
        raise UserError(f"{folder} is no data set; name one of the folders in it")
    if tokenizer is None:
        return tokenizers.load("gpt2" if info["tokenizer_name"] == "gpt2" else folder)
    if info["tokenizer"] != tokenizer.fingerprint:
        raise UserError(f"the data in {folder} was made with another tokenizer than the model's; "
                        "prepare it again with --tokenizer pointing at the model's")
    return tokenizer


# ------------------------------------------------------------------------------------------ chats


class Chats:
    """Chats of one split as ids, with their pictures; prepare.py writes it, see the top."""

    def __init__(self, folder, split):
        self.folder = Path(folder) / split
        self.ids = read_array(self.folder / "ids.npy", np.uint16)
        self.supervised = read_array(self.folder / "supervised.npy", np.bool_)
        self.offsets = read_array(self.folder / "offsets.npy", np.int64)
        self.has_images = (self.folder / "images.bin").is_file()
        if self.has_images:
            self.first_image = read_array(self.folder / "first_image.npy", np.int64)
            self.image_offsets = read_array(self.folder / "image_offsets.npy", np.int64)
            self.bytes = np.memmap(self.folder / "images.bin", np.uint8, "r")

    def __len__(self):
        return len(self.offsets) - 1

    def chat(self, i):
        """(ids, supervised) of chat i, one <|image|> id a picture."""
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[part].astype(np.int64), self.supervised[part]

    def n_images(self, i):
        return int(self.first_image[i + 1] - self.first_image[i]) if self.has_images else 0

    def images(self, i):
        """The pictures of chat i, as PIL images."""
        if not self.has_images:
            return []
        numbers = range(self.first_image[i], self.first_image[i + 1])
        return [read_image(self.bytes[self.image_offsets[n] : self.image_offsets[n + 1]].tobytes(),
                           f"picture {n} of {self.folder}") for n in numbers]


class Share:
    """`count` chats of a Chats, drawn by a seed, some more than once if there are too few."""

    def __init__(self, chats, count, seed):
        self.folder, self._chats = chats.folder, chats
        generator = np.random.default_rng(seed)
        rounds = -(-count // max(1, len(chats))) if len(chats) else 0
        order = [generator.permutation(len(chats)) for _ in range(rounds)]
        self._chosen = np.concatenate(order)[:count] if order else np.empty(0, int)

    def __len__(self):
        return len(self._chosen)

    def chat(self, i):
        return self._chats.chat(self._chosen[i])

    def images(self, i):
        return self._chats.images(self._chosen[i])


class Packed:
    """Rows of T positions, filled with whole chats of one or more Chats.

    A chat longer than T is cut behind its last turn that fits; one whose first answer does not fit,
    or that has nothing to learn, is left out, and `left_out` counts them.
    """

    def __init__(self, sources, T, tokenizer, n_patches=0, image_size=0, seed=0):
        self.name = " + ".join(str(chats.folder) for chats in sources)
        self.T, self.tokenizer = T, tokenizer
        self.n_patches, self.image_size = n_patches, image_size
        self.sources = sources
        self.left_out = 0
        self.chats = []  # (source, chat, how many ids of it, positions, supervised positions)
        for s, chats in enumerate(sources):
            for i in range(len(chats)):
                entry = self._measure(s, chats, i)
                if entry is None:
                    self.left_out += 1
                else:
                    self.chats.append(entry)
        self.rows = pack([chat[3] for chat in self.chats], T, seed)
        self.targets = np.array([sum(self.chats[c][4] for c in row) for row in self.rows])
        used = sum(chat[3] for chat in self.chats)
        self.filled = used / max(1, len(self.rows) * T)

    def __len__(self):
        return len(self.rows)

    def n_targets(self, rows):
        return int(self.targets[rows].sum())

    def summary(self):
        """One line for the log: how many chats in how many rows, how full, how many left out."""
        left = f"; {self.left_out} chats too long or with nothing to learn left out"
        return (f"{self.name}: {len(self.chats)} chats in {len(self)} rows of {self.T}, "
                f"{self.filled:.1%} filled{left if self.left_out else ''}")

    def _measure(self, s, chats, i):
        """Where chat i must be cut to fit: the last end of an answer in its first T positions."""
        ids, supervised = chats.chat(i)
        widths = np.where(ids == self.tokenizer.image, self.n_patches, 1)
        ends = np.flatnonzero(supervised & (ids == self.tokenizer.end)) + 1  # ids kept, if cut here
        positions = np.cumsum(widths)[ends - 1] - 1 if len(ends) else ends  # the last is no input
        fitting = np.flatnonzero(positions <= self.T)
        if not len(fitting):
            return None
        n = int(ends[fitting[-1]])
        return s, i, n, int(positions[fitting[-1]]), int(supervised[1:n].sum())

    def batch(self, rows):
        B, T, P = len(rows), self.T, self.n_patches
        ids = torch.full((B, T), self.tokenizer.end_of_text)
        positions, segments = torch.zeros(B, T, dtype=torch.long), torch.zeros(B, T).int()
        where, targets, images, image_positions = [], [], [], []
        for b, row in enumerate(rows):
            start = 0
            for number, c in enumerate(self.rows[row], 1):
                s, i, n, length, _ = self.chats[c]
                chat, supervised = (part[:n] for part in self.sources[s].chat(i))
                repeats = np.where(chat == self.tokenizer.image, P, 1)
                chat, supervised = np.repeat(chat, repeats), np.repeat(supervised, repeats)
                part = slice(start, start + length)
                ids[b, part] = torch.from_numpy(chat[:-1])
                positions[b, part], segments[b, part] = torch.arange(length), number
                learnt = np.flatnonzero(supervised[1:])
                where.append(learnt + b * T + start)
                targets.append(chat[learnt + 1])
                slots = np.flatnonzero(chat == self.tokenizer.image)
                if len(slots):
                    images += self.sources[s].images(i)[: len(slots) // P]
                    image_positions.append(slots + b * T + start)
                start += length
        batch = Batch(ids, torch.from_numpy(np.concatenate(targets)),
                      torch.from_numpy(np.concatenate(where)), positions, segments)
        if images:
            batch.pixels = to_pixels(images, self.image_size)
            batch.image_positions = torch.from_numpy(np.concatenate(image_positions))
        return batch


def pack(lengths, T, seed, window=4096):
    """Lists of numbers into `lengths`, each list at most T long in sum: best fit, longest first,
    among a few thousand at a time, in a seeded order (so rows mix what the data set does not)."""
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    rows = []
    for begin in range(0, len(order), window):
        room = []  # sorted (free positions, row)
        for c in sorted(order[begin : begin + window], key=lambda c: -lengths[c]):
            spot = bisect.bisect_left(room, (lengths[c], -1))
            if spot == len(room):
                rows.append([])
                free, row = T, len(rows) - 1
            else:
                free, row = room.pop(spot)
            rows[row].append(c)
            bisect.insort(room, (free - lengths[c], row))
    return rows


# --------------------------------------------------------------------------------------- captions


@dataclass
class Pairs:
    """Pictures with their captions, for CLIP."""

    pixels: torch.Tensor  # (B, S, S, 3) uint8
    ids: torch.Tensor  # (B, context), ended and padded with the end id
    keys: torch.Tensor  # (B,) equal for identical captions
    n_targets: int = 0

    to = Batch.to


class Captions:
    """Pictures of Chats with the first answer about each as its caption."""

    def __init__(self, chats, tokenizer, image_size, context):
        if not chats.has_images:
            raise UserError(f"{chats.folder} holds no pictures, so it cannot train CLIP")
        self.name, self.chats, self.tokenizer = str(chats.folder), chats, tokenizer
        self.image_size, self.context = image_size, context
        self.chosen = [i for i in range(len(chats)) if chats.n_images(i) == 1]

    def __len__(self):
        return len(self.chosen)

    def n_targets(self, rows):
        return len(rows)

    def caption(self, i):
        """The ids of caption i: <|endoftext|>, the text, <|end|>, cut to the context."""
        ids, supervised = self.chats.chat(self.chosen[i])
        start = int(supervised.argmax())
        text = ids[start:][: int((ids[start:] == self.tokenizer.end).argmax())]
        text = text[: self.context - 2].tolist()
        return [self.tokenizer.end_of_text, *text, self.tokenizer.end]

    def batch(self, rows):
        captions = [self.caption(i) for i in rows]
        images = [self.chats.images(self.chosen[i])[0] for i in rows]
        longest = min(self.context, -(-max(map(len, captions)) // 8) * 8)  # few different shapes
        padded = [ids + [self.tokenizer.end] * (longest - len(ids)) for ids in captions]
        keys = [hash(tuple(ids)) for ids in captions]  # of ints: the same in every process
        return Pairs(to_pixels(images, self.image_size), torch.tensor(padded), torch.tensor(keys))
