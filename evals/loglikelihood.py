"""Log-likelihoods of given answers: many questions, each with its choices, in batches.

A question is computed once with its images. All of its answers follow in the same row, each at the
positions right after the question and masked from the others. Logits are computed only where an
answer token is predicted.

Shapes: B rows, T positions, C width, N answer tokens in a batch, V vocabulary.
"""

from dataclasses import dataclass, field

import torch

from inference.conversation import decoder_of, embed, encode_images, expand_images

# Elements of the logits at a time: 16 MB in fp32 on a CPU, where the allocator returns larger
# tensors to the system. Rows per batch: few fit a CPU's cache.
LOGITS_AT_ONCE = {"cpu": 2**22, "mps": 2**24, "cuda": 2**26}
ROWS_AT_ONCE = {"cpu": 6, "mps": 16, "cuda": 16}


@dataclass
class Item:
    """A question: the ids before its answers, one <|image|> per image, and the answers as ids."""

    prompt: list
    answers: list  # non-empty lists of ids
    images: list = field(default_factory=list)  # PIL images


@dataclass
class Likelihood:
    """The probability of one answer."""

    nats: float  # log-likelihood
    greedy: bool  # whether greedy decoding would generate it


@dataclass
class Row:
    """A question with as many of its answers as fit the context."""

    item: int  # its number
    prompt: list  # ids, with P times <|image|> per image
    answers: list
    images: list

    @property
    def ids(self):
        """The input: the last id of an answer predicts nothing."""
        return self.prompt + [token for answer in self.answers for token in answer[:-1]]


@torch.inference_mode()
def likelihoods(model, tokenizer, items, batch=None):
    """[[Likelihood of each answer] of each Item], in the order given.

    batch: rows per batch; None for the default of the device. Raises ValueError for an item longer
    than the model's context.
    """
    rows = [row for number, item in enumerate(items)
            for row in rows_of(number, item, tokenizer, model)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))  # little padding
    found = [None] * len(rows)
    batch = batch or ROWS_AT_ONCE[decoder_of(model).token_embedding.weight.device.type]
    for start in range(0, len(order), batch):
        numbers = order[start : start + batch]
        results = batch_likelihoods(model, tokenizer, [rows[i] for i in numbers])
        for i, result in zip(numbers, results, strict=True):
            found[i] = result
    by_item = [[] for _ in items]
    for row, result in zip(rows, found, strict=True):
        by_item[row.item] += result
    return by_item


def rows_of(number, item, tokenizer, model):
    """The Rows of an item: one, unless its answers together are longer than the context."""
    prompt, room = expand_images(model, tokenizer, item.prompt), model.config.max_positions
    if len(prompt) + max(map(len, item.answers)) > room:
        raise ValueError(f"a question of {len(prompt)} tokens and its answers do not fit the "
                         f"context of {room}")
    rows = [Row(number, prompt, [], item.images)]
    for answer in item.answers:
        if len(rows[-1].ids) + len(answer) > room:
            rows.append(Row(number, prompt, [], item.images))
        rows[-1].answers.append(answer)
    return rows


def batch_likelihoods(model, tokenizer, rows):
    """[[Likelihood of each answer] of each Row] of one batch."""
    images = [image for row in rows for image in row.images]
    features = encode_images(model, images).flatten(0, 1) if images else None
    x = embed(model, tokenizer, [row.ids for row in rows], features)  # (B, T, C)
    positions, mask, where = layout(rows, x.size(1))
    # The first tokens of all answers to a question are predicted by the same state.
    places, state_of = where.to(x.device).unique(return_inverse=True)
    decoder = decoder_of(model)
    states = decoder.hidden(x, positions.to(x.device), mask.to(x.device), where=places)
    wanted = [token for row in rows for answer in row.answers for token in answer]
    nats, greedy = score(decoder, states, state_of, torch.tensor(wanted, device=x.device))
    found, at = [], 0
    for row in rows:
        found.append([])
        for answer in row.answers:
            here = slice(at, at + len(answer))
            found[-1].append(Likelihood(sum(nats[here]), all(greedy[here])))
            at += len(answer)
    return found


def layout(rows, T):
    """(positions (B, T), mask (B, 1, T, T), flat places (N,) of the states that predict answers)"""
    positions = torch.zeros(len(rows), T, dtype=torch.long)
    parts = torch.full((len(rows), T), -1)  # 0: question, 1, 2 ...: answers, -1: padding
    where = []
    for b, row in enumerate(rows):
        at = n = len(row.prompt)
        positions[b, :n], parts[b, :n] = torch.arange(n), 0
        for k, answer in enumerate(row.answers, 1):
            end = at + len(answer) - 1
            positions[b, at:end], parts[b, at:end] = torch.arange(n, n + end - at), k
            where += [b * T + n - 1, *range(b * T + at, b * T + end)]
            at = end
    visible = (parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None])
    mask = visible & torch.ones(T, T, dtype=torch.bool).tril()
    return positions, mask[:, None], torch.tensor(where)


def score(decoder, states, state_of, wanted):
    """(log-likelihoods of the ids wanted (N,), whether each is the likeliest) as lists.

    states (M, C): final states; state_of (N,): which of them predicts each id.
    """
    nats = torch.empty(len(wanted), device=states.device)
    greedy = torch.empty(len(wanted), dtype=torch.bool, device=states.device)
    step = max(1, LOGITS_AT_ONCE[states.device.type] // decoder.config.vocab_size)
    for start in range(0, len(states), step):
        here = ((state_of >= start) & (state_of < start + step)).nonzero()[:, 0]
        rows, ids = state_of[here] - start, wanted[here]
        logits = decoder.head(states[start : start + step]).float()  # (step, V)
        mine, highest = logits[rows, ids], logits.amax(-1)
        # argmax is slow on a CPU and only decides which of several maxima comes first.
        best = mine == highest[rows]
        best[best.clone()] = logits[rows[best]].argmax(-1) == ids[best]
        sums = logits.sub_(highest[:, None]).exp_().sum(-1)  # in place: half of logsumexp's time
        nats[here], greedy[here] = mine - highest[rows] - sums.log()[rows], best
    return nats.tolist(), greedy.tolist()
