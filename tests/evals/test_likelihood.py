"""The claims of evals/loglikelihood.py: what the whole text's logits say of an answer, for less
work."""

import math

import pytest
import torch
from test_chat import BLUE, RED, SIGHT, TOKENIZER, config, new_model, with_weights

from evals import loglikelihood
from evals.loglikelihood import Item, likelihoods
from inference.conversation import see, spread
from model import GPT

TEXTS = ["What do you see?", "A red ring and a blue star. What do you see? A star. A ring.", "Why?",
         "A red star", "What? A blue ring and a red ring, a blue star.", "A", "Is it red or blue?"]
ANSWERS = [["yes", "no"], ["A red ring and a blue star.", "a star"], ["a", "b", "c", "d", "e"],
           [" ring"], ["a star", "A red ring", "x"], ["a blue star and a red ring. " * 2, "a"]]


def some_items(images=()):
    """Items of different lengths, with 1 to 5 answers; pictures go to every other one."""
    found = []
    for i, text in enumerate(TEXTS):
        shown = list(images[: 1 + i % 3]) if i % 2 else []
        prompt = [TOKENIZER.end_of_text, *[TOKENIZER.image] * len(shown), *TOKENIZER.encode(text)]
        answers = [TOKENIZER.encode(answer) for answer in ANSWERS[i % len(ANSWERS)]]
        found.append(Item(prompt, answers, shown))
    return found


@torch.no_grad()
def uncached(model, item):
    """[(nats, greedy)] of an item's answers, each from the logits of its whole text."""
    decoder, found = getattr(model, "decoder", model), []
    for answer in item.answers:
        ids = torch.tensor(spread(model, TOKENIZER, [*item.prompt, *answer]))
        x = decoder.token_embedding(ids)
        if item.images:
            x[ids == TOKENIZER.image] = see(model, item.images).flatten(0, 1)
        logits = decoder.head(decoder.hidden(x[None]))[0, -len(answer) - 1 : -1]
        wanted = torch.tensor(answer)
        nats = logits.log_softmax(-1).gather(1, wanted[:, None]).sum().item()
        found.append((nats, bool((logits.argmax(-1) == wanted).all())))
    return found


def pairs_of(found):
    return [[(x.nats, x.greedy) for x in some] for some in found]


def nats_of(found):
    return torch.tensor([x.nats for some in found for x in some])


# -------------------------------------------------------------------------------------- the claims


@pytest.mark.parametrize("model, images", [
    (with_weights(GPT(config(256))), ()), (new_model(), ()), (new_model(), (RED, BLUE, RED)),
], ids=["text model", "without pictures", "with pictures"])
def test_an_answer_is_as_likely_as_the_logits_of_the_whole_text_say(model, images):
    """Whatever else stands in its batch and its row."""
    items = some_items(images)
    found = pairs_of(likelihoods(model, TOKENIZER, items))
    expected = [uncached(model, item) for item in items]
    for ours, theirs in zip(found, expected, strict=True):
        assert [x[0] for x in ours] == pytest.approx([x[0] for x in theirs], abs=1e-4)
        assert [x[1] for x in ours] == [x[1] for x in theirs]
    assert len({round(nats, 3) for some in found for nats, _ in some}) > 10


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_any_batch_finds_the_same_in_the_order_given(batch):
    model, items = new_model(), some_items((RED, BLUE))
    whole = likelihoods(model, TOKENIZER, items)
    for order in list(range(7)), [6, 2, 4, 0, 1, 5, 3]:
        found = likelihoods(model, TOKENIZER, [items[i] for i in order], batch)
        expected = nats_of([whole[i] for i in order])
        torch.testing.assert_close(nats_of(found), expected, atol=1e-4, rtol=0)


def test_another_picture_makes_an_answer_likelier_or_less():
    model, prompt = new_model(), [TOKENIZER.image, *TOKENIZER.encode("What?")]
    items = [Item(prompt, [TOKENIZER.encode("a ring")], [image]) for image in (RED, BLUE, RED)]
    red, blue, again = nats_of(likelihoods(model, TOKENIZER, items)).tolist()
    assert red == pytest.approx(again, abs=1e-4) and abs(red - blue) > 0.01


def test_an_answer_is_greedy_if_greedy_decoding_says_it():
    model = new_model().decoder
    ids = [TOKENIZER.end_of_text, *TOKENIZER.encode("What do you see?")]
    said = []
    with torch.no_grad():
        for _ in range(5):
            said.append(model.logits(torch.tensor([ids + said]))[0, -1].argmax().item())
    other = [*said[:-1], said[-1] ^ 1]
    found, = likelihoods(model, TOKENIZER, [Item(ids, [said, other, said[:1], other[3:]])])
    assert [x.greedy for x in found] == [True, False, True, False]


def test_of_equally_likely_ids_greedy_decoding_says_the_first():
    model = GPT(config(256))
    with torch.no_grad():
        model.head.weight.zero_()
    found, = likelihoods(model, TOKENIZER, [Item([5, 6], [[0], [7], [0, 0], [0, 7]])])
    assert [x.greedy for x in found] == [True, False, True, False]
    assert nats_of([found]).tolist() == pytest.approx(
        [-n * math.log(model.config.vocab_size) for n in (1, 1, 2, 2)], rel=1e-5)


@pytest.mark.parametrize("states", [1, 2, 5, 9])
def test_however_few_logits_exist_at_a_time_the_answers_are_as_likely(states, monkeypatch):
    model, items = new_model(), some_items((RED, BLUE))
    whole = likelihoods(model, TOKENIZER, items)
    most = {"cpu": states * model.decoder.config.vocab_size}
    monkeypatch.setattr(loglikelihood, "LOGITS_AT_ONCE", most)
    found = likelihoods(model, TOKENIZER, items)
    torch.testing.assert_close(nats_of(found), nats_of(whole), atol=1e-4, rtol=0)
    assert [[x.greedy for x in some] for some in found] == [
        [x.greedy for x in some] for some in whole]


def test_a_row_that_fills_the_context_goes_beside_one_with_a_long_answer():
    """The positions behind its end are nobody's; and answers that do not fit together are apart."""
    model = with_weights(GPT(config(64)))
    letters = TOKENIZER.encode("abcdefgh" * 8)
    items = [Item(letters[:62], [letters[:2], letters[5:6]]),
             Item(letters[:30], [letters[:34], letters[1:35], letters[3:9]])]
    assert len(items[0].prompt) == 62
    found, expected = likelihoods(model, TOKENIZER, items), [uncached(model, i) for i in items]
    for ours, theirs in zip(found, expected, strict=True):
        assert [x.nats for x in ours] == pytest.approx([x[0] for x in theirs], abs=1e-4)


@pytest.mark.parametrize("more", [0, 1])
def test_what_is_longer_than_the_context_is_refused(more):
    model, token = with_weights(GPT(config(64))), TOKENIZER.encode("a")
    item = Item(token * 60, [token, token * (4 + more)])
    if more:
        with pytest.raises(ValueError, match="do not fit the context of 64"):
            likelihoods(model, TOKENIZER, [item])
    else:
        assert len(likelihoods(model, TOKENIZER, [item])[0]) == 2


def test_the_patches_of_pictures_count_as_context():
    model, P = new_model(64), SIGHT.n_patches
    prompt = [TOKENIZER.image, *TOKENIZER.encode("a") * (64 - P)]
    with pytest.raises(ValueError, match=f"a question of {64} tokens"):
        likelihoods(model, TOKENIZER, [Item(prompt, [[1]], [RED])])
