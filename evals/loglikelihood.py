"""Log-likelihoods of given answers: many questions, each with its choices, in batches.

A question is computed once with its images. All of its answers follow in the same row, each at the
positions right after the question and masked from the others. Logits are computed only where an
answer token is predicted. Shapes: B rows, T positions, C width, N answer tokens, V vocabulary.
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

    @property
    def ids(self):
        """The input: the last id of an answer predicts nothing."""
        return self.prompt + [token for answer in self.answers for token in answer[:-1]]


@torch.inference_mode()
def likelihoods(model, tokenizer, items, batch=None):
    """[[(log-likelihood in nats, whether greedy decoding generates it, its tokens) of each answer]
    of each Item], in the order given. ValueError for an item longer than the model's context.

    batch: rows per batch; None for the default of the device.
    """
    rows, room = [], model.config.max_positions  # rows: (number of the item, the row as an Item)
    for number, item in enumerate(items):
        prompt = expand_images(model, tokenizer, item.prompt)
        if len(prompt) + max(map(len, item.answers)) > room:
            raise ValueError(f"a question of {len(prompt)} tokens and its answers do not fit the "
                             f"context of {room}")
        row = None
        for answer in item.answers:  # in further rows where they exceed the context together
            if row is None or len(row.ids) + len(answer) > room:
                row = Item(prompt, [], item.images)
                rows.append((number, row))
            row.answers.append(answer)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][1].ids))  # little padding
    found = [None] * len(rows)
    batch = batch or ROWS_AT_ONCE[decoder_of(model).token_embedding.weight.device.type]
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        results = iter(batch_likelihoods(model, tokenizer, [rows[i][1] for i in some]))
        for i in some:
            found[i] = [next(results) for _ in rows[i][1].answers]
    by_item = [[] for _ in items]
    for (number, _), result in zip(rows, found, strict=True):
        by_item[number] += result
    return by_item


def batch_likelihoods(model, tokenizer, rows):
    """What `likelihoods` returns of all answers of one batch of Items, in a single list. Here their
    prompts have P times <|image|> for an image of P patches."""
    images = [image for row in rows for image in row.images]
    features = encode_images(model, images).flatten(0, 1) if images else None
    x = embed(model, tokenizer, [row.ids for row in rows], features)  # (B, T, C)
    positions, mask, where = layout(rows, x.size(1))
    # The first tokens of all answers to a question are predicted by the same state.
    places, state_of = where.to(x.device).unique(return_inverse=True)
    decoder, answers = decoder_of(model), [answer for row in rows for answer in row.answers]
    states = decoder.hidden(x, positions.to(x.device), mask.to(x.device), where=places)
    wanted = torch.tensor([token for answer in answers for token in answer], device=x.device)
    nats, greedy = token_likelihoods(decoder, states, state_of, wanted)
    found, at = [], 0
    for answer in answers:
        here = slice(at, at + len(answer))
        found.append((sum(nats[here]), all(greedy[here]), len(answer)))
        at = here.stop
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


def token_likelihoods(decoder, states, state_of, wanted):
    """(log-likelihoods of the ids wanted (N,), whether each is the likeliest) as lists, from the
    final states (M, C). state_of (N,): which of them predicts each id."""
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
