"""Softmax attention, and which kernel computes it.

Packed rows hold several documents, and none may look into another. A mask of (T, T) says so to any
kernel; on newer GPUs the bounds of the documents say it to a kernel that then skips the rest, which
at 2,048 positions and documents of 290 is six sevenths of the work.

Letters for shapes: B rows, H heads, T queries, S keys, D head size, N documents.
"""

import functools
import inspect

import torch
import torch.nn.functional as F

try:
    from torch.nn.attention.varlen import varlen_attn

    NEWER = "window_size" in inspect.signature(varlen_attn).parameters
except ImportError:  # a PyTorch that was built without it
    varlen_attn, NEWER = None, False
CAUSAL = {"window_size": (-1, 0)} if NEWER else {"is_causal": True}  # the name before PyTorch 2.11


def compute_dtype(x):
    """What matrix products of x come out in: autocast's type where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def attend(q, k, v, mask=None, causal=False):
    """Softmax attention of q (B, H, T, D) over k and v (B, H, S, D); mask (B, 1, T, S) is True
    where a query may look, or comes from packed_mask; causal means T == S and no look ahead.

    Short training sequences on a CPU are multiplied out: PyTorch's fused kernel takes 1.7 to 5
    times as long there, forward and backward together, up to about 200 positions (docs/log.md).
    """
    if mask is not None and mask.dtype == torch.int32:
        return attend_documents(q, k, v, mask)
    if q.device.type != "cpu" or not q.requires_grad or q.size(-2) > 200:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    scores = (q * q.size(-1) ** -0.5) @ k.mT
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def packed_mask(segments, bounds=None, dtype=torch.float32):
    """What attend takes as the mask of packed rows: query i sees key j of the same document, not
    later. None for None.

    segments (B, T): the number of the document. bounds (N + 1,) int32: where each begins in the
    B * T positions one after the other, and the end; instead of a mask where a kernel takes them.
    """
    if segments is None:
        return None
    if bounds is not None and takes_bounds(segments.device, dtype):
        return bounds
    T = segments.size(1)
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same & torch.ones(T, T, dtype=torch.bool, device=segments.device).tril()


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
