"""Softmax attention, and which way of computing it.

Packed rows hold several documents, and none may look into another. A mask of (T, T) says so to any
kernel, which then computes what the mask hides: at 512 positions and documents of 85, five sixths.
The bounds of the documents save that: newer GPUs have a kernel that takes them; elsewhere documents
are laid beside each other, padded to the longest, where that is less work than the mask.

Letters for shapes: B rows, H heads, T queries, S keys, D head size, N documents, L longest of them.
"""

import functools
import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common.distributed import processor

try:
    from torch.nn.attention.varlen import varlen_attn

    NEWER = "window_size" in inspect.signature(varlen_attn).parameters
except ImportError:  # a PyTorch that was built without it
    varlen_attn, NEWER = None, False
WRITTEN_OUT = 200 if processor().instructions == "AMX" else 1024  # positions; see attend
CAUSAL = {"window_size": (-1, 0)} if NEWER else {"is_causal": True}  # the name before PyTorch 2.11


def compute_dtype(x):
    """What matrix products of x come out in: autocast's type where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Apart(NamedTuple):
    """Documents laid beside each other: in place of a mask."""

    index: torch.Tensor  # (N, L) flat positions into B * T; behind a document's end any
    back: torch.Tensor  # (B * T,) where in N * L each position is


def attend(q, k, v, mask=None, causal=False):
    """Softmax attention of q (B, H, T, D) over k and v (B, H, S, D); mask (B, 1, T, S) is True
    where a query may look, or is added to the scores (only where there is no gradient), or comes
    from packed_mask; causal means T == S and no look ahead.

    In training in half precision on a CPU it is written out: PyTorch's fused kernel takes 1.2 to 5
    times as long there, forward and backward together; in fp32 it is the faster (docs/log.md).
    """
    if isinstance(mask, Apart):
        return attend_apart(q, k, v, mask)
    if mask is not None and mask.dtype == torch.int32:
        return attend_documents(q, k, v, mask)
    if (q.device.type != "cpu" or not q.requires_grad or q.dtype == torch.float32
            or q.size(-2) > WRITTEN_OUT):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    scores = (q * q.size(-1) ** -0.5) @ k.mT
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:  # added: half the time of masked_fill, whose gradient is another pass
        scores = scores + scores.new_zeros(mask.shape).masked_fill_(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def packed_mask(segments, bounds=None, longest=0, dtype=torch.float32):
    """What attend takes as the mask of packed rows: query i sees key j of the same document, not
    later. None for None.

    segments (B, T): the number of the document. bounds (N + 1,) int32: where each begins in the
    B * T positions one after the other, and the end; longest: positions of the longest document.
    """
    if segments is None:
        return None
    B, T = segments.shape
    if bounds is not None and takes_bounds(segments.device, dtype):
        return bounds
    if longest and 2 * (len(bounds) - 1) * longest**2 < B * T**2:
        return apart(bounds.long(), longest, B * T)
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same & torch.ones(T, T, dtype=torch.bool, device=segments.device).tril()


def apart(bounds, longest, n):
    """The Apart of documents with these bounds (N + 1,) among n positions."""
    steps = torch.arange(longest, device=bounds.device)
    index = (bounds[:-1, None] + steps).clamp_max(n - 1)
    positions = torch.arange(n, device=bounds.device)
    document = torch.searchsorted(bounds, positions, right=True) - 1
    return Apart(index, document * longest + positions - bounds[document])


class Take(torch.autograd.Function):
    """Rows of x (n, ...) by index; `back` says for each row of x where it went. What index reads
    besides, behind the ends of documents, is in no result, so its gradient is nothing."""

    @staticmethod
    def forward(ctx, x, index, back):
        ctx.save_for_backward(back)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class Return(torch.autograd.Function):
    """The other way: rows of x by `back`; the gradient of rows that are in no result is zero."""

    @staticmethod
    def forward(ctx, x, back):
        ctx.save_for_backward(back)
        ctx.rows = len(x)
        return x.index_select(0, back)

    @staticmethod
    def backward(ctx, grad):
        found = grad.new_zeros(ctx.rows, *grad.shape[1:])
        return found.index_copy_(0, ctx.saved_tensors[0], grad), None


def attend_apart(q, k, v, documents):
    """Causal attention inside documents, each a row of its own, padded to the longest."""
    B, H, T, D = q.shape
    N, L = documents.index.shape
    index = documents.index.flatten()
    q, k, v = (Take.apply(x.transpose(1, 2).reshape(B * T, H * D), index, documents.back)
               .view(N, L, H, D).transpose(1, 2) for x in (q, k, v))
    y = attend(q, k, v, causal=True).transpose(1, 2).reshape(N * L, H * D)
    return Return.apply(y, documents.back).view(B, T, H, D).transpose(1, 2)


def attend_documents(q, k, v, bounds):
    """Causal attention inside documents; q, k, v (B, H, T, D), bounds (N + 1,) over B * T."""
    B, H, T, D = q.shape
    q, k, v = (x.transpose(1, 2).reshape(B * T, H, D) for x in (q, k, v))
    y = varlen_attn(q, k, v, bounds, bounds, T, T, **CAUSAL)
    return y.view(B, T, H, D).transpose(1, 2)


@functools.cache
def takes_bounds(device, dtype):
    """Whether attend_documents works here: the kernel is for half precision on GPUs since Ampere,
    and young, so it is tried once on a small example."""
    if varlen_attn is None or device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    q = torch.randn(3, 1, 2, 8, 64, device=device, dtype=dtype)
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0]], device=device)
    bounds = torch.tensor([0, 3, 7, 8], device=device, dtype=torch.int32)
    try:
        with torch.enable_grad():
            found = attend_documents(*q.requires_grad_().unbind(), bounds)
            found.sum().backward()
    except Exception as error:  # whatever a kernel that does not fit may raise
        print(f"packed rows use a mask: the kernel for documents fails here ({error})", flush=True)
        return False
    expected = attend(*q.detach().unbind(), packed_mask(segments))
    return torch.allclose(found.float(), expected.float(), atol=0.05)
