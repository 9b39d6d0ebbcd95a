"""The claims of inference/conversation.py: a turn costs its own tokens, whatever was stopped,
undone or forgotten."""

import copy
import itertools
import string
import sys

import pytest
import torch
from PIL import Image

import tokenizer as tokenizers
from clip import CLIPConfig
from common import checkpoint
from common.config import UserError
from common.device import pick_dtype
from inference.conversation import (
    TEXT_ONLY,
    UNFINISHED,
    Conversation,
    pick_precision,
    ready_to_chat,
    see,
)
from inference.generate import Decoding, Sampler, Sampling, generate
from inference.quantized_linear import HalfLinear, fastest_precision
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


def with_weights(model, seed=3):
    """The model with no weight at its initial value, and with readable tokens the likeliest."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(mean=float("norm" in name and "weight" in name), std=0.25)
        decoder = model.decoder if isinstance(model, VisionLanguageModel) else model
        decoder.head.weight[[i for i in range(TOKENIZER.n_vocab) if i not in READABLE]] = 0
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


@torch.no_grad()
def uncached(chat, n, features=()):
    """The answer to what a conversation heard last, every id from the whole text."""
    ids = chat.ids()
    for _ in range(n):
        x = chat.model.decoder.token_embedding(torch.tensor(ids))
        if len(features):
            x[torch.tensor(ids) == TOKENIZER.image] = features
        states = chat.model.decoder.hidden(x[None])
        ids.append(chat.model.decoder.head(states)[0, -1].argmax().item())
    return TOKENIZER.decode(ids[-n:])


def retold(chat):
    """A conversation in which the same turns were said, with nothing of them in its memory."""
    fresh = Conversation(chat.model, TOKENIZER)
    fresh.turns = copy.deepcopy(chat.turns)
    return fresh


def same_next(chat, other, question="And now?"):
    """Whether two conversations go on alike for two more turns."""
    return all(say(chat, text) == say(other, text) and chat.ids() == other.ids()
               for text in (question, "Is it a ring?"))


def dictated(ids):
    """In place of decode.generate: these ids, whatever was asked."""
    return lambda *_: (i for i in ids)


def ids_of_characters(text):
    """The ids of a text, one for every ordinary letter and for every byte of other characters."""
    return [i for character in text for i in TOKENIZER.encode(character)]


@pytest.fixture
def counted(monkeypatch):
    """counted(model): {"positions" read by the decoder, "pictures" encoded} from now on."""
    def count(model):
        counts = {"positions": 0, "pictures": 0}
        hidden, image_tokens = model.decoder.hidden, model.image_tokens

        def counting_hidden(x, *args, **kwargs):
            counts["positions"] += x.shape[:2].numel()
            return hidden(x, *args, **kwargs)

        def counting_image_tokens(pixels):
            counts["pictures"] += len(pixels)
            return image_tokens(pixels)

        monkeypatch.setattr(model.decoder, "hidden", counting_hidden)
        monkeypatch.setattr(model, "image_tokens", counting_image_tokens)
        return counts
    return count


# ---------------------------------------------------------------------------------- its precision

CPU = torch.device("cpu")


def test_auto_is_the_fastest_precision_and_a_terminal_is_told(monkeypatch, capsys):
    fastest = fastest_precision(CPU)
    assert pick_precision(CPU, "auto") == fastest and pick_precision(CPU, "bf16") == "bf16"
    assert capsys.readouterr() == ("", "")  # an answer in a pipe has nothing beside it
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert pick_precision(CPU, "auto") == fastest and pick_precision(CPU, "fp32") == "fp32"
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"(decoding in {fastest}, ") and err.count("\n") == 1


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16", "int8"])
def test_pictures_are_seen_in_full_whatever_rounds_the_decoder(precision):
    if precision not in ("auto", "fp32") and not HalfLinear.works(CPU):
        pytest.skip("this PyTorch or this processor has no FBGEMM")
    model = ready_to_chat(new_model(), precision)
    expected = pick_dtype(CPU, "fp32" if precision == "fp32" else "auto")
    assert {p.dtype for p in model.vision_tower.parameters()} == {expected}
    assert say(Conversation(model, TOKENIZER), "What do you see?", [RED])


def test_a_seed_gives_the_same_text_at_every_start():
    precision, sampling = pick_precision(CPU, "auto"), Sampling(temperature=1.0, seed=5)
    first, again = (say(Conversation(ready_to_chat(new_model(), precision), TOKENIZER),
                        "What do you see?", [RED], sampling=sampling) for _ in range(2))
    assert first == again


# ------------------------------------------------------------------------------------ what it reads


@pytest.mark.parametrize("images", [[], [RED], [RED, BLUE]], ids=len)
def test_it_reads_what_the_chat_template_makes_of_its_messages(images):
    """Trained on one and read as another, a model would be worse than it is."""
    chat, messages = new_chat(), []
    said = [("What do you see?", "A red ring."), ("Is it <|end|> or <|image|>?<|user|>", "No."),
            ("and\nnow \N{THUMBS UP SIGN}", "A star")]
    for i, (question, answer) in enumerate(said):
        chat.hear(question, images if i == 0 else ())
        messages.append({"role": "user", "content": question})
        rendered = tokenizers.render(TOKENIZER, messages, len(images)).ids
        expected = [i for token in [*rendered, TOKENIZER.assistant]
                    for i in [token] * (SIGHT.n_patches if token == TOKENIZER.image else 1)]
        assert chat.ids() == expected
        chat.generate = dictated(TOKENIZER.encode(answer))
        assert "".join(chat.answer()) == answer
        messages.append({"role": "assistant", "content": answer})
    assert chat.ids().count(TOKENIZER.end) == 5  # what was typed is none


def test_the_mark_of_data_sets_is_text_when_somebody_types_it():
    chat = new_chat()
    chat.hear("What is <image>?", [RED])
    assert chat.ids().count(TOKENIZER.image) == SIGHT.n_patches
    assert "What is <image>?" in TOKENIZER.decode(chat.ids())


def test_it_says_what_the_model_says_that_reads_everything_at_once():
    chat = new_chat()
    features = see(chat.model, [RED, BLUE]).flatten(0, 1)
    for question, images in ("What do you see?", [RED, BLUE]), ("Is it red?", []), ("Why?", []):
        chat.hear(question, images)
        expected = uncached(chat, N, features)
        assert "".join(chat.answer(N)) == expected


def test_another_picture_or_question_gets_another_answer():
    """Or the tests here could pass with a model that reads nothing."""
    found = {say(new_chat(), text, images) for text in ("What do you see?", "Why?")
             for images in ([], [RED], [BLUE], [RED, BLUE], [BLUE, RED])}
    assert len(found) == 10


def test_a_text_model_chats_too_but_sees_nothing():
    chat = Conversation(with_weights(GPT(config(64))), TOKENIZER)
    assert say(chat, "hi") and same_next(chat, retold(chat))
    before = chat.ids()
    with pytest.raises(UserError, match="text-only") as refusal:
        chat.hear("What is this?", [RED])
    assert str(refusal.value) == TEXT_ONLY and chat.ids() == before


# ------------------------------------------------------------------------------------ what it costs


def test_every_position_is_read_once_and_a_picture_is_encoded_once(counted):
    chat = new_chat()
    counts = counted(chat.model)
    for n_turns in range(1, 5):
        say(chat, "What do you see?", [RED] if n_turns == 1 else ())
        assert len(chat.turns) == n_turns
        assert counts == {"positions": len(chat.ids()) - 1, "pictures": 1}  # the last id: unread


def test_a_turn_after_a_stop_or_an_undo_reads_only_what_is_new(counted):
    chat = new_chat()
    say(chat, "What do you see?", [RED])
    counts = counted(chat.model)
    pieces = chat.ask("Is it a ring?", max_tokens=50)
    list(itertools.islice(pieces, 3))
    pieces.close()
    chat.undo()
    before, counts["positions"] = len(chat.ids()), 0
    say(chat, "Is it a star?")
    assert counts == {"positions": len(chat.ids()) - 1 - before, "pictures": 0}


@pytest.mark.parametrize("left", [0, 1, 3, 7, 20])
def test_a_picture_is_not_encoded_again_for_a_memory_that_was_lost(counted, left):
    """Wherever the cut falls: before the pictures, inside the first or the second, behind them."""
    chat = new_chat()
    say(chat, "What do you see?", [RED, BLUE])
    other, counts = retold(chat), counted(chat.model)
    chat.decoding.cut(left)
    assert same_next(chat, other) and counts["pictures"] == 0


# ----------------------------------------------------------------------------------- what it undoes


def ahead(*args):
    """decode.generate, some tokens ahead of who takes them, as a thread may be."""
    tokens = generate(*args)
    waiting = list(itertools.islice(tokens, 3))
    for token in tokens:
        waiting.append(token)
        yield waiting.pop(0)
    yield from waiting


@pytest.mark.parametrize("generate_", [generate, ahead])
@pytest.mark.parametrize("n", range(6))
def test_an_answer_stopped_anywhere_counts_as_far_as_it_was_said(n, generate_):
    chat = Conversation(new_model(), TOKENIZER, generate=generate_)
    say(chat, "What do you see?", [RED])
    chat.hear("Tell me more.")
    pieces = chat.answer(50)
    shown = "".join(itertools.islice(pieces, n))
    pieces.close()
    assert TOKENIZER.decode(chat.turns[-1].answer).startswith(shown)
    assert len(chat.turns[-1].answer) == n
    assert same_next(chat, retold(chat))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("call", [1, 2, 5])
def test_an_answer_broken_off_inside_the_model_loses_nothing(monkeypatch, call, before):
    """Ctrl-C comes while the question is read (the first call) or a token is made."""
    chat = new_chat()
    say(chat, "What do you see?", [RED])
    hidden, calls = chat.model.decoder.hidden, itertools.count(1)

    def breaking(*args, **kwargs):
        number = next(calls)
        if number == call and before:
            raise KeyboardInterrupt
        x = hidden(*args, **kwargs)
        if number == call:
            raise KeyboardInterrupt
        return x

    with monkeypatch.context() as patch:
        patch.setattr(chat.model.decoder, "hidden", breaking)
        with pytest.raises(KeyboardInterrupt):
            say(chat, "Tell me more.", n=50)
    assert len(chat.turns) == 2 and len(chat.turns[1].answer) == call - 1
    assert same_next(chat, retold(chat))


def test_a_question_taken_back_was_never_asked():
    chat, other = new_chat(), new_chat()
    for one in chat, other:
        say(one, "What do you see?", [RED])
    say(chat, "Is it a ring?")
    say(chat, "Why?")
    assert chat.undo() and chat.undo() and same_next(chat, other)
    assert [chat.undo() for _ in range(4)] == [True, True, True, False]
    assert say(chat, "What do you see?", [BLUE]) == say(new_chat(), "What do you see?", [BLUE])


def test_starting_over_is_a_new_conversation():
    chat = new_chat()
    say(chat, "What do you see?", [RED])
    chat.reset()
    assert same_next(chat, new_chat())


# ---------------------------------------------------------------------------------- what it forgets


def test_a_long_conversation_forgets_its_oldest_turns_and_says_how_many(counted):
    chat, forgotten, at_once = new_chat(context=64), 0, 0
    features, counts = see(chat.model, [RED])[0], counted(chat.model)
    for n_asked in range(1, 13):
        text = "What do you see?" * (5 if n_asked % 4 == 0 else 1)
        n = chat.hear(text, [RED] if n_asked == 1 else (), N)
        forgotten, at_once = forgotten + n, max(at_once, n)
        assert forgotten + len(chat.turns) == n_asked and chat.turns[-1].text == text
        assert len(chat.ids()) + N < 64
        assert chat.ids().count(TOKENIZER.image) == SIGHT.n_patches  # the picture stays
        assert chat.ids()[2] == TOKENIZER.image  # in the first turn
        other, expected = retold(chat), uncached(chat, N, features)
        assert "".join(chat.answer(N)) == "".join(other.answer(N)) == expected
    assert forgotten > 5 and at_once > 1 and counts["pictures"] == 1


def test_an_older_picture_goes_once_there_is_a_newer_one():
    chat, texts = new_chat(context=64), ["What do you see?", "Why?", "And here?", "Is it a ring?"]
    newest = see(chat.model, [BLUE])[0]
    for text, images in zip(texts, ([RED], [], [BLUE], []), strict=True):
        say(chat, text, images)
    while chat.turns[0].text != "Is it a ring?":
        chat.hear("What do you see?", max_tokens=N)
        assert same_next(retold(chat), retold(chat))
        shown = [x for turn in chat.turns for x in turn.features]
        assert len(shown) <= 2 and torch.equal(shown[-1], newest)
        assert len(shown) == 1 or chat.turns[0].text == texts[0]
        "".join(chat.answer(N))
    assert torch.equal(chat.turns[0].features[0], newest)


@pytest.mark.parametrize("images", [[], [BLUE, RED]], ids=["", "with pictures"])
def test_a_turn_too_long_for_the_context_is_refused_and_leaves_no_trace(images):
    chat, other = new_chat(context=64), new_chat(context=64)
    for one in chat, other:
        for n_asked in range(3):
            say(one, "What do you see?", [RED] if n_asked == 0 else ())
    before = chat.ids()
    with pytest.raises(UserError, match="shorten it"):
        chat.hear("too long " * 20, images)
    assert chat.ids() == before and same_next(chat, other)


def test_an_answer_ends_where_the_context_ends():
    chat = new_chat(context=64)
    say(chat, "What do you see?", n=1000)
    assert chat.decoding.room() == 0 and chat.decoding.length() == 64
    assert len(chat.ids()) == 65  # the last one is said, not read
    other = retold(chat)
    n = chat.hear("And now?", max_tokens=N)
    assert n == other.hear("And now?", max_tokens=N) == 1
    assert "".join(chat.answer(N)) == "".join(other.answer(N))


# ------------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize("text", [
    "a \N{THUMBS UP SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-4} b", "\N{HIRAGANA LETTER A}" * 3,
    "na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve\n\N{EURO SIGN} 5", "plain"], ids=ascii)
def test_a_character_is_shown_as_soon_as_it_is_whole_and_never_in_halves(text):
    ids = ids_of_characters(text)
    assert len(ids) == len(text.encode("utf-8"))
    chat = Conversation(new_model(), TOKENIZER, generate=dictated(ids))
    assert list(chat.ask("Say it.")) == list(text)


@pytest.mark.parametrize("text", ["5 \N{EURO SIGN}", "5 \N{THUMBS UP SIGN}"], ids=ascii)
def test_an_answer_that_ends_inside_a_character_shows_what_its_ids_say(text):
    """As max_tokens may end it: what is shown is what a file of answers has."""
    ids = ids_of_characters(text)[:-1]
    chat = Conversation(new_model(), TOKENIZER, generate=dictated(ids))
    assert "".join(chat.ask("Say it.")) == TOKENIZER.decode(ids) == f"5 {UNFINISHED}"


def test_a_model_that_says_the_mark_of_a_picture_shows_none():
    """The next turn goes on, in the same memory or in a new one, with the one picture there is."""
    chat = new_chat()
    chat.generate = dictated([READABLE[0], TOKENIZER.image, READABLE[1]])
    say(chat, "What is that?", [RED])
    chat.generate = generate
    other = retold(chat)
    assert say(chat, "And now?") == say(other, "And now?") == uncached_last(chat)


def uncached_last(chat):
    """The last answer once more, every id from the whole text, the picture where it was shown."""
    chat = retold(chat)
    chat.turns[-1].answer = []
    features = torch.cat(chat.turns[0].features)
    ids = chat.ids()
    for _ in range(N):
        x = chat.model.decoder.token_embedding(torch.tensor(ids)).detach()
        x[2 : 2 + len(features)] = features
        states = chat.model.decoder.hidden(x[None])
        ids.append(chat.model.decoder.head(states)[0, -1].argmax().item())
    return TOKENIZER.decode(ids[-N:])


def test_the_same_seed_says_the_same():
    texts = [tuple(say(chat, text, n=20, sampling=Sampling(temperature=1.0, seed=seed))
                   for text in ("What do you see?", "Why?"))
             for seed in (5, 5, 6) for chat in [new_chat()]]
    assert texts[0] == texts[1] != texts[2]


def test_the_penalty_counts_what_was_read_and_said():
    strict, again = Sampling(repetition_penalty=1e6), []
    for sampling in Sampling(), strict:
        chat = new_chat()
        say(chat, " ".join(string.ascii_letters + string.punctuation), [RED], 20, sampling)
        read, answer = chat.turns[0].asked, chat.turns[0].answer
        again.append((len(set(read) & set(answer)), len(answer) - len(set(answer))))
    assert min(again[0]) > 0 and again[1] == (0, 0)


def test_a_text_is_continued_as_a_document():
    chat, decoder = new_chat(), new_model().decoder
    ids = [TOKENIZER.end_of_text, *TOKENIZER.encode("A red ring")]
    n_prompt = len(ids)
    with torch.no_grad():
        for _ in range(N):
            ids.append(decoder.logits(torch.tensor([ids]))[0, -1].argmax().item())
    say(chat, "What do you see?", [RED])
    assert "".join(chat.continue_text("A red ring", N)) == TOKENIZER.decode(ids[n_prompt:])
    assert chat.turns == [] and chat.decoding.length() == 0
    with pytest.raises(UserError, match="shorten it"):
        list(chat.continue_text("A red ring" * 99, N))


def test_conversations_in_the_rows_of_one_memory_do_not_meet():
    model = new_model()
    decoding = Decoding(model.decoder, rows=2)
    chats = [Conversation(model, TOKENIZER, decoding) for _ in range(2)]
    chats[1].row = 1
    alone = [new_chat(), new_chat()]
    for text in "What do you see?", "Why?", "Is it a ring?":
        for i, image in enumerate((RED, BLUE)):
            images = [image] if not chats[i].turns else []
            assert say(chats[i], text * (i + 1), images) == say(alone[i], text * (i + 1), images)
