"""Decoding: one token after another, for one sequence or for many at once.

A token reads every weight of the decoder once, so memory bandwidth and overhead decide the speed:
weights are laid out for it (quantized_linear.for_decoding), the KV cache is allocated once, a GPU
replays a step as a CUDA graph, and many rows share one pass over the weights.

Shapes: B rows, T positions, C width, V vocabulary.
"""

from dataclasses import dataclass

import torch

from common.config import UserError
from common.device import need_compiler
from inference.kv_cache import KVCache

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

    def __post_init__(self):
        for name, valid, range_ in (
                ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
                ("top_k", self.top_k >= 0, "0 or more"),
                ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
                ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
                ("seed", 0 <= self.seed < 2**63, "0 or more")):
            if not valid:
                raise UserError(f"{name} must be {range_}, not {getattr(self, name)}")


class Sampler:
    """Chooses the ids of one sequence, with its own generator and set of seen ids."""

    def __init__(self, sampling, device="cpu"):
        self.sampling, self.generator, self.seen = sampling, None, None
        if sampling.temperature:
            self.generator = torch.Generator(device).manual_seed(sampling.seed)

    @property
    def greedy(self):
        """Whether it takes the most likely id, whatever the context."""
        return self.generator is None and self.sampling.repetition_penalty == 1

    def begin(self, ids):
        """Start an answer to a context of ids (list of int); negative ids, of images, are no text
        that the penalty counts."""
        penalized = self.sampling.repetition_penalty != 1
        self.seen = [i for i in ids if i >= 0] if penalized else None

    def __call__(self, logits):
        """The next id, (1,), from logits (1, V)."""
        s, logits = self.sampling, logits.float()
        if self.seen is not None:
            if isinstance(self.seen, list):
                ids, self.seen = self.seen, logits.new_zeros(logits.size(-1), dtype=torch.bool)
                self.seen[ids] = True
            weaker = torch.where(logits > 0, logits / s.repetition_penalty,
                                 logits * s.repetition_penalty)
            logits = torch.where(self.seen, weaker, logits)
        token = pick(logits, s.temperature, s.top_k, s.top_p, self.generator)
        if self.seen is not None:
            self.seen[token] = True
        return token


def pick(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """The next ids (B,) from logits (B, V): the most likely at temperature 0, else sampled."""
    logits = logits.float()  # bf16 has ties, and its argmax takes 4 times as long on a CPU
    if temperature < 1e-5:  # no sample differs, and some logits would overflow
        return logits.argmax(-1)
    logits = logits / temperature
    if not top_k and top_p == 1:
        return draw(logits.softmax(-1), generator)
    values, order = most_likely(logits, top_k, top_p)
    p = values.softmax(-1) if top_k else (values - logits.logsumexp(-1, keepdim=True)).exp()
    before = p.cumsum(-1) - p  # probability of all that are more likely
    before[:, 0] = 0.0  # never drop the most likely
    return order.gather(1, draw(p * (before < top_p), generator)[:, None])[:, 0]


def most_likely(logits, top_k, top_p):
    """(values, ids), both (B, n), descending: of top_k logits, or of as many as top_p needs.

    Sorting a whole vocabulary would take longer than computing its logits.
    """
    V = logits.size(-1)
    n, total = min(top_k or 64, V), logits.logsumexp(-1, keepdim=True)
    while True:
        values, order = logits.topk(n)
        if top_k or n == V or (values - total).exp().sum(-1).min() >= top_p:
            return values, order
        n = min(8 * n, V)


def draw(p, generator):
    """Indices (B,) drawn with probabilities p (B, n), which need not sum to 1."""
    sums = p.cumsum(-1)
    u = torch.rand(len(p), 1, generator=generator, device=p.device) * (1 - 2**-23)
    return torch.searchsorted(sums, u * sums[:, -1:], right=True)[:, 0]


class Decoding:
    """A decoder and the rows of a KV cache, one for each sequence.

    Every row has one slot more than it may use: a row that waits while others decode is computed
    too, and its result is written behind its last valid position.
    """

    def __init__(self, model, rows=1, slots=None, compile=False):
        self.model, self.slots = model, slots or model.config.max_positions
        self.cache = KVCache(model, rows, self.slots + 1)
        self.device = self.cache.keys.device
        self.cached_ids = [[] for _ in range(rows)]  # see reuse_prefix
        self.graphs, self.run = {}, None
        if compile:
            if self.device.type != "cuda":
                raise UserError("--compile=True needs a GPU")
            need_compiler()
            self.run = torch.compile(call_block)
        if self.device.type == "cuda":
            self.ids = torch.zeros(rows, dtype=torch.long, device=self.device)
            self.positions = torch.zeros_like(self.ids)

    def length(self, row=0):
        """Number of positions that a row holds."""
        return self.cache.lengths[row]

    def cut(self, length, row=0):
        """Drop what a row holds after its first `length` positions."""
        self.cache.lengths[row] = min(self.cache.lengths[row], length)

    def room(self, row=0):
        """Number of positions that a row can still take."""
        return self.slots - self.cache.lengths[row]

    def common_prefix(self, ids, row=0):
        """Number of positions of a row that a prompt of ids can use. The last id does not count:
        the logits of what follows it have to be computed."""
        n, cached = 0, self.cached_ids[row]
        limit = min(self.length(row), len(cached), len(ids) - 1)
        while n < limit and cached[n] == ids[n]:
            n += 1
        return n

    def reuse_prefix(self, ids, row=0):
        """Cut a row to its common prefix with ids, and return the prefix's length. The caller
        prefills the rest, and appends to the list `ids` every id that it decodes next."""
        n = self.common_prefix(ids, row)
        self.cut(n, row)
        self.cached_ids[row] = ids
        return n

    @torch.inference_mode()
    def prefill(self, embeddings, row=0, lengths=None):
        """Append embeddings (B, T, C) to the rows row, row + 1 ...; logits (B, V) of what follows.
        lengths (list of B): how many of the T positions count; the rest is padding, which later
        positions overwrite before they attend to it."""
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
        """Append one id (B,) to each of the rows row, row + 1 ...; logits (B, V) of what follows.
        waiting: rows among them that do not take part; their logits are meaningless."""
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
        x = self.model.hidden(self.model.token_embedding(ids)[:, None], cache=cache, run=self.run)
        return self.model.head(x[:, 0])

    # A CUDA graph is a step's list of kernels, with fixed addresses and shapes. Ids and positions
    # are copied to where it reads them; it attends to `end` slots, of which a mask hides the rest.

    def _replay(self, ids, row):
        """The step of all rows, of which those from `row` on take ids."""
        end = BUCKET
        while end <= max(self.cache.lengths):
            end *= 2
        end = min(end, self.cache.slots)
        self.ids[row : row + len(ids)] = ids
        self.positions.copy_(torch.tensor(self.cache.lengths))
        if end not in self.graphs:
            self.graphs[end] = self._capture(end)
        graph, logits = self.graphs[end]
        graph.replay()
        return logits

    def _capture(self, end):
        """(graph, the logits (rows, V) that it writes) of a step that attends to `end` slots."""
        cache = FixedSlots(self.cache, self.positions, end)
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles and allocates; repeating a step changes nothing
                self._step(self.ids, cache)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._step(self.ids, cache)
        return graph, logits


class FixedSlots:
    """A KVCache whose next positions are in a tensor (rows,) on the device."""

    def __init__(self, cache, positions, end):
        self.cache, self.positions, self.end = cache, positions, end

    def extend(self, T):
        return self.cache.place(self.positions[:, None], self.end)


def call_block(block, *inputs):
    return block(*inputs)


@torch.inference_mode()
def generate(decoding, embeddings, max_tokens, stop, sampler):
    """Yield the ids (int) that follow embeddings (1, T, C) in the first row, without `stop`.

    All but the last id are in the cache afterwards. Ends early when the row is full.
    """
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
    """Continuations of B prompts of different lengths, each ending at `stop`: B lists of ids.

    embeddings: (B, T, C), padded on the right; lengths: list of B; samplers: B of them, or None for
    greedy decoding. The rows must be empty, and are emptied afterwards.
    """
    B = len(lengths)
    logits = decoding.prefill(embeddings, lengths=lengths)
    answers, done = [[] for _ in lengths], set()
    for n in range(1, max_tokens + 1):
        if samplers is None:
            tokens = pick(logits)
        else:
            tokens = torch.cat([sampler(logits[i : i + 1]) for i, sampler in enumerate(samplers)])
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
