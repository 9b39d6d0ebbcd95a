"""The GPT decoder: configuration, layers, loss, KV cache and generation.

20 layers of width 1280 and 10 heads make the reference size: 522 M parameters, 3.06 GFLOP a token.
Pre-LayerNorm, rotary positions, ReLU, no dropout, untied head. One attention path serves training,
prefill and decoding. As ordinary as can be on purpose: with the same weights it is a GPT-NeoX of
`transformers`, by test.

Letters for shapes: B batch, T positions, C width, H heads, D head size, V vocabulary, S slots of
the cache.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from attention import attend, compute_dtype, packed_mask

# Elements of the logits that exist at a time in training: 128 MB of bf16 on a CPU, 512 on a GPU.
LOGITS_AT_ONCE = {"cpu": 2**26, "mps": 2**26, "cuda": 2**28}


@dataclass
class GPTConfig:
    vocab_size: int = 50304  # GPT-2's 50,257 ids, 5 specials, padded to a multiple of 64
    n_layer: int = 20
    n_head: int = 10
    n_embd: int = 1280
    max_positions: int = 2048  # rows of the rotary table; longer contexts are refused
    rope_theta: float = 1e6


class Attention(nn.Module):
    """Causal self-attention; q, k and v without bias, the output projection with."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.qkv.weight.stacked = 3  # three matrices in one: the optimizer treats them apart
        self.out = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, rotary, mask, cache):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        (q, k), v = rotate(qkv[:2], *rotary), qkv[2]
        if cache is not None:
            k, v = cache(k, v)  # (B, H, S, D): these and all earlier positions
        y = attend(q, k, v, mask, causal=mask is None and T > 1)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.down(F.relu(self.up(x)))


class Block(nn.Module):
    repeated = True  # all of them alike, so that one compilation serves all

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, rotary, mask, cache=None):
        x = x + self.attention(self.norm1(x), rotary, mask, cache)
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
        table = rotary_table(D, config.max_positions, config.rope_theta)
        self.register_buffer("rotary_cos", table.cos(), persistent=False)  # (max_positions, D/2)
        self.register_buffer("rotary_sin", table.sin(), persistent=False)
        self.apply(init_weights)
        # Words begin loud against what the blocks will add; see docs/log.md, "The recipe".
        nn.init.normal_(self.token_embedding.weight)
        for block in self.blocks:  # every block starts as the identity
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.mlp.down.weight)

    def forward(self, ids, targets=None, where=None, positions=None, segments=None, bounds=None,
                longest=0, embeddings=None):
        """Logits, or with `targets` the cross-entropy in nats, summed over what is supervised.

        ids (B, T), or instead of them embeddings (B, T, C), are the input. Without `where`, targets
        (B, T) holds the id that follows each position. With it, only the N flat positions `where`
        (into B * T) are supervised and targets is (N,): the head sees no other position.
        segments (B, T) number the documents of packed rows, bounds (N + 1,) say where they begin
        and longest how long they are (attention.packed_mask): no attention crosses them.
        """
        x = self.token_embedding(ids) if embeddings is None else embeddings
        x = self.hidden(x, positions, packed_mask(segments, bounds, longest, compute_dtype(x)))
        if targets is None:
            return self.head(x)
        x = x.flatten(0, 1)
        x = x if where is None else x.index_select(0, where)
        return head_loss(x, self.head.weight, targets.flatten())

    def hidden(self, x, positions=None, mask=None, cache=None):
        """Embeddings (B, T, C) to normalised final states (B, T, C).

        positions: (B, T) or None for 0, 1, 2 ... (behind the cache's length, with a cache). With a
        cache the position is also the slot in it, so a batch may hold rows of different lengths.
        """
        T = x.size(1)
        if len(self.rotary_cos) < T:
            raise ValueError(f"{T} positions, but the model was made for {len(self.rotary_cos)}")
        if cache is not None:
            mask = cache.start(T, positions)
            if positions is None:
                positions = torch.arange(cache.length - T, cache.length, device=x.device)
        if positions is None:
            rotary = self.rotary_cos[:T], self.rotary_sin[:T]
        else:
            rotary = self.rotary_cos[positions], self.rotary_sin[positions]
        if rotary[0].dim() == 3:
            rotary = tuple(table.unsqueeze(1) for table in rotary)  # (B, 1, T, D/2), over heads
        dtype = compute_dtype(x)
        x, rotary = x.to(dtype), tuple(table.to(dtype) for table in rotary)
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, mask, None if cache is None else cache.layer(i))
        return self.final_norm(x)

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """Training FLOP a token at context T: 6 for every multiplying weight (forward 2, backward
        4), and 12 * n_layer * C * T for attention, after PaLM's appendix B (causality ignored)."""
        c = self.config
        weights = c.n_layer * 12 * c.n_embd**2 + c.vocab_size * c.n_embd
        return 6 * weights + 12 * c.n_layer * c.n_embd * T


def head_loss(x, weight, targets):
    """Cross-entropy in nats, summed, of the logits of x (N, C) by weight (V, C); targets (N,)."""
    return HeadLoss.apply(x, weight, targets, torch.is_grad_enabled())


class HeadLoss(torch.autograd.Function):
    """head_loss, with the gradients made on the way.

    The logits of a large vocabulary are the largest tensor of a training step by far. Here they
    exist for a few rows at a time, in autocast's type and in one buffer, and everything that needs
    them is computed while they are there.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, training):
        dtype = compute_dtype(x)
        x, weight_, total = x.to(dtype), weight.to(dtype), x.new_zeros((), dtype=torch.float32)
        want_x, want_weight = (training and needed for needed in ctx.needs_input_grad[:2])
        dx = torch.empty_like(x) if want_x else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        n_chunks = max(1, -(-len(x) * len(weight) // LOGITS_AT_ONCE[x.device.type]))
        rows = max(1, -(-len(x) // n_chunks))
        buffer, ones = x.new_empty(rows, len(weight)), x.new_ones(len(weight), 1)
        product = torch.empty_like(weight_) if want_weight else None
        numbers = torch.arange(rows, device=x.device)
        for start in range(0, len(x), rows):
            part = x[start : start + rows]
            target = numbers[: len(part)], targets[start : start + rows]
            p = torch.mm(part, weight_.T, out=buffer[: len(part)])
            p = p.float() if dtype == torch.float16 else p  # fp16 ends at 6e-8: e^-17
            p = torch.softmax(p, -1, out=p)
            right = p[target].float().clamp_min(1e-38)
            # The loss's gradient is p, less 1 at the target. In bf16 that 1 would swallow what a
            # sure model still has wrong; minus the sum of the others is the same and keeps it.
            p[target] = 0.0
            wrong = torch.mm(p, ones.to(p.dtype), out=p.new_empty(len(p), 1))[:, 0]  # no autocast
            p[target] = -wrong
            p, wrong = p.to(dtype), wrong.float()
            total -= torch.where(wrong < 0.5, torch.log1p(-wrong), right.log()).sum()
            if want_x:
                torch.mm(p, weight_, out=dx[start : start + rows])
            if want_weight:
                dweight += torch.mm(p.T, part, out=product)
        ctx.save_for_backward(dx, dweight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad):
        dx, dweight = ctx.saved_tensors
        dx = None if dx is None else dx * grad
        return dx, None if dweight is None else dweight.mul_(grad).to(ctx.dtype), None, None


def init_weights(module):
    """Normal weights of deviation 0.02 (GPT-2's), zero biases; norms start as the identity."""
    if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)):
        nn.init.normal_(module.weight, std=0.02)
    if getattr(module, "bias", None) is not None and not isinstance(module, nn.LayerNorm):
        nn.init.zeros_(module.bias)


def rotary_table(D, n_positions, theta):
    """Angles (n_positions, D / 2) of rotary embedding, half-split form: columns i and i + D/2 of a
    head turn together (Su et al. 2021, as in GPT-NeoX and LLaMA)."""
    frequencies = theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    return (torch.arange(n_positions, dtype=torch.float64)[:, None] * frequencies).float()


def rotate(x, cos, sin):
    """Turn x (..., T, D) by its positions; cos and sin (T, D / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class KVCache:
    """Keys and values of one conversation, or of one batch of them. Its owner is the caller: no
    module keeps any, so two users cannot meet in it. Allocated once; length counts used slots."""

    def __init__(self, model, batch=1, slots=None):
        c, weight = model.config, model.head.weight
        shape = (c.n_layer, batch, c.n_head, slots or c.max_positions, c.n_embd // c.n_head)
        # Zeros, not empty: what a mask hides is still multiplied by 0, and 0 * NaN is NaN.
        self.keys = torch.zeros(shape, device=weight.device, dtype=compute_dtype(weight))
        self.values = torch.zeros_like(self.keys)
        self.length, self._positions = 0, None

    def start(self, T, positions):
        """Make room for T positions; returns the attention mask for them (None: causal or full)."""
        end = self.length + T
        if end > self.keys.size(3):
            raise ValueError(f"{end} positions do not fit a cache of {self.keys.size(3)}")
        before, self.length, self._positions = self.length, end, positions
        if positions is None and (T == 1 or before == 0):
            return None
        if positions is None:
            positions = torch.arange(before, end, device=self.keys.device)[None]
        return (torch.arange(end, device=self.keys.device) <= positions[:, None, :, None])

    def layer(self, i):
        """The function that stores layer i's new k and v (B, H, T, D) and returns all so far."""
        keys, values, end = self.keys[i], self.values[i], self.length

        def append(k, v):
            if self._positions is None:
                slots = slice(end - k.size(2), end)
                keys[:, :, slots], values[:, :, slots] = k, v
            else:
                slots = self._positions[:, None, :, None].expand_as(k)
                keys.scatter_(2, slots, k.to(keys.dtype))
                values.scatter_(2, slots, v.to(values.dtype))
            return keys[:, :, :end], values[:, :, :end]

        return append


def pick(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """The next ids (B,) from logits (B, V): the likeliest at temperature 0, else a draw."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        smallest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability ahead of each
        drop = (before >= top_p) & (before > 0)  # never the likeliest
        logits = logits.masked_fill(drop.scatter(1, order, drop), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.inference_mode()
def generate(model, embeddings, cache, max_tokens, stop, **sampling):
    """Yield the ids (int) that follow embeddings (1, T, C), one by one, `stop` not among them.

    Everything yielded, and `stop`, is in the cache afterwards, so that a conversation goes on by
    calling this with the next turn's embeddings alone. Ends early when the cache is full.
    """
    for _ in range(max_tokens):
        x = model.hidden(embeddings, cache=cache)[:, -1]
        token = pick(model.head(x), **sampling)
        embeddings = model.token_embedding(token)[:, None]
        token = token.item()
        if token == stop:
            break
        yield token
        if cache.length == cache.keys.size(3):
            return
    else:  # the limit came first: the last token was yielded, but is not in the cache yet
        model.hidden(embeddings, cache=cache)
    if cache.length < cache.keys.size(3):
        stop = torch.tensor([[stop]], device=embeddings.device)
        model.hidden(model.token_embedding(stop), cache=cache)


@torch.inference_mode()
def generate_batch(model, embeddings, lengths, max_tokens, stop):
    """Greedy continuations of B prompts of different lengths, each ending at `stop`.

    embeddings: (B, T, C), padded on the right; lengths: (B,). Returns B lists of ids. A slot that
    holds padding is overwritten before any position may see it.
    """
    B, T, _ = embeddings.shape
    cache = KVCache(model, B, T + max_tokens)
    positions = torch.arange(T, device=embeddings.device).expand(B, T)
    x = model.hidden(embeddings, positions, cache=cache)
    x = x[torch.arange(B, device=x.device), lengths - 1]
    tokens, done = [], torch.zeros(B, dtype=torch.bool, device=x.device)
    for i in range(max_tokens):
        token = model.head(x).argmax(-1)
        done |= token == stop
        tokens.append(token)
        if done.all() or i == max_tokens - 1:
            break
        x = model.hidden(model.token_embedding(token)[:, None], (lengths + i)[:, None], cache=cache)
        x = x[:, 0]
    rows = torch.stack(tokens, dim=1).tolist()
    return [row[: row.index(stop)] if stop in row else row for row in rows]
