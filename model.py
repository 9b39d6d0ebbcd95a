"""The GPT decoder: configuration, layers, attention and loss.

Pre-LayerNorm, rotary positions, ReLU, no dropout, untied head: deliberately standard, so that with
the same weights it is a GPT-NeoX of `transformers` (tests/test_model.py). The default size is the
reference: 522 M parameters, 3.06 GFLOP per token.

Shapes: B batch, T positions, C width, H heads, D head size, V vocabulary, S cache slots (keys),
N documents, L positions of the longest document.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn

from common.device import processor

UNFUSED_MAX = 200 if processor().instructions == "AMX" else 1024  # positions; see attend
# Logits held in memory at once in training: 128 MB of bf16 on a CPU, 512 MB on a GPU.
LOGITS_AT_ONCE = {"cpu": 2**26, "mps": 2**26, "cuda": 2**28}
FP16_SCALE = 1024.0  # fp16 holds 6e-8 to 65,504; the probabilities of rare tokens are smaller


@dataclass
class GPTConfig:
    vocab_size: int = 50304  # GPT-2's 50,257 ids, 5 specials, padded to a multiple of 64
    n_layer: int = 20
    n_head: int = 10
    n_embd: int = 1280
    max_positions: int = 2048  # rows of the rotary table; longer contexts are refused
    rope_theta: float = 1e6


class Attention(nn.Module):
    """Causal self-attention; q, k and v have no bias, the output projection has one."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.qkv.weight.stacked = 3  # three matrices in one: Muon orthogonalises each separately
        self.out = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, rotary, mask, slots):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        qk, v = qkv.split((2, 1), dim=2)
        qk = rotate(qk, *rotary)  # fp32 if the tables are
        q, k, v = (x.transpose(1, 2) for x in (qk[:, :, 0], qk[:, :, 1], v[:, :, 0]))
        if slots is not None:  # q, k, v: (B, H, T, D)
            k, v = slots.store(k, v)  # (B, H, S, D): new and all earlier positions
        y = attend(q.type_as(k), k, v.type_as(k), mask, causal=mask is None and T > 1)
        return self.out(y.transpose(1, 2).reshape(B, T, C).type_as(x))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.relu = nn.ReLU(inplace=True)  # in place: its input is not needed for the gradient
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.down(self.relu(self.up(x)))


class Block(nn.Module):
    repeated = True  # identical blocks, so one compilation serves all

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, rotary, mask, slots=None, where=None):
        """slots: this layer's inference.kv_cache.Slots, None in training; where: see GPT.hidden."""
        x = x + self.attention(self.norm1(x), rotary, mask, slots)
        if where is not None:
            x = x.flatten(0, 1).index_select(0, where)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        D = config.n_embd // config.n_head
        # One row more than positions: generate.Decoding computes idle rows one past their end.
        cos, sin = rotary_tables(D, config.max_positions + 1, config.rope_theta)
        self.register_buffer("rotary_cos", cos, persistent=False)  # (max_positions + 1, D)
        self.register_buffer("rotary_sin", sin, persistent=False)
        self.apply(init_weights)
        # Embeddings start large relative to the blocks' outputs; docs/log.md, "The recipe".
        nn.init.normal_(self.token_embedding.weight)
        for block in self.blocks:  # each block starts as the identity
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.mlp.down.weight)

    def forward(self, batch, embeddings=None):
        """Cross-entropy in nats of a data.Batch, summed over its supervised positions.

        Logits are computed only at the positions batch.where, if given, else at all. Attention is
        restricted to the segments of packed rows. embeddings (B, T, C): used instead of batch.ids.
        """
        x = self.token_embedding(batch.ids) if embeddings is None else embeddings
        mask = packed_mask(batch.segments, batch.bounds, batch.longest, compute_dtype(x),
                           self.rotary_cos.size(-1))
        x = self.hidden(x, batch.positions, mask).flatten(0, 1)
        x = x if batch.where is None else x.index_select(0, batch.where)
        return head_loss(x, self.head.weight, batch.targets.flatten())

    def logits(self, ids, positions=None, segments=None):
        """Logits (B, T, V) of ids (B, T); positions and segments as in data.Batch."""
        return self.head(self.hidden(self.token_embedding(ids), positions, packed_mask(segments)))

    def hidden(self, x, positions=None, mask=None, cache=None, where=None):
        """Embeddings (B, T, C) to normalised final states (B, T, C).

        positions: a slice shared by all rows, or (B, T), or None for 0, 1, 2 ... With a cache they
        continue after what each row holds.
        where: N flat positions (into B * T); then only their states are computed after the last
        attention and returned as (N, C). Not for compiled blocks: each N is a new shape.
        """
        T, layers = x.size(1), [None] * len(self.blocks)
        if self.config.max_positions < T:
            raise ValueError(f"{T} positions, but the model has only {self.config.max_positions}")
        if cache is not None:
            positions, mask, layers = cache.extend(T)
        if positions is None:
            positions = slice(T)
        dtype = compute_dtype(x)
        rotary = [table[positions].to(dtype)[..., None, None, :]  # (T, 1, 1, D), (B, T, 1, 1, D)
                  for table in (self.rotary_cos, self.rotary_sin)]
        x = x.to(dtype)
        for block, slots in zip(self.blocks, layers, strict=True):
            x = block(x, rotary, mask, slots, where if block is self.blocks[-1] else None)
        return self.final_norm(x)

    def flops(self, batch):
        """FLOP of training on a data.Batch: 6 per position and weight of a matrix product (forward
        2, gradients 2 each; a frozen weight has none), the head only at supervised positions, plus
        12 * n_layer * C per pair of positions of a document (PaLM, appendix B)."""
        c, (B, T) = self.config, batch.ids.shape
        products = B * T * c.n_layer * 12 * c.n_embd**2
        products += batch.targets.numel() * c.vocab_size * c.n_embd
        per_product = 6 if self.head.weight.requires_grad else 4
        return per_product * products + 12 * c.n_layer * c.n_embd * (batch.attended or B * T**2)


def head_loss(x, weight, targets):
    """Cross-entropy in nats, summed over N; x (N, C), head weight (V, C), target ids (N,)."""
    return HeadLoss.apply(x, weight, targets, torch.is_grad_enabled())


class HeadLoss(torch.autograd.Function):
    """head_loss, with both gradients computed in the forward pass.

    The logits of a large vocabulary are by far the largest tensor of a training step. Here they are
    computed a few rows at a time in one buffer, in autocast's dtype, and used immediately. In fp16
    the gradients are kept times FP16_SCALE, because the loss scale comes later than their rounding.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, training):
        dtype = compute_dtype(x)
        scale = FP16_SCALE if dtype == torch.float16 else 1.0
        x, weight_, total = x.to(dtype), weight.to(dtype), x.new_zeros((), dtype=torch.float32)
        want_weight = training and ctx.needs_input_grad[1]
        dx = torch.empty_like(x) if training else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        n_chunks = max(1, -(-len(x) * len(weight) // LOGITS_AT_ONCE[x.device.type]))
        rows = max(1, -(-len(x) // n_chunks))
        buffer, ones = x.new_empty(rows, len(weight)), x.new_ones(len(weight), 1)
        low_precision = want_weight and dtype != torch.float32
        product = torch.empty_like(weight_) if low_precision else None  # of one chunk
        indices = torch.arange(rows, device=x.device)
        for start in range(0, len(x), rows):
            part = x[start : start + rows]
            target = indices[: len(part)], targets[start : start + rows]
            p = torch.mm(part, weight_.T, out=buffer[: len(part)])
            far = p.amax(-1).float() - p[target].float()
            if dtype == torch.float16:  # probabilities underflow at 6e-8 = e^-17: scaled before
                p_ = torch.softmax(p, -1, dtype=torch.float32)
                p_target, p = p_[target], torch.mul(p_, scale, out=p)
            else:
                p = torch.softmax(p, -1, out=p)
                p_target = p[target].float()
            far = far - (p.amax(-1).float() / scale).log()  # the nats if p_target underflows
            # The gradient at the target is p - 1, which bf16 rounds to 0 for p near 1; minus the
            # sum of the other probabilities is the same number, without cancellation.
            p[target] = 0.0
            # On a GPU autocast sums in fp32; a CPU multiplies (out= keeps autocast away).
            others = (p.sum(-1) if p.is_cuda else
                      torch.mm(p, ones, out=ones.new_empty(len(p), 1))[:, 0])
            p[target] = -others.to(dtype)
            others = others.float() / scale
            nats = torch.where(p_target > 1e-30, -p_target.log(), far)
            total += torch.where(others < 0.5, -torch.log1p(-others), nats).sum()
            if training:
                torch.mm(p, weight_, out=dx[start : start + rows])
            if low_precision:  # accumulated in fp32
                dweight += torch.mm(p.T, part / scale, out=product)
            elif want_weight:
                dweight.addmm_(p.T, part)
        ctx.save_for_backward(dx, dweight)
        ctx.scale = scale
        return total

    @staticmethod
    def backward(ctx, grad):
        dx, dweight = ctx.saved_tensors
        return dx * (grad / ctx.scale), None if dweight is None else dweight * grad, None, None


def init_weights(module):
    """Normal weights with standard deviation 0.02 (as in GPT-2), zero biases; norms unchanged."""
    if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)):
        nn.init.normal_(module.weight, std=0.02)
    if getattr(module, "bias", None) is not None and not isinstance(module, nn.LayerNorm):
        nn.init.zeros_(module.bias)


def rotary_tables(D, n_positions, theta):
    """Cosine and signed sine (n_positions, D) of the rotary embedding, half-split form: columns i
    and i + D/2 of a head form a pair (Su et al. 2021; as in GPT-NeoX and LLaMA)."""
    frequencies = theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angles = torch.arange(n_positions, dtype=torch.float64)[:, None] * frequencies  # (., D / 2)
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x, cos, sin):
    """Rotate x (..., D) by its positions; cos and sin, broadcast over x, from rotary_tables."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)


# -------------------------------------------------------------------------------------- attention
#
# Packed rows hold several documents that must not attend to one another. A (T, T) mask works with
# any kernel, but the masked scores are computed too: five sixths of all, with documents of 85 in
# rows of 512. Recent GPUs have a kernel that takes document boundaries and skips them. Elsewhere
# the documents form a batch, padded to the longest, where that is less work than the mask.


def compute_dtype(x):
    """The dtype of matrix products of x: autocast's where it is enabled."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Apart(NamedTuple):
    """How to lay out documents as separate rows, in place of a mask."""

    index: torch.Tensor  # (N, L) flat positions into B * T; arbitrary past a document's end
    back: torch.Tensor  # (B * T,) each position's place in N * L


def attend(q, k, v, mask=None, causal=False):
    """Softmax attention of q (B, H, T, D) over k and v (B, H, S, D); returns (B, H, T, D).

    mask: (B, 1, T, S), True where a query may attend, or float to be added to the scores (only
    without gradient), or from packed_mask. causal: T == S and no query attends to later keys.

    Training in bf16 on a CPU does not use PyTorch's fused kernel, which takes 1.2 to 5 times as
    long there, forward and backward together; in fp32 it is faster (docs/log.md).
    """
    if isinstance(mask, Apart) or (mask is not None and mask.dtype == torch.int32):
        return attend_documents(q, k, v, mask)
    if (q.device.type != "cpu" or not q.requires_grad or q.dtype == torch.float32
            or q.size(-2) > UNFUSED_MAX):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    scores = (q * q.size(-1) ** -0.5) @ k.mT
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:  # adding takes half the time of masked_fill
        scores = scores + scores.new_zeros(mask.shape).masked_fill_(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def packed_mask(segments, bounds=None, longest=0, dtype=torch.float32, D=0):
    """The mask of packed rows for attend(): causal inside each document. None for None.

    segments (B, T): each position's document number. bounds (N + 1,) int32: where each document
    starts in the flat B * T positions, and the end; longest: positions of the longest document;
    dtype and D: of the products, and of a head.
    """
    if segments is None:
        return None
    (B, T), device = segments.shape, segments.device
    if bounds is not None and takes_bounds(device, dtype, D):
        return bounds
    if longest and 2 * (len(bounds) - 1) * longest**2 < B * T**2:
        starts, positions = bounds[:-1].long(), torch.arange(B * T, device=device)
        index = starts[:, None] + torch.arange(longest, device=device)
        document = torch.searchsorted(starts, positions, right=True) - 1
        back = document * longest + positions - starts[document]
        return Apart(index.clamp_max(B * T - 1), back)
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same & torch.ones(T, T, dtype=torch.bool, device=device).tril()


def attend_documents(q, k, v, documents):
    """Causal attention inside documents: bounds (N + 1,) over B * T for PyTorch's kernel, or Apart,
    one document per row, padded to the longest."""
    B, H, T, D = q.shape
    q, k, v = (x.transpose(1, 2).reshape(B * T, H * D) for x in (q, k, v))
    if isinstance(documents, Apart):
        (N, L), back = documents.index.shape, documents.back
        q, k, v = (ToDocuments.apply(x, documents.index.flatten(), back)
                   .view(N, L, H, D).transpose(1, 2) for x in (q, k, v))
        y = attend(q, k, v, causal=True).transpose(1, 2).reshape(N * L, H * D)
        y = FromDocuments.apply(y, back)
    else:
        q, k, v = (x.view(B * T, H, D) for x in (q, k, v))
        y = varlen_attn(q, k, v, documents, documents, T, T, window_size=(-1, 0))
    return y.view(B, T, H, D).transpose(1, 2)


class ToDocuments(torch.autograd.Function):
    """Rows of x (n, ...) by index, as documents; `back`: the place of each row of x in the result.
    Rows past the end of a document are never used, so they have no gradient."""

    @staticmethod
    def forward(ctx, x, index, back):
        ctx.save_for_backward(back)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class FromDocuments(torch.autograd.Function):
    """The inverse of ToDocuments: rows by `back`; the rows left out get a gradient of zero."""

    @staticmethod
    def forward(ctx, x, back):
        ctx.save_for_backward(back)
        ctx.rows = len(x)
        return x.index_select(0, back)

    @staticmethod
    def backward(ctx, grad):
        found = grad.new_zeros(ctx.rows, *grad.shape[1:])
        return found.index_copy_(0, ctx.saved_tensors[0], grad), None


@functools.cache
def takes_bounds(device, dtype, D):
    """Whether PyTorch's kernel for document boundaries works here with heads of size D. It is new,
    and needs half precision, an Ampere GPU or newer and a D that is a multiple of 8 (PyTorch pads
    others only for its other kernels), so it is compared once with the mask on an example."""
    if device.type != "cuda" or dtype == torch.float32 or D % 8:
        return False
    qkv = torch.randn(3, 1, 2, 8, D, device=device, dtype=dtype, requires_grad=True)
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0]], device=device)
    bounds = torch.tensor([0, 3, 7, 8], device=device, dtype=torch.int32)
    try:
        with torch.enable_grad():
            found = attend(*qkv.unbind(), bounds)
            found.sum().backward()
    except Exception as error:  # an unsupported kernel may raise anything
        print(f"packed rows use a mask: variable-length attention fails here ({error})", flush=True)
        return False
    expected = attend(*qkv.unbind(), packed_mask(segments))
    return torch.allclose(found.float(), expected.float(), atol=0.05)
