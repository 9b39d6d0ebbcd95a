"""Autoregressive decoding of one sequence or a batch, and sampling.

Decoding is bound by memory bandwidth and overhead: weights are packed or quantized
(quantized_linear), the KV cache is allocated once, and a GPU replays a step as a CUDA graph.

Shapes: B rows, T positions, C width, V vocabulary.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import torch

from common.config import UserError
from inference.kv_cache import KVCache

LIMITS = {"temperature": (0, 1e9), "top_k": (0, 1e9), "top_p": (1e-9, 1), "seed": (0, 2**63 - 1),
          "repetition_penalty": (1e-9, 1e9), "max_tokens": (1, 1e9)}
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what the first bytes of a character decode to
BUCKET = 256  # slots that a CUDA graph attends to; doubled as long as a row is longer


@dataclass
class Sampling:
    """How the next token is chosen."""

    # --- sampling
    temperature: float = 0.0  # 0 takes the most likely token; higher is more random
    top_k: int = 0  # sample from the k most likely tokens only; 0 for all
    top_p: float = 1.0  # sample from the most likely tokens that make up this probability
    repetition_penalty: float = 1.0  # above 1, tokens already in the context are less likely
    seed: int = 1337  # the same seed gives the same text
    max_tokens: int = 256  # longest answer

    def __post_init__(self):
        for name, (low, high) in LIMITS.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name} must be {low:g} to {high:g}, not {getattr(self, name)}")


@dataclass
class Generation(Sampling):
    """The settings that sample.py and app.py share."""

    # --- hardware
    device: str = "auto"  # auto, cpu, cuda, mps
    # of weights and products; auto: the fastest here that costs a model under 0.01 nats per token
    precision: Literal["auto", "bf16", "fp16", "fp32", "int8"] = "auto"


class Sampler:
    """Chooses the ids of one sequence, with its own generator and list of seen ids."""

    def __init__(self, sampling, device="cpu"):
        self.sampling, self.device, self.seen, self.generator = sampling, device, None, None
        if sampling.temperature:
            self.generator = torch.Generator(device).manual_seed(sampling.seed)

    @property
    def greedy(self):
        """Whether it always takes the most likely id."""
        return self.generator is None and self.sampling.repetition_penalty == 1

    def begin(self, ids):
        """Start an answer to a context of ids (list of int); negative ones are image patches."""
        self.seen = torch.tensor([i for i in ids if i >= 0], device=self.device)

    def __call__(self, logits):
        """The next id, (1,), from logits (1, V)."""
        s, logits = self.sampling, logits.float()
        if s.repetition_penalty == 1:
            return pick(logits, s.temperature, s.top_k, s.top_p, self.generator)
        seen = logits.gather(1, self.seen[None])
        seen = torch.where(seen > 0, seen / s.repetition_penalty, seen * s.repetition_penalty)
        token = pick(logits.scatter(1, self.seen[None], seen), s.temperature, s.top_k, s.top_p,
                     self.generator)
        self.seen = torch.cat((self.seen, token))
        return token


def pick(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """The next ids (B,) from logits (B, V): the most likely at temperature 0, else sampled."""
    logits = logits.float()  # bf16 has ties, and its argmax takes 4 times as long on a CPU
    if temperature < 1e-5:  # samples would be the same, and some logits overflow
        return logits.argmax(-1)
    logits = logits / temperature
    if not top_k and top_p == 1:
        return logits.softmax(-1).multinomial(1, generator=generator)[:, 0]
    values, order = most_likely(logits, top_k, top_p)
    p = values.softmax(-1) if top_k else (values - logits.logsumexp(-1, keepdim=True)).exp()
    before = p.cumsum(-1) - p  # probability of all that are more likely
    before[:, 0] = 0.0  # never drop the most likely
    return order.gather(1, (p * (before < top_p)).multinomial(1, generator=generator))[:, 0]


def most_likely(logits, top_k, top_p):
    """(values, ids), both (B, n), descending: top_k of them, or as many as top_p needs. Sorting a
    whole vocabulary takes longer than computing its logits."""
    V = logits.size(-1)
    n, total = min(top_k or 64, V), logits.logsumexp(-1, keepdim=True)
    while True:
        values, order = logits.topk(n)
        if top_k or n == V or (values - total).exp().sum(-1).min() >= top_p:
            return values, order
        n = min(8 * n, V)


class Decoding:
    """A decoder and its KV cache, one row per sequence. Each row has a spare slot: a step computes
    idle rows too, and writes their result after their last valid position."""

    def __init__(self, model, rows=1, slots=None):
        self.model, self.slots = model, slots or model.config.max_positions
        self.cache = KVCache(model, rows, self.slots + 1)
        self.device = self.cache.keys.device
        self.cached_ids = [[] for _ in range(rows)]  # see reuse_prefix
        size = self.cache.keys.size(3)
        self.ends = [*(BUCKET << i for i in range(32) if BUCKET << i < size), size]
        self.graphs = {}  # one of the ends -> CUDA graph and its output; their inputs are:
        self.ids = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.positions = torch.zeros_like(self.ids)

    def cut(self, length, row=0):
        """Drop the positions of a row after the first `length`."""
        self.cache.lengths[row] = min(self.cache.lengths[row], length)

    def room(self, row=0):
        """Number of positions that are free in a row."""
        return self.slots - self.cache.lengths[row]

    def common_prefix(self, ids, row=0):
        """Number of cached positions of a row that a prompt of ids can reuse; the last id is always
        computed, for its logits."""
        n, cached = 0, self.cached_ids[row]
        limit = min(self.cache.lengths[row], len(cached), len(ids) - 1)
        while n < limit and cached[n] == ids[n]:
            n += 1
        return n

    def reuse_prefix(self, ids, row=0):
        """Cut a row to its common prefix with ids, whose length is returned. The caller prefills
        the rest, and appends to the list `ids` every decoded id."""
        n = self.common_prefix(ids, row)
        self.cut(n, row)
        self.cached_ids[row] = ids
        return n

    @torch.inference_mode()
    def prefill(self, embeddings, row=0, lengths=None):
        """Append embeddings (B, T, C) to the rows from `row` on; next-token logits (B, V).
        lengths (list of B): valid positions; later ones overwrite the padding."""
        B, T, _ = embeddings.shape
        lengths = lengths or [T] * B
        last = torch.tensor([i * T + length - 1 for i, length in enumerate(lengths)])
        x = self.model.hidden(embeddings, cache=self.cache.rows(row, row + B),
                              where=last.to(self.device))
        for i, length in enumerate(lengths):
            self.cache.lengths[row + i] += length
        return self.model.head(x)

    @torch.inference_mode()
    def step(self, ids, row=0, waiting=()):
        """Append one id (B,) to each row from `row` on; next-token logits (B, V), meaningless for
        the rows in `waiting`, which stay as they are."""
        last = row + len(ids)
        if self.device.type == "cuda":
            logits = self._replay(ids, row)[row:last]
        else:
            logits = self._step(ids, self.cache.rows(row, last))
        for i in range(row, last):
            if i not in waiting:
                self.cache.lengths[i] += 1
        return logits

    def _step(self, ids, cache):
        x = self.model.hidden(self.model.token_embedding(ids)[:, None], cache=cache)
        return self.model.head(x[:, 0])

    def _replay(self, ids, row):
        """A step of all rows, with ids for those from `row` on. A CUDA graph has fixed shapes and
        addresses: ids and positions are copied there, and a mask hides unused slots of `end`."""
        end = next(end for end in self.ends if end > max(self.cache.lengths))
        self.ids[row : row + len(ids)] = ids
        self.positions.copy_(torch.tensor(self.cache.lengths))
        if end not in self.graphs:
            self.graphs[end] = self._capture(end)
        graph, logits = self.graphs[end]
        graph.replay()
        return logits

    @torch.inference_mode()
    def prepare(self):
        """On a GPU, capture the graphs of all lengths now, not when a row first needs one."""
        if self.device.type == "cuda":
            self.graphs = {end: self._capture(end) for end in self.ends}

    def _capture(self, end):
        """(graph, its output logits (rows, V)) of a step that attends to `end` slots.

        The current device and, if so requested, what a capture forbids are those of the calling
        thread: others may allocate meanwhile."""
        # Its next positions are a tensor on the device, not Python numbers.
        cache = SimpleNamespace(extend=lambda T: self.cache.place(self.positions[:, None], end))
        with torch.cuda.device(self.device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(3):  # allocates; repeating a step changes nothing
                    self._step(self.ids, cache)
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                logits = self._step(self.ids, cache)
        return graph, logits


@torch.inference_mode()
def generate(decoding, embeddings, max_tokens, stop, sampler):
    """Yield the ids (int) that follow embeddings (1, T, C) in the first row, without `stop`; fewer
    when the row is full. All but the last id are in the cache afterwards."""
    logits = decoding.prefill(embeddings)
    for n in range(1, max_tokens + 1):
        token = sampler(logits)
        number = token.item()
        if number == stop:
            return
        yield number
        if n == max_tokens or not decoding.room():
            return
        logits = decoding.step(token)


@torch.inference_mode()
def generate_batch(decoding, embeddings, lengths, max_tokens, stop, samplers=None):
    """B lists of ids that follow embeddings (B, T, C), padded on the right, of B lengths. samplers:
    one each, or None for greedy decoding. The rows must be empty, and are emptied afterwards."""
    B = len(lengths)
    logits = decoding.prefill(embeddings, lengths=lengths)
    answers, done = [[] for _ in lengths], set()
    for n in range(1, max_tokens + 1):
        tokens = pick(logits) if samplers is None else torch.cat([
            sampler(logits[i : i + 1]) for i, sampler in enumerate(samplers)])
        for row, token in enumerate(tokens.tolist()):
            if row not in done and token != stop:
                answers[row].append(token)
            if token == stop or not decoding.room(row):
                done.add(row)
        if n == max_tokens or len(done) == B:
            break
        logits = decoding.step(tokens, waiting=done)
    for row in range(B):
        decoding.cut(0, row)
    return answers
