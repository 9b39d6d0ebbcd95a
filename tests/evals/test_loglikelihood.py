"""evals/loglikelihood.py: the log-likelihoods that the logits of the complete texts give."""

import math

import pytest
import torch
from test_conversation import BLUE, RED, SIGHT, TOKENIZER, config, new_model, with_weights

from evals import loglikelihood
from evals.loglikelihood import Item, likelihoods
from inference.conversation import encode_images, expand_images
from model import GPT

TEXTS = ["What do you see?", "A red ring and a blue star. What do you see? A star. A ring.", "Why?",
         "A red star", "What? A blue ring and a red ring, a blue star.", "A", "Is it red or blue?"]
ANSWERS = [["yes", "no"], ["A red ring and a blue star.", "a star"], ["a", "b", "c", "d", "e"],
           [" ring"], ["a star", "A red ring", "x"], ["a blue star and a red ring. " * 2, "a"]]


def some_items(images=()):
    """Items of different lengths, with 1 to 5 answers; every other one has images."""
    found = []
    for i, text in enumerate(TEXTS):
        own = list(images[: 1 + i % 3]) if i % 2 else []
        prompt = [TOKENIZER.end_of_text, *[TOKENIZER.image] * len(own), *TOKENIZER.encode(text)]
        answers = [TOKENIZER.encode(answer) for answer in ANSWERS[i % len(ANSWERS)]]
        found.append(Item(prompt, answers, own))
    return found


@torch.no_grad()
def uncached(model, item):
    """What `likelihoods` returns of an item, each answer from the logits of its complete text."""
    decoder, found = getattr(model, "decoder", model), []
    for answer in item.answers:
        ids = torch.tensor(expand_images(model, TOKENIZER, [*item.prompt, *answer]))
        x = decoder.token_embedding(ids)
        if item.images:
            x[ids == TOKENIZER.image] = encode_images(model, item.images).flatten(0, 1)
        logits = decoder.head(decoder.hidden(x[None]))[0, -len(answer) - 1 : -1]
        wanted = torch.tensor(answer)
        nats = logits.log_softmax(-1).gather(1, wanted[:, None]).sum().item()
        found.append((nats, bool((logits.argmax(-1) == wanted).all()), len(answer)))
    return found


def flat(found):
    """(nats, greedy) of all answers to all items, as a tensor and a list."""
    nats, greedy, _ = zip(*(x for answers in found for x in answers), strict=True)
    return torch.tensor(nats), list(greedy)


def assert_equal(found, expected):
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=0)
    assert found[1] == expected[1]


@pytest.mark.parametrize("model, images", [
    (with_weights(GPT(config(256))), ()), (new_model(), ()), (new_model(), (RED, BLUE, RED)),
], ids=["text model", "without images", "with images"])
def test_likelihoods_are_those_of_the_complete_texts(model, images):
    """Whatever else is in the batch and the row."""
    items = some_items(images)
    found = likelihoods(model, TOKENIZER, items)
    assert_equal(flat(found), flat(uncached(model, item) for item in items))
    assert len(flat(found)[0].round(decimals=3).unique()) > 10  # images and texts matter
    assert [n for answers in found for *_, n in answers] == [
        len(answer) for item in items for answer in item.answers]


@pytest.mark.parametrize("batch, states", [(1, 2**20), (2, 9), (3, 1), (5, 2)])
def test_any_batch_gives_the_same_in_the_order_given(batch, states, monkeypatch):
    """However few logits are computed at a time."""
    model, items = new_model(), some_items((RED, BLUE))
    expected, order = likelihoods(model, TOKENIZER, items), [6, 2, 4, 0, 1, 5, 3]
    expected = [expected[i] for i in order]
    limit = {"cpu": states * model.decoder.config.vocab_size}
    monkeypatch.setattr(loglikelihood, "LOGITS_AT_ONCE", limit)
    found = likelihoods(model, TOKENIZER, [items[i] for i in order], batch)
    assert_equal(flat(found), flat(expected))


def test_of_equally_likely_ids_the_first_is_greedy():
    model = GPT(config(256))
    with torch.no_grad():
        model.head.weight.zero_()
    found = likelihoods(model, TOKENIZER, [Item([5, 6], [[0], [7], [0, 0], [0, 7]])])
    expected = torch.tensor([1, 1, 2, 2]) * -math.log(model.config.vocab_size)
    assert_equal(flat(found), (expected, [True, False, True, False]))


def test_rows_that_fill_the_context_and_answers_that_need_several_rows():
    model = with_weights(GPT(config(64)))
    letters = TOKENIZER.encode("abcdefgh" * 8)
    items = [Item(letters[:62], [letters[:2], letters[5:6]]),
             Item(letters[:30], [letters[:34], letters[1:35], letters[3:9]])]
    assert len(items[0].prompt) == 62
    assert_equal(flat(likelihoods(model, TOKENIZER, items)),
                 flat(uncached(model, item) for item in items))


@pytest.mark.parametrize("images, n", [([], 64), ([RED], 64 - SIGHT.n_patches)])
def test_items_longer_than_the_context_are_refused(images, n):
    """The patches of images count."""
    model, token = new_model(64), TOKENIZER.encode("a")
    prompt = [*[TOKENIZER.image] * len(images), *token * (n - 4)]
    assert likelihoods(model, TOKENIZER, [Item(prompt, [token, token * 4], images)])
    with pytest.raises(ValueError, match="do not fit the context of 64"):
        likelihoods(model, TOKENIZER, [Item(prompt, [token, token * 5], images)])
