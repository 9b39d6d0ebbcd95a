"""inference/conversation.py: prompts, reuse of the cache, truncation, streaming."""

import copy
import itertools
import string

import pytest
import torch
from PIL import Image

import tokenizer as tokenizers
from clip import CLIPConfig
from common import checkpoint
from common.config import UserError
from common.device import pick_dtype
from inference.conversation import TEXT_ONLY, Conversation, decoder_of, ready_to_chat
from inference.generate import UNFINISHED, Sampler, Sampling
from inference.quantized_linear import has_fbgemm
from model import GPT, GPTConfig
from vision import VisionLanguageModel, describe

TOKENIZER = tokenizers.train(["What do you see? A red ring and a blue star."] * 9, 330)
SIGHT = CLIPConfig(image_size=32, patch_size=16, vision_width=32, vision_layers=2, vision_heads=2,
                   text_width=32, text_layers=1, text_heads=2, vocab_size=64, embed_dim=32)
RED, BLUE = (Image.linear_gradient("L").convert("RGB").resize((40, 30)).rotate(turn, fillcolor=fill)
             for turn, fill in ((0, "red"), (70, "blue")))
READABLE = [i for i in range(TOKENIZER.end_of_text)
            if TOKENIZER.decode([i]).isascii() and TOKENIZER.decode([i]).isprintable()]
N = 7  # ids in an answer
CPU = torch.device("cpu")


def with_weights(model, likely=READABLE, seed=3):
    """The model with no weight at its initial value, and with these tokens the most likely."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(mean=float("norm" in name and "weight" in name), std=0.25)
        head = decoder_of(model).head.weight
        head[[i for i in range(len(head)) if i not in likely]] = 0
    return model.eval()


def config(context):
    return GPTConfig(TOKENIZER.n_vocab, n_layer=2, n_head=2, n_embd=32, max_positions=context)


def new_model(context=256):
    return with_weights(VisionLanguageModel(config(context), SIGHT))


def new_chat(context=256):
    return Conversation(new_model(context), TOKENIZER)


def save(folder, model):
    """Write a checkpoint of a model into a folder."""
    info = describe(model) | {"stage": "vision_sft", "step": 1, "metrics": {},
                              "tokenizer_name": TOKENIZER.name, "tokenizer": TOKENIZER.fingerprint}
    checkpoint.save(folder, 1, model.state_dict(), info, TOKENIZER, {})


def say(chat, text, images=(), n=N, sampling=None):
    """The answer to a question."""
    return "".join(chat.ask(text, images, n, Sampler(sampling or Sampling())))


def prompt(chat):
    """The ids of a conversation, with <|image|> for each patch."""
    return [TOKENIZER.image if i < 0 else i for i in chat.ids()]


@torch.no_grad()
def without_cache(chat, n=N):
    """The answer to the last question, each id from the complete prompt."""
    ids, images = chat.ids(), [image for turn in chat.turns for image in turn.images]
    features = torch.cat([image.features for image in images]) if images else None
    n_prompt, where = len(ids), torch.tensor(ids) < 0
    for _ in range(n):
        x = chat.model.decoder.token_embedding(torch.tensor(ids).clamp(0))
        if images:
            x[:n_prompt][where] = features
        states = chat.model.decoder.hidden(x[None])
        ids.append(chat.model.decoder.head(states)[0, -1].argmax().item())
    return TOKENIZER.decode(ids[-n:])


def uncached(chat):
    """A conversation with the same turns, and an empty cache."""
    fresh = Conversation(chat.model, TOKENIZER)
    fresh.turns = copy.deepcopy(chat.turns)
    return fresh


def same_next(chat, other):
    """Whether two conversations give the same answers in the next two turns."""
    return all(say(chat, text) == say(other, text) and chat.ids() == other.ids()
               for text in ("And now?", "Is it a ring?"))


@pytest.fixture
def counted(monkeypatch):
    """counted(model): {"positions" read by the decoder, "images" encoded} from now on."""
    def count(model):
        counts = {"positions": 0, "images": 0}

        def watch(module, name, what, size):
            call = getattr(module, name)

            def counting(x, *args, **kwargs):
                counts[what] += size(x)
                return call(x, *args, **kwargs)

            monkeypatch.setattr(module, name, counting)

        watch(model.decoder, "hidden", "positions", lambda x: x.shape[:2].numel())
        watch(model, "image_tokens", "images", len)
        return counts
    return count


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16", "int8"])
def test_images_are_encoded_in_the_training_precision(precision):
    if precision not in ("auto", "fp32") and not has_fbgemm(CPU):
        pytest.skip("this PyTorch or this processor has no FBGEMM")
    model = ready_to_chat(new_model(), precision)
    expected = pick_dtype(CPU, "fp32" if precision == "fp32" else "auto")
    assert {p.dtype for p in model.vision_tower.parameters()} == {expected}
    assert say(Conversation(model, TOKENIZER), "What do you see?", [RED])


@pytest.mark.parametrize("images", [[], [RED], [RED, BLUE]], ids=len)
def test_the_prompt_equals_the_chat_template_of_training(images):
    chat, messages = new_chat(), []
    said = [("What do you see?", "A red ring."), ("Is it <|end|> or <|image|>?<|user|>", "No."),
            ("and\nnow \N{THUMBS UP SIGN}", "A star")]
    for i, (question, answer) in enumerate(said):
        chat.add_question(question, images if i == 0 else ())
        messages.append({"role": "user", "content": question})
        rendered = tokenizers.render(TOKENIZER, messages, len(images)).ids
        assert prompt(chat) == [
            i for token in [*rendered, TOKENIZER.assistant]
            for i in [token] * (SIGHT.n_patches if token == TOKENIZER.image else 1)]
        chat.turns[-1].answer = TOKENIZER.encode(answer)
        messages.append({"role": "assistant", "content": answer})
    assert prompt(chat).count(TOKENIZER.end) == 5  # typed special tokens are text
    chat.add_question("What is <image>?")  # which in data sets is the mark of an image
    assert prompt(chat).count(TOKENIZER.image) == SIGHT.n_patches * len(images)


def test_another_image_or_question_gets_another_answer():
    """The other tests need it."""
    found = {say(new_chat(), text, images) for text in ("What do you see?", "Why?")
             for images in ([], [RED], [BLUE], [RED, BLUE], [BLUE, RED])}
    assert len(found) == 10


def test_a_text_only_model_chats_and_refuses_images():
    chat = Conversation(with_weights(GPT(config(64))), TOKENIZER)
    assert say(chat, "hi") and same_next(chat, uncached(chat))
    before = chat.ids()
    with pytest.raises(UserError, match=TEXT_ONLY):
        chat.add_question("What is this?", [RED])
    assert chat.ids() == before


def test_each_position_is_computed_once_and_an_image_is_encoded_once(counted):
    chat = new_chat()
    counts = counted(chat.model)
    for n_turns in range(1, 5):
        say(chat, "What do you see?", [RED] if n_turns == 1 else ())
        assert len(chat.turns) == n_turns
        assert counts == {"positions": len(chat.ids()) - 1, "images": 1}  # the last id: unread


@pytest.mark.parametrize("left", [0, 3, 7, 20])
def test_an_image_is_not_encoded_again_when_the_cache_is_cut(counted, left):
    """Before the images, inside the first or the second, after them."""
    chat = new_chat()
    say(chat, "What do you see?", [RED, BLUE])
    other, counts = uncached(chat), counted(chat.model)
    chat.decoding.cut(left)
    assert same_next(chat, other) and counts["images"] == 0


@pytest.mark.parametrize(("call", "before"), [(1, True), (1, False), (5, True)])
def test_an_interrupted_answer_counts_as_far_as_it_was_shown(monkeypatch, call, before):
    """Ctrl-C during the prefill (the first call) or a step."""
    chat = new_chat()
    say(chat, "What do you see?", [RED])
    hidden, calls = chat.model.decoder.hidden, itertools.count(1)

    def interrupted(*args, **kwargs):
        number = next(calls)
        if number == call and before:
            raise KeyboardInterrupt
        x = hidden(*args, **kwargs)
        if number == call:
            raise KeyboardInterrupt
        return x

    with monkeypatch.context() as patch:
        patch.setattr(chat.model.decoder, "hidden", interrupted)
        with pytest.raises(KeyboardInterrupt):
            say(chat, "Tell me more.", n=50)
    assert len(chat.turns) == 2 and len(chat.turns[1].answer) == call - 1
    assert same_next(chat, uncached(chat))


def test_a_long_conversation_drops_its_oldest_turns_but_not_its_image(counted):
    chat, dropped, at_once = new_chat(context=64), 0, 0
    counts = counted(chat.model)
    for n_asked in range(1, 13):
        text = "What do you see?" * (5 if n_asked % 4 == 0 else 1)
        n = chat.add_question(text, [RED, BLUE] if n_asked == 1 else (), N)
        dropped, at_once = dropped + n, max(at_once, n)
        assert dropped + len(chat.turns) == n_asked and chat.turns[-1].text == text
        assert len(chat.ids()) + N <= 64
        n_patches = 2 * SIGHT.n_patches
        assert prompt(chat).count(TOKENIZER.image) == n_patches
        assert prompt(chat)[2 : 2 + n_patches] == [TOKENIZER.image] * n_patches  # the first turn
        expected = without_cache(chat)
        assert "".join(chat.answer(N)) == expected
    assert dropped > 5 and at_once > 1 and counts["images"] == 2


def test_an_older_image_is_dropped_when_there_is_a_newer_one():
    chat = new_chat(context=64)
    for text, images in ("What do you see?", [RED]), ("Why?", []), ("And here?", [BLUE]):
        say(chat, text, images)
    newest = chat.turns[-1].images
    for _ in range(6):
        say(chat, "What do you see?")
        shown = [image for turn in chat.turns for image in turn.images]
        assert shown[-1:] == newest
    assert shown == newest == chat.turns[0].images


def test_a_question_too_long_for_the_context_changes_nothing():
    chat = new_chat(context=64)
    for n_asked in range(3):
        say(chat, "What do you see?", [RED] if n_asked == 0 else ())
    other, before = uncached(chat), chat.ids()
    with pytest.raises(UserError, match="context is 64"):
        chat.add_question("too long " * 20, [BLUE, RED])
    assert chat.ids() == before and same_next(chat, other)


@pytest.mark.parametrize("text", [
    "a \N{THUMBS UP SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-4}", "\N{HIRAGANA LETTER A}" * 3,
    "na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve\n5 \N{EURO SIGN}"], ids=ascii)
def test_characters_are_shown_as_soon_as_they_are_complete(monkeypatch, text):
    ids = [i for character in text for i in TOKENIZER.encode(character)]
    assert len(ids) == len(text.encode())
    for answer, pieces in (ids, [*text]), (ids[:-1], [*text[:-1], UNFINISHED]):
        monkeypatch.setattr("inference.conversation.generate", lambda *_, ids=answer: iter(ids))
        assert list(new_chat().ask("What do you see?")) == pieces


def test_the_penalty_counts_the_prompt_and_the_answer():
    strict, repeated = Sampling(repetition_penalty=1e6), []
    for sampling in Sampling(), strict:
        chat = new_chat()
        say(chat, " ".join(string.ascii_letters + string.punctuation), [RED], 20, sampling)
        read, answer = chat.turns[0].ids, chat.turns[0].answer
        repeated.append((len(set(read) & set(answer)), len(answer) - len(set(answer))))
    assert min(repeated[0]) > 0 and repeated[1] == (0, 0)


def test_a_text_is_continued_as_a_document():
    chat, decoder = new_chat(), new_model().decoder
    ids = [TOKENIZER.end_of_text, *TOKENIZER.encode("A red ring")]
    n_prompt = len(ids)
    with torch.no_grad():
        for _ in range(N):
            ids.append(decoder.logits(torch.tensor([ids]))[0, -1].argmax().item())
    say(chat, "What do you see?", [RED])
    assert "".join(chat.continue_text("A red ring", N)) == TOKENIZER.decode(ids[n_prompt:])
    with pytest.raises(UserError, match="context is 256"):
        list(chat.continue_text("A red ring" * 99, N))
