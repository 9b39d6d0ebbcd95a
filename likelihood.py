"""How likely a model finds given continuations: many questions, each with its answers, in batches.

A question is read once, with its picture, into a KV cache; every answer then costs its own tokens
only, and logits exist only where an answer is predicted.

Letters for shapes: B questions, T positions, C width, N answer tokens in a batch, V vocabulary.
"""

from dataclasses import dataclass, field

import torch

from chat import decoder_of, embed, see, spread
from model import KVCache


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


@torch.inference_mode()
def likelihoods(model, tokenizer, items, batch=16, done=None):
    """[[Likelihood of each answer] of each Item], in the order given.

    batch: questions read together; done(n) is called with how many are finished. Raises ValueError
    for an item that is longer than the model's context.
    """
    prompts = [spread(model, tokenizer, item.prompt) for item in items]
    for prompt, item in zip(prompts, items, strict=True):
        if len(prompt) + max(map(len, item.answers)) > model.config.max_positions:
            raise ValueError(f"a question of {len(prompt)} tokens and its answers do not fit the "
                             f"context of {model.config.max_positions}")
    order = sorted(range(len(items)), key=lambda i: len(prompts[i]))  # alike lengths together
    found = [None] * len(items)
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        part = read(model, tokenizer, [prompts[i] for i in some], [items[i] for i in some])
        for i, answers in zip(some, part, strict=True):
            found[i] = answers
        if done:
            done(len(some))
    return found


def read(model, tokenizer, prompts, items):
    """The likelihoods of one batch."""
    decoder, lengths = decoder_of(model), list(map(len, prompts))
    pictures = [picture for item in items for picture in item.images]
    features = see(model, pictures).flatten(0, 1) if pictures else None
    longest = max(len(answer) for item in items for answer in item.answers)
    cache = KVCache(decoder, len(items), max(lengths) + longest)
    x = decoder.hidden(embed(model, tokenizer, prompts, features), cache=cache)
    rows = torch.arange(len(items), device=x.device)
    last = x[rows, torch.tensor(lengths, device=x.device) - 1]  # predicts each answer's first id
    found = [[] for _ in items]
    for k in range(max(len(item.answers) for item in items)):
        cache.lengths = list(lengths)
        answers = [item.answers[k] if k < len(item.answers) else item.answers[0] for item in items]
        for row, result in enumerate(score(model, tokenizer, answers, last, cache)):
            if k < len(items[row].answers):
                found[row].append(result)
    return found


def score(model, tokenizer, answers, last, cache):
    """Likelihoods of one answer (ids) to each question that a cache holds; last (B, C): the states
    behind the questions."""
    decoder, states = decoder_of(model), last[:, None]
    if max(map(len, answers)) > 1:
        known = [answer[:-1] or [tokenizer.end_of_text] for answer in answers]
        x = decoder.hidden(embed(model, tokenizer, known), cache=cache)
        states = torch.cat((states, x), dim=1)  # (B, T, C)
    rows = [row for row, answer in enumerate(answers) for _ in answer]
    columns = [i for answer in answers for i in range(len(answer))]
    wanted = torch.tensor([token for answer in answers for token in answer], device=last.device)
    logits = decoder.head(states[rows, columns]).float()  # (N, V)
    nats = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].tolist()
    right = (logits.argmax(-1) == wanted).tolist()
    found, at = [], 0
    for answer in answers:
        here = slice(at, at + len(answer))
        found.append(Likelihood(sum(nats[here]), all(right[here])))
        at += len(answer)
    return found
