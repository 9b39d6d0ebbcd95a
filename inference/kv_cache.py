"""Keys and values of earlier positions, so that decoding computes only the new ones.

Shapes: B batch, T new positions, H heads, D head size, S slots of the cache.
"""

import copy
from typing import NamedTuple

import torch

from model import compute_dtype

ALIGN = 64  # memory for a multiple of slots: a GPU's kernels copy a mask of another width


class Slots(NamedTuple):
    """One layer's part of a cache: the slots to attend to, and where T new positions are stored."""

    keys: torch.Tensor  # (B, H, S, D)
    values: torch.Tensor
    new_keys: torch.Tensor | None  # (B, H, T, D) views of the same memory, or None:
    new_values: torch.Tensor | None
    positions: torch.Tensor | None  # (B, T), where rows differ in length
    fresh: bool  # the cache was empty

    def store(self, k, v):
        """Store k and v (B, H, T, D); returns keys and values (B, H, S, D) to attend to."""
        if self.positions is None:
            self.new_keys.copy_(k)
            self.new_values.copy_(v)
            return (k, v) if self.fresh else (self.keys, self.values)
        index = self.positions[:, None, :, None].expand_as(k)
        self.keys.scatter_(2, index, k.to(self.keys.dtype))
        self.values.scatter_(2, index, v.to(self.values.dtype))
        return self.keys, self.values


class KVCache:
    """Keys and values of B sequences, one row each, allocated once. lengths[b] is the number of
    slots that row b has used; lowering it drops the later positions."""

    def __init__(self, model, batch=1, slots=None):
        c, weight = model.config, model.token_embedding.weight
        self.slots = slots or c.max_positions
        size = -(-self.slots // ALIGN) * ALIGN
        shape = (c.n_layer, batch, c.n_head, size, c.n_embd // c.n_head)
        # A CPU takes 5 to 9 times as long for one query over bf16 keys as over fp32 ones.
        dtype = torch.float32 if weight.device.type == "cpu" else compute_dtype(weight)
        # Zeros, not empty: masked values are still multiplied by 0, and 0 * NaN is NaN.
        self.keys = torch.zeros(shape, device=weight.device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.lengths = [0] * batch

    def rows(self, first, last):
        """The rows first to last - 1 as a KVCache over the same memory, with a copy of lengths."""
        part = copy.copy(self)
        part.keys, part.values = self.keys[:, first:last], self.values[:, first:last]
        part.lengths = self.lengths[first:last]
        return part

    def extend(self, T):
        """Reserve T more positions in every row, for GPT.hidden: (positions, mask, list of Slots by
        layer)."""
        before, end = self.lengths, max(self.lengths) + T
        if end > self.slots:
            raise ValueError(f"{end} positions do not fit a cache of {self.slots}")
        self.lengths = [n + T for n in before]
        steps = torch.arange(T, device=self.keys.device)
        if min(before) < max(before):
            starts = torch.tensor(before, device=self.keys.device)
            return self.place(starts[:, None] + steps, end)
        begin, mask = before[0], None
        if T > 1 and begin > 0:
            mask = self.mask(begin + steps[None], end)
        new = (x[:, :, :, begin:end].unbind() for x in (self.keys, self.values))
        return slice(begin, end), mask, [
            Slots(*layer, None, begin == 0) for layer in zip(*self.first(end), *new, strict=True)]

    def place(self, positions, end):
        """As extend, for positions (B, T) on the device, attending to the first `end` slots."""
        layers = zip(*self.first(end), strict=True)
        return positions, self.mask(positions, end), [
            Slots(*layer, None, None, positions, False) for layer in layers]

    def mask(self, positions, end):
        """Additive causal mask (B, 1, T, end) for queries at `positions` (B, T); every layer
        would convert a boolean one."""
        later = torch.arange(end, device=positions.device) > positions[:, None, :, None]
        return self.keys.new_zeros(later.shape).masked_fill_(later, float("-inf"))

    def first(self, end):
        """The first `end` slots of keys and values, layer by layer (B, H, end, D)."""
        return self.keys[:, :, :, :end].unbind(), self.values[:, :, :, :end].unbind()
