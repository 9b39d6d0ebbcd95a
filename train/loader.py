"""The loader that feeds every stage.

Which rows a step reads is a pure function of (seed, step), the same for any number of processes, so
going on at any step needs no state. A data set has a length and `batch(rows)`; the one Loader asks
for this process's share of each step and has the next batch ready before it is wanted: made by a
thread, or by worker processes where pictures have to be decoded for a GPU.
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
