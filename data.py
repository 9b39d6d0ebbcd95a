"""Token shards, and the loader that feeds every stage.

Which rows a step reads is a pure function of (seed, step), the same for any number of processes, so
going on at any step needs no state. A data set has a length and `batch(rows)`; the one Loader asks
for this process's share of each step and has the next batch ready before it is wanted: made by a
thread, or by worker processes where pictures have to be decoded for a GPU.

    text/     *train*.npy, *val*.npy      1-D uint16 token shards, documents behind <|endoftext|>

packing.py reads chats, with and without pictures.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

import tokenizer as tokenizers
from common import hub
from common.config import UserError, one_line, read_sealed
from common.intact import check_together


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


class Loader:
    """Batches of a step, for this process. rows: how many the whole job reads a step.

    workers: processes that make batches; with 0 a thread does.
    """

    def __init__(self, dataset, rows, micro_rows, run, seed, workers=0):
        if len(dataset) == 0:
            raise UserError(f"the data set {dataset.name} is empty")
        self.dataset, self.rows, self.run, self.seed = dataset, rows, run, seed
        self.accumulate, self.micro_rows = run.split(rows, micro_rows)
        run.loader = self
        self.workers, self.worker = workers, ThreadPoolExecutor(1)
        self.ahead = {}  # (step, micro) -> the future of its batch
        self.stream, self.stream_at = None, None  # of the workers: batches, the next one's number

    def step(self, step):
        """Yield this process's micro-batches of `step`."""
        for micro in range(self.accumulate):
            if self.workers:
                batch = self._from_workers(step * self.accumulate + micro)
            else:
                self._submit(step, micro)
                last = micro + 1 == self.accumulate
                self._submit(*((step + 1, 0) if last else (step, micro + 1)))
                batch = self._wait(step, micro)
            if getattr(batch, "lost", None):
                self.run.lost(batch.lost)
            yield batch

    def close(self):
        """End the workers: no more batches are wanted."""
        self.stream, self.stream_at = None, None

    def _from_workers(self, number):
        """The micro-batch of that number, counted from the beginning of the run.

        Workers leave the group of processes that a Ctrl-C or a batch system's wish to stop goes to:
        the process that they serve still needs batches until it has saved.
        """
        if number != self.stream_at:
            rows = (self._rows(*divmod(n, self.accumulate)) for n in count(number))
            self.stream = iter(DataLoader(
                RowLists(self.dataset), batch_size=None, sampler=rows, num_workers=self.workers,
                pin_memory=self.run.device.type == "cuda", generator=torch.Generator(),
                worker_init_fn=leave_group))
        self.stream_at = number + 1
        try:
            batch = next(self.stream)
        except RuntimeError as error:  # of PyTorch, when a worker was killed
            if self.run.wants_to_stop():  # by what stops this process as well
                self.run.stop_early(number // self.accumulate - 1, together=False)
            raise UserError(f"a process that decodes pictures ended: {error} --workers=0 decodes "
                            "without; in a container more shared memory (--shm-size=2g) may be "
                            "what is missing") from None
        batch.n_targets = self.dataset.n_targets(self.rows_of(number // self.accumulate))
        return batch.to(self.run.device)

    def _submit(self, step, micro):
        if (step, micro) not in self.ahead:
            self.ahead[step, micro] = self.worker.submit(self._make, step, micro)

    def _wait(self, step, micro):
        """The batch, once its data have arrived; a run asked to stop meanwhile saves and ends."""
        said = False
        while True:
            try:
                return self.ahead.pop((step, micro)).result()
            except hub.NotYet as missing:
                if not said:
                    self.run.log.say(f"waiting for {missing}")
                said = True
            self.run.watch.waits()
            if self.run.wants_to_stop():
                self.run.stop_early(step - 1, together=False)
            time.sleep(0.2)
            self._submit(step, micro)

    def _make(self, step, micro):
        batch = self.dataset.batch(self._rows(step, micro))
        batch.n_targets = self.dataset.n_targets(self.rows_of(step))
        return batch.to(self.run.device)

    def _rows(self, step, micro):
        """The rows (list of int) of this process's micro-batch."""
        share = self.rows_of(step).reshape(self.accumulate, self.run.ranks, self.micro_rows)
        return share[micro, self.run.machine.rank].tolist()

    def rows_of(self, step):
        """The rows (numpy) that the whole job reads in `step`; every epoch has its own order.

        A data set with `groups`, row numbers that begin with 0 and end with its length, is shuffled
        within each group, and the groups come one after the other.
        """
        n = len(self.dataset)
        groups = getattr(self.dataset, "groups", (0, n))
        epochs, places = np.divmod(np.arange(step * self.rows, (step + 1) * self.rows), n)
        numbers = np.searchsorted(groups, places, side="right") - 1
        found = np.empty_like(places)
        for epoch, group in set(zip(epochs.tolist(), numbers.tolist(), strict=True)):
            mine = (epochs == epoch) & (numbers == group)
            first, last = groups[group], groups[group + 1]
            seed = (self.seed, epoch, group)
            found[mine] = first + shuffled(places[mine] - first, last - first, seed)
        return found


class RowLists:
    """What PyTorch's DataLoader asks of a data set: a batch for each list of rows."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, rows):
        return self.dataset.batch(rows)


def leave_group(_worker):
    os.setsid()


def shuffled(places, n, seed):
    """What stands at `places` (integers) of a shuffled range(n): a permutation in no memory.

    A Feistel network, as ciphers are made of, permutes all numbers of 2 * half bits, n at least;
    a result beyond n goes through once more until it is none (Black and Rogaway, 2002).
    """
    half = np.uint64(max(1, -(-(int(n) - 1).bit_length() // 2)))
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.default_rng(seed).integers(2**63, size=8, dtype=np.uint64)
    found = np.array(places, dtype=np.uint64)
    beyond = np.ones(len(found), bool)
    while beyond.any():
        left, right = found[beyond] >> half, found[beyond] & low
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            left, right = right, left ^ (mixed >> np.uint64(32) & low)
        found[beyond] = left << half | right
        beyond = found >= n
    return found.astype(np.int64)


def validation_loss(machine, dataset, micro_rows, loss_of, max_rows=512):
    """Mean loss in nats over the first rows of `dataset`, the same ones every time.

    loss_of(batch) gives the loss summed over the batch's supervised positions.
    """
    n = min(len(dataset), max_rows)
    if n == 0:
        raise UserError(f"{dataset.name} has nothing to validate on")
    total = torch.zeros(2, dtype=torch.float64)
    for start in range(0, n, machine.ranks * micro_rows):
        mine = start + machine.rank * micro_rows
        rows = list(range(mine, min(mine + micro_rows, n)))
        batch = dataset.batch(rows or [0]).to(machine.device)  # sharded weights need every process
        with torch.no_grad(), machine.autocast():
            loss = loss_of(batch)
        if rows:
            total += torch.tensor([loss.item(), batch.targets.numel()])
    total = machine.sum(total.to(machine.device) if machine.device.type == "cuda" else total)
    if total[1] == 0:
        raise UserError(f"{dataset.name}: nothing of it can be validated on: "
                        f"{(*batch.lost, 'it has no answers')[0]}")
    return (total[0] / total[1]).item()


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
