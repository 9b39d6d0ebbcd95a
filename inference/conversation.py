"""A conversation with a model: its turns, its pictures, its cache; and many questions at once.

One Conversation belongs to one user. What was said and seen stays in a row of a KV cache, so a turn
costs only its own tokens, and a picture is encoded once.
"""

import contextlib
import sys
from dataclasses import dataclass, field

import torch

from common.config import UserError
from common.device import pick_dtype, processor
from common.images import ImageError, to_pixels
from common.report import Sample
from inference.generate import Decoding, Sampler, Sampling, generate_batch
from inference.generate import generate as generate_one
from inference.quantized_linear import fastest_precision, for_decoding
from vision import VisionLanguageModel, open_model

TEXT_ONLY = ("this checkpoint is text-only; "
         "a vision_pretrain or vision_sft checkpoint takes pictures")
ANSWER_ROOM = 4  # an answer may count on so much of the context: a quarter
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what the first bytes of a character decode to


def open_for_chat(name, device, precision="auto"):
    """(model, tokenizer, info) of a decoder or vision checkpoint, made fast at decoding; info
    gains "parameters", their number. precision: as linears.for_decoding takes it."""
    model, tokenizer, info = open_model(name, device, kinds=("decoder", "vision"))
    info["parameters"] = sum(p.numel() for p in model.parameters())
    return ready_to_chat(model, precision), tokenizer, info


def pick_precision(device, precision):
    """What --precision=auto means where somebody chats: the fastest here, which a terminal is told.

    Scores are made in what ready_to_chat takes for auto, the type of training.
    """
    if precision != "auto":
        return precision
    precision = fastest_precision(device)
    if sys.stderr.isatty():  # an answer in a pipe has nothing beside it
        where = processor().instructions if device.type == "cpu" else device.type
        print(f"(decoding in {precision}, the fastest on {where}; --precision=fp32 rounds nothing)",
              file=sys.stderr)
    return precision


def ready_to_chat(model, precision="auto"):
    """A decoder or vision model, made fast at decoding in place. On a CPU its vision encoder is in
    fp32 or in the type of training, as only a decoder has weights of 8 or 16 bits there."""
    decoder = for_decoding(decoder_of(model), precision)
    if model is not decoder:
        device = decoder.token_embedding.weight.device
        same = device.type != "cpu" or precision == "fp32"
        dtype = pick_dtype(device, precision if same else "auto")
        model.vision_tower.to(dtype)
        model.projector.to(dtype)
    return model.eval()


def decoder_of(model):
    """The decoder of a vision model; a decoder itself."""
    return model.decoder if isinstance(model, VisionLanguageModel) else model


@dataclass
class Turn:
    """What a user said and showed, and what the model answered."""

    text: str
    asked: list  # the ids of the user's turn and of the mark that the answer follows
    features: list = field(default_factory=list)  # the pictures as the decoder reads them, (P, C)
    answer: list = field(default_factory=list)  # ids, without <|end|>


class Conversation:
    """Turns of one user with a decoder or vision model.

    What the cache holds is a beginning of `ids()`; whatever is missing is read before an answer. So
    turns can be taken back, an answer stopped anywhere and the row lost without losing anything.

    decoding, row: the memory to use; generate: generate.generate, or what does the same elsewhere.
    """

    def __init__(self, model, tokenizer, decoding=None, generate=None):
        self.model, self.tokenizer = model, tokenizer
        self.sees = isinstance(model, VisionLanguageModel)
        self.decoding = decoding or Decoding(decoder_of(model))
        self.generate = generate or generate_one
        self.row, self.turns = 0, []

    def reset(self):
        """Forget everything said and seen."""
        self.turns = []
        self.decoding.cut(0, self.row)

    def undo(self):
        """Take the last turn back; says whether there was one."""
        if not self.turns:
            return False
        self.turns.pop()
        self.decoding.cut(len(self.ids()), self.row)
        return True

    def ids(self):
        """Everything said, as the model reads it: an image is P times <|image|>."""
        ids = [self.tokenizer.end_of_text]
        for i, turn in enumerate(self.turns):
            ids += turn.asked
            ids += turn.answer
            ids += [self.tokenizer.end] if i < len(self.turns) - 1 else []
        return ids

    def hear(self, text, images=(), max_tokens=256):
        """Add the user's turn, of `text` and PIL `images`; `answer` then answers it.

        Returns how many of the oldest turns had to be forgotten so that this one and an answer of
        max_tokens fit the model's context. The picture in use is never forgotten: it moves to the
        first turn that stays. Raises UserError if the turn alone does not fit.
        """
        if images and not self.sees:
            raise UserError(TEXT_ONLY)
        features = list(see(self.model, images)) if images else []
        turns = [*self.turns, Turn(text, self._asked(text, features), features)]
        room = self.decoding.slots
        answer_room, n_forgotten = min(max_tokens, room // ANSWER_ROOM), 0
        while self._length(turns) + answer_room > room and len(turns) > 1:
            turns = self._without_oldest(turns)
            n_forgotten += 1
        if self._length(turns) + 1 > room:
            pictures = sum(len(x) for turn in turns for x in turn.features)
            raise UserError(
                f"this turn has {self._length(turns) - pictures} tokens"
                + (f" beside {pictures} of its pictures" if pictures else "")
                + f", but the model's context is {room}; shorten it")
        if n_forgotten:
            self.decoding.cut(1, self.row)
        self.turns = turns
        return n_forgotten

    def answer(self, max_tokens=256, sampler=None):
        """Yield the answer to what was heard last in pieces of text, as they are made."""
        ids, turn = self.ids(), self.turns[-1]
        sampler = sampler or Sampler(Sampling())
        sampler.begin(ids)
        embeddings = self._embeddings(ids, self.decoding.length(self.row))
        try:
            tokens = self.generate(self.decoding, embeddings, max_tokens, self.tokenizer.end,
                                   sampler, self.row)
            with contextlib.closing(tokens):
                yield from self._pieces(tokens, turn.answer)
        finally:  # stopped or not: what the cache holds beyond what was taken does not count
            self.decoding.cut(len(ids) + len(turn.answer), self.row)

    def ask(self, text, images=(), max_tokens=256, sampler=None):
        """hear and answer: yields the pieces of the answer."""
        self.hear(text, images, max_tokens)
        yield from self.answer(max_tokens, sampler)

    def continue_text(self, text, max_tokens=256, sampler=None):
        """Yield what follows `text`, as a document, not as a chat."""
        self.reset()
        ids = [self.tokenizer.end_of_text, *self.tokenizer.encode(text)]
        room = self.decoding.room(self.row)
        if len(ids) > room:
            raise UserError(f"this text has {len(ids)} tokens, but the model's context is {room}; "
                            "shorten it")
        sampler = sampler or Sampler(Sampling())
        sampler.begin(ids)
        embeddings = embed(self.model, self.tokenizer, [ids])
        tokens = self.generate(self.decoding, embeddings, max_tokens, self.tokenizer.end_of_text,
                               sampler, self.row)
        yield from self._pieces(tokens, [])
        self.reset()

    @torch.inference_mode()
    def _embeddings(self, ids, start):
        """Embeddings (1, T, C) of `ids` from `start` on, pictures among them."""
        x = embed(self.model, self.tokenizer, [ids[start:]])
        at = 1
        for turn in self.turns:  # by place, not by id: a model may say <|image|>, and it shows none
            for i, part in enumerate(turn.features):
                first = at + 1 + i * len(part) - start
                left = part[max(0, -first) :]  # what is not in the memory yet
                x[0, first + len(part) - len(left) : first + len(part)] = left.to(x.dtype)
            at += len(turn.asked) + len(turn.answer) + 1
        return x

    def _asked(self, text, features):
        t = self.tokenizer
        images = [t.image] * sum(map(len, features))
        return [t.user, *images, *t.encode(text), t.end, t.assistant]

    def _length(self, turns):
        return sum(len(turn.asked) + len(turn.answer) + 1 for turn in turns)

    def _without_oldest(self, turns):
        """The turns but the first, whose pictures the next takes over if it has none and no later
        turn shows any."""
        first, second, *rest = turns
        if first.features and not any(turn.features for turn in (second, *rest)):
            second = Turn(second.text, self._asked(second.text, first.features), first.features,
                          second.answer)
        return [second, *rest]

    def _pieces(self, tokens, said):
        """Ids to text, as soon as it is whole characters; `said` gathers the ids."""
        pending, shown, text = [], "", ""
        for token in tokens:
            said.append(token)
            pending.append(token)
            text = self.tokenizer.decode(pending)
            whole = text.removesuffix(UNFINISHED)  # a character that is still in parts is one mark
            if len(whole) > len(shown):
                yield whole[len(shown):]
                shown = whole
            if text.endswith((" ", "\n")):
                pending, shown, text = [], "", ""
        if len(text) > len(shown):  # it ended inside a character
            yield text[len(shown):]


@torch.inference_mode()
def see(model, images):
    """PIL images as the decoder reads them: (M, P, C)."""
    pixels = to_pixels(images, *model.image_spec[1:])
    return model.image_tokens(pixels.to(next(model.parameters()).device))


@torch.inference_mode()
def embed(model, tokenizer, rows, features=None):
    """Embeddings (B, T, C) of rows of ids (B lists), padded on the right.

    features: (M * P, C), of all pictures, for the <|image|> ids in the rows, one after the other.
    """
    embedding = decoder_of(model).token_embedding
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.end_of_text)
    for row, some in zip(ids, rows, strict=True):
        row[: len(some)] = torch.tensor(some)
    ids = ids.to(embedding.weight.device)
    x = embedding(ids)
    if features is not None:
        x[ids == tokenizer.image] = features.to(x.dtype)
    return x


def spread(model, tokenizer, ids):
    """The ids of a rendered chat as the model reads them: P times <|image|> for a picture."""
    patches = model.clip_config.n_patches if isinstance(model, VisionLanguageModel) else 1
    return [i for token in ids for i in [token] * (patches if token == tokenizer.image else 1)]


def answer_all(model, tokenizer, chats, images, max_tokens=64, batch=64, samplers=None,
               stop=None, compile=False):
    """Answers (str) to many prompts: chats as ids that end where the answer begins, one <|image|>
    for each of its PIL pictures in images. samplers: one each, or None for greedy answers; stop:
    the id that ends an answer, <|end|> if None."""
    rows = [spread(model, tokenizer, chat) for chat in chats]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # alike lengths, little padding
    slots = min(max(map(len, rows), default=0) + max_tokens, model.config.max_positions)
    decoding = Decoding(decoder_of(model), min(batch, max(1, len(rows))), slots, compile)
    found = [""] * len(rows)
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        pictures = [picture for i in some for picture in images[i]]
        features = see(model, pictures).flatten(0, 1) if pictures else None
        x = embed(model, tokenizer, [rows[i] for i in some], features)
        answers = generate_batch(decoding, x, [len(rows[i]) for i in some], max_tokens,
                                 stop or tokenizer.end, samplers and [samplers[i] for i in some])
        for i, answer in zip(some, answers, strict=True):
            found[i] = tokenizer.decode(answer)
    return found


def turns_of(chats, i):
    """The assistant's turns of chat i of a Chats: (the ids before it, the ids it should say)."""
    ids, supervised = chats.chat(i)
    edges = (supervised[1:] != supervised[:-1]).nonzero()[0] + 1
    bounds = [*edges.tolist(), len(ids)]
    return [(ids[:a].tolist(), ids[a : b - 1].tolist())  # without <|end|>
            for a, b in zip(bounds[::2], bounds[1::2], strict=False)]


def fits(model, tokenizer, prompt, max_tokens):
    """Whether the ids of a prompt, its pictures and an answer of max_tokens fit the model."""
    return len(spread(model, tokenizer, prompt)) + max_tokens <= model.config.max_positions


def sample_answers(model, tokenizer, chats, n=8, max_tokens=64):
    """The first turns of the first n chats that fit, with the model's answers: for a report."""
    model.eval()
    spec = getattr(model, "image_spec", None)
    turns, images = [], []
    for i in range(min(len(chats), 10 * n)):
        turn = turns_of(chats, i)[0]
        if len(turns) < n and fits(model, tokenizer, turn[0], max_tokens):
            with contextlib.suppress(ImageError):  # gone since it was prepared
                images.append(chats.images(i, spec)[: turn[0].count(tokenizer.image)])
                turns.append(turn)
    found = answer_all(model, tokenizer, [turn[0] for turn in turns], images)
    return [Sample([*spoken(tokenizer, prompt), ("model", answer),
                    ("reference", tokenizer.decode(right))], shown)
            for (prompt, right), answer, shown in zip(turns, found, images, strict=True)]


def spoken(tokenizer, ids):
    """The turns of a rendered chat as (role, text), without its special tokens."""
    roles, turns = {i: role for role, i in tokenizer.role_ids.items()}, []
    for i in ids:
        if i in roles:
            turns.append((roles[i], []))
        elif turns and i < tokenizer.end_of_text:  # special tokens come after all others
            turns[-1][1].append(i)
    return [(role, tokenizer.decode(said)) for role, said in turns if said]


def sample_texts(model, tokenizer, texts, n=8, given=16, max_tokens=60):
    """Beginnings of n windows of a data.Text with the model's continuations: for a report."""
    model.eval()
    end, n = tokenizer.end_of_text, min(n, len(texts))
    given = min(given, texts.T // 2, model.config.max_positions // 2)
    windows = [texts.window(i * len(texts) // n).tolist() for i in range(n)]
    windows = [window[window[0] == end :] for window in windows]  # the mark of a beginning
    found = answer_all(model, tokenizer, [[end, *window[:given]] for window in windows], [[]] * n,
                       max_tokens, stop=end)
    rights = [window[given : given + max_tokens] for window in windows]
    rights = [right[: right.index(end)] if end in right else right for right in rights]
    return [Sample([("beginning", tokenizer.decode(window[:given]).strip()),
                    ("model", text.strip()), ("reference", tokenizer.decode(right).strip())])
            for window, text, right in zip(windows, found, rights, strict=True)]
