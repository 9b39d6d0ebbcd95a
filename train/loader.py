"""The loader: which rows each step reads; it prepares this process's micro-batches in advance.

The rows of a step are a pure function of (seed, step), the same for any number of processes, so
resuming at any step needs no state. A data set (data.Text, packing.Packed, packing.Captions) has a
name, a length, `batch(rows)` and `n_targets(rows)`.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy as np
import torch
from torch.utils.data import DataLoader

from common import hub
from common.config import UserError


class Loader:
    """Micro-batches (data.Batch) of every step for one process of a Machine.

    rows: of a step, in all processes together. micro_rows: the most rows of a micro-batch.
    workers: processes that prepare batches (images have to be decoded); 0 for one thread.
    waiting(step, reason): called while the data of a step is missing; reason "": it never comes.
    """

    def __init__(self, dataset, rows, micro_rows, machine, seed, workers=0, waiting=None):
        if rows % machine.ranks:
            raise UserError(f"a batch of {rows} rows does not divide by {machine.ranks} processes")
        self.dataset, self.rows, self.machine, self.seed = dataset, rows, machine, seed
        mine = rows // machine.ranks
        self.accumulate = next(n for n in range(-(-mine // micro_rows), mine + 1) if mine % n == 0)
        self.micro_rows = mine // self.accumulate
        self.workers, self.waiting = workers, waiting or (lambda step, reason: None)
        self.thread, self.ahead = ThreadPoolExecutor(1), {}  # micro-batch -> its future
        self.stream, self.position = None, None  # the workers' micro-batches, number of the next

    def step(self, step):
        """Yield this process's micro-batches of `step`."""
        n_targets = self.dataset.n_targets(self.rows_of(step))
        fetch = self._from_workers if self.workers else self._from_thread
        for micro in range(self.accumulate):
            batch = fetch(step * self.accumulate + micro)
            batch.n_targets, batch.is_last = n_targets, micro == self.accumulate - 1
            yield batch

    def close(self):
        """End the worker processes."""
        self.stream, self.position = None, None

    def _from_thread(self, number):
        """Micro-batch `number`, counted from the start of the run; begins the next one."""
        def make(n):
            return self.dataset.batch(self._rows(n)).to(self.machine.device)

        while True:
            for n in (number, number + 1):
                if n not in self.ahead:
                    self.ahead[n] = self.thread.submit(make, n)
            try:
                return self.ahead.pop(number).result()
            except hub.NotYet as missing:
                self.waiting(number // self.accumulate, f"waiting for {missing}")
                time.sleep(0.2)

    def _from_workers(self, number):
        """As _from_thread, from PyTorch's worker processes. They leave the process group that
        Ctrl-C interrupts, as the training process needs batches until it has saved."""
        if number != self.position:
            self.stream = iter(DataLoader(
                range(len(self.dataset)), batch_sampler=map(self._rows, count(number)),
                collate_fn=self.dataset.batch, num_workers=self.workers,
                pin_memory=self.machine.device.type == "cuda",
                generator=torch.Generator(), worker_init_fn=leave_group))
        self.position = number + 1
        try:
            return next(self.stream).to(self.machine.device)
        except UserError as error:  # PyTorch puts the worker's traceback before the message
            raise UserError(str(error).strip().rpartition("UserError: ")[2]) from None
        except RuntimeError as error:  # PyTorch's, when a worker was killed
            self.waiting(number // self.accumulate, "")
            raise UserError(f"a process that decodes images ended: {error} Try --workers=0, or in "
                            "a container more shared memory (--shm-size=2g)") from None

    def _rows(self, number):
        """The rows (list of int) of this process's micro-batch `number`."""
        step, micro = divmod(number, self.accumulate)
        share = self.rows_of(step).reshape(self.accumulate, self.machine.ranks, self.micro_rows)
        return share[micro, self.machine.rank].tolist()

    def describe(self, step):
        """Which rows a step reads, for a message."""
        rows = sorted(self.rows_of(step).tolist())
        more = f" and {len(rows) - 8} more" if rows[8:] else ""
        return f"rows {', '.join(map(str, rows[:8]))}{more} of {self.dataset.name}"

    def rows_of(self, step):
        """The rows (numpy) that all processes read in `step`; every epoch has its own order, in
        which the `groups` of a data set (row numbers from 0 to its length) follow each other."""
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


def leave_group(_worker):
    os.setsid()


def shuffled(places, n, seed):
    """The numbers at `places` (integers) of a shuffled range(n), without storing it.

    A Feistel network, as in ciphers, permutes all numbers of 2 * half bits, at least n; a result
    beyond n is permuted again until it is below (Black and Rogaway, 2002).
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


def validation_loss(machine, dataset, micro_rows, model, max_rows=512):
    """Mean loss in nats over the first rows of `dataset`, of which model(batch) gives the sum."""
    n = min(len(dataset), max_rows)
    total = torch.zeros(2, dtype=torch.float64)
    for start in range(machine.rank * micro_rows, n, machine.ranks * micro_rows):
        batch = dataset.batch(range(start, min(start + micro_rows, n))).to(machine.device)
        with torch.no_grad(), machine.autocast():
            loss = model(batch)
        total += torch.tensor([loss.item(), batch.targets.numel()])
    total = machine.sum(total.to(machine.device) if machine.device.type == "cuda" else total)
    if total[1] == 0:
        raise UserError(f"{dataset.name} has nothing to validate on")
    return (total[0] / total[1]).item()
