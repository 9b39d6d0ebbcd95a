"""How likely a model finds given continuations: many questions, each with its answers, in batches.

A question is read once, with its picture, and its answers stand behind it in the same row, each at
the positions right behind the question and hidden from the others. Logits exist only where an
answer is predicted.

Letters for shapes: B rows, T positions, C width, N answer tokens in a batch, V vocabulary.
"""

from dataclasses import dataclass, field

import torch

from inference.conversation import decoder_of, embed, see, spread

# Elements of the logits that exist at a time: 16 MB in fp32 on a CPU, where larger tensors come in
# memory that the system has to give anew. Rows read together: few find room in a CPU's cache.
LOGITS_AT_ONCE = {"cpu": 2**22, "mps": 2**24, "cuda": 2**26}
ROWS_AT_ONCE = {"cpu": 6, "mps": 16, "cuda": 16}


@dataclass
class Item:
    """A question: ids that its answers follow, one <|image|> a picture, and the answers as ids."""

    prompt: list
    answers: list  # lists of ids, none of them empty
    images: list = field(default_factory=list)  # PIL pictures


@dataclass
class Likelihood:
    """What a model thinks of one answer."""

    nats: float  # log-likelihood
    greedy: bool  # whether greedy decoding would say it


@dataclass
class Row:
    """A question with as many of its answers as the context has room for."""

    item: int  # its number
    prompt: list  # ids, P times <|image|> for a picture
    answers: list
    images: list

    @property
    def ids(self):
        """What the model reads: nothing follows the last id of an answer."""
        return self.prompt + [token for answer in self.answers for token in answer[:-1]]


@torch.inference_mode()
def likelihoods(model, tokenizer, items, batch=None):
    """[[Likelihood of each answer] of each Item], in the order given.

    batch: rows read together; None for what suits the device. Raises ValueError for an item that
    is longer than the model's context.
    """
    rows = [row for number, item in enumerate(items)
            for row in rows_of(number, item, tokenizer, model)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))  # alike lengths together
    found = [None] * len(rows)
    batch = batch or ROWS_AT_ONCE[decoder_of(model).token_embedding.weight.device.type]
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        for i, part in zip(some, read(model, tokenizer, [rows[i] for i in some]), strict=True):
            found[i] = part
    together = [[] for _ in items]
    for row, part in zip(rows, found, strict=True):
        together[row.item] += part
    return together


def rows_of(number, item, tokenizer, model):
    """The Rows of an item: one, unless its answers together are longer than the context."""
    prompt, room = spread(model, tokenizer, item.prompt), model.config.max_positions
    if len(prompt) + max(map(len, item.answers)) > room:
        raise ValueError(f"a question of {len(prompt)} tokens and its answers do not fit the "
                         f"context of {room}")
    rows = [Row(number, prompt, [], item.images)]
    for answer in item.answers:
        if len(rows[-1].ids) + len(answer) > room:
            rows.append(Row(number, prompt, [], item.images))
        rows[-1].answers.append(answer)
    return rows


def read(model, tokenizer, rows):
    """The likelihoods of one batch."""
    decoder, ids = decoder_of(model), [row.ids for row in rows]
    pictures = [picture for row in rows for picture in row.images]
    features = see(model, pictures).flatten(0, 1) if pictures else None
    x = embed(model, tokenizer, ids, features)  # (B, T, C)
    positions, mask, where = layout(rows, x.size(1))
    places, state_of = where.to(x.device).unique(return_inverse=True)  # answers begin at one place
    states = decoder.hidden(x, positions.to(x.device), mask.to(x.device), where=places)
    wanted = [token for row in rows for answer in row.answers for token in answer]
    nats, right = score(decoder, states, state_of, torch.tensor(wanted, device=x.device))
    found, at = [], 0
    for row in rows:
        found.append([])
        for answer in row.answers:
            here = slice(at, at + len(answer))
            found[-1].append(Likelihood(sum(nats[here]), all(right[here])))
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
    seen = (parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None])
    return positions, (seen & torch.ones(T, T, dtype=torch.bool).tril())[:, None], torch.tensor(
        where)


def score(decoder, states, state_of, wanted):
    """(log-likelihoods of the ids wanted (N,), whether each is the likeliest) as lists.

    states (M, C): final states; state_of (N,): which of them predicts each id.
    """
    nats = torch.empty(len(wanted), device=states.device)
    right = torch.empty(len(wanted), dtype=torch.bool, device=states.device)
    step = max(1, LOGITS_AT_ONCE[states.device.type] // decoder.config.vocab_size)
    for start in range(0, len(states), step):
        here = ((state_of >= start) & (state_of < start + step)).nonzero()[:, 0]
        rows, ids = state_of[here] - start, wanted[here]
        logits = decoder.head(states[start : start + step]).float()  # (step, V)
        mine, highest = logits[rows, ids], logits.amax(-1)
        # argmax is slow on a CPU, and only decides which of several highest comes first.
        best = mine == highest[rows]
        best[best.clone()] = logits[rows[best]].argmax(-1) == ids[best]
        sums = logits.sub_(highest[:, None]).exp_().sum(-1)  # in place: half of logsumexp's time
        nats[here], right[here] = mine - highest[rows] - sums.log()[rows], best
    return nats.tolist(), right.tolist()
