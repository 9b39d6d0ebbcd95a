"""A conversation of a user with a model: its turns, the prompt they make, the answer; and answers
to many prompts at once.

A prompt is a list of ids. Each patch of an image is a negative id there, different for every
image, so that prompts with the same beginning can share the KV cache (Decoding.reuse_prefix): a
turn costs only its new tokens, whatever was stopped, undone or dropped before.
"""

import contextlib
import itertools
import sys
from dataclasses import dataclass, field

import torch

from common.config import UserError
from common.device import pick_dtype, processor
from common.images import ImageError, to_pixels
from common.report import Sample
from inference.generate import Decoding, Sampler, Sampling, generate, generate_batch
from inference.quantized_linear import fastest_precision, for_decoding
from vision import VisionLanguageModel, open_model

TEXT_ONLY = ("this checkpoint is a text-only model; "
             "a vision_pretrain or vision_sft checkpoint takes images")
ANSWER_SHARE = 4  # at most a quarter of the context is reserved for an answer
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what the first bytes of a character decode to


def open_for_chat(name, device, precision="auto"):
    """(model, tokenizer, info) of a decoder or vision checkpoint, fast at decoding; info gains
    "parameters", their number. precision: as quantized_linear.for_decoding takes it."""
    model, tokenizer, info = open_model(name, device, kinds=("decoder", "vision"))
    info["parameters"] = sum(p.numel() for p in model.parameters())
    return ready_to_chat(model, precision), tokenizer, info


def pick_precision(device, precision):
    """What --precision=auto means in a chat: the fastest here, which a terminal is told. Scores are
    computed in what ready_to_chat takes for auto, the data type of training."""
    if precision != "auto":
        return precision
    precision = fastest_precision(device)
    if sys.stderr.isatty():  # an answer in a pipe has nothing beside it
        where = processor().instructions if device.type == "cpu" else device.type
        print(f"(decoding in {precision}, the fastest on {where}; --precision=fp32 does not round)",
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


def has_vision(model):
    return isinstance(model, VisionLanguageModel)


def decoder_of(model):
    """The decoder of a vision model; a decoder itself."""
    return model.decoder if has_vision(model) else model


# --------------------------------------------------------------------------------- one conversation


@dataclass
class EncodedImage:
    """An image as the decoder reads it, and the negative id that stands for each of its patches."""

    features: torch.Tensor  # (P, C)
    id: int = field(default_factory=itertools.count(-1, -1).__next__)


@dataclass
class Turn:
    """A question with its images, and the model's answer."""

    text: str
    images: list  # of EncodedImage
    ids: list  # of the user's turn and of the mark that the answer follows
    answer: list = field(default_factory=list)  # ids, without <|end|>


class Conversation:
    """Turns of one user with a decoder or vision model, and the Decoding that `answer` uses; what
    its cache has in common with the prompt is reused."""

    def __init__(self, model, tokenizer, decoding=None):
        self.model, self.tokenizer, self.decoding, self.turns = model, tokenizer, decoding, []
        self.context = decoder_of(model).config.max_positions

    def reset(self):
        """Forget all turns, and the cache."""
        self.turns = []
        if self.decoding:
            self.decoding.cut(0)

    def ids(self):
        """The prompt: all turns, the last one without its <|end|>."""
        ids = [self.tokenizer.end_of_text]
        for turn in self.turns:
            ids += [*turn.ids, *turn.answer, self.tokenizer.end]
        return ids[:-1] if self.turns else ids

    @torch.inference_mode()
    def embeddings(self, start=0):
        """Embeddings (1, T, C) of ids()[start:]."""
        prompt, embedding = self.ids(), decoder_of(self.model).token_embedding
        ids = torch.tensor(prompt[start:])
        x = embedding(ids.clamp_min(0).to(embedding.weight.device))
        for image in (image for turn in self.turns for image in turn.images):
            where = (ids == image.id).nonzero()[:, 0]
            # An image that is cached in part has its last patches left.
            features = image.features.repeat(prompt.count(image.id) // len(image.features), 1)
            x[where.to(x.device)] = features[len(features) - len(where) :].to(x.dtype)
        return x[None]

    def add_question(self, text, images=(), max_tokens=256):
        """Add a question with its PIL images, which `answer` then answers.

        Returns how many of the oldest turns were dropped (see truncate). UserError if the question
        alone does not fit; the conversation is unchanged then.
        """
        if images and not has_vision(self.model):
            raise UserError(TEXT_ONLY)
        features = encode_images(self.model, images) if images else []
        before = self.turns
        self.turns = [*before, self.turn(text, [EncodedImage(x) for x in features])]
        try:
            return self.truncate(max_tokens)
        except UserError:
            self.turns = before
            raise

    def turn(self, text, images, answer=()):
        """A Turn of texts and of a list of EncodedImage; texts cannot contain special tokens."""
        t = self.tokenizer
        patches = [image.id for image in images for _ in image.features]
        return Turn(text, images, [t.user, *patches, *t.encode(text), t.end, t.assistant],
                    list(answer))

    def truncate(self, max_tokens=256):
        """Drop the oldest turns until the prompt and an answer of max_tokens fit the context;
        returns how many. The images of a dropped turn move to the next one, unless a later turn has
        its own. UserError if the last turn alone does not fit."""
        n, reserved = len(self.turns), min(max_tokens, self.context // ANSWER_SHARE)
        while len(self.ids()) + reserved > self.context and len(self.turns) > 1:
            first, second, *rest = self.turns
            if not any(turn.images for turn in (second, *rest)):
                second = self.turn(second.text, first.images, second.answer)
            self.turns = [second, *rest]
        length = len(self.ids())
        if length + 1 > self.context:
            n_patches = sum(i < 0 for i in self.ids())
            raise UserError(f"this turn has {length - n_patches} tokens"
                            + (f" beside {n_patches} of its images" if n_patches else "")
                            + f", but the model's context is {self.context}; shorten it")
        return n - len(self.turns)

    def answer(self, max_tokens=256, sampler=None):
        """Yield the answer to the last question in pieces of text, as it is generated."""
        yield from self._generate(self.ids(), self.embeddings, self.tokenizer.end, max_tokens,
                                  sampler, self.turns[-1].answer)

    def ask(self, text, images=(), max_tokens=256, sampler=None):
        """add_question and answer: yields the pieces of the answer."""
        self.add_question(text, images, max_tokens)
        yield from self.answer(max_tokens, sampler)

    def continue_text(self, text, max_tokens=256, sampler=None):
        """Yield what follows `text`, as a document, not as a chat."""
        ids = [self.tokenizer.end_of_text, *self.tokenizer.encode(text)]
        if len(ids) > self.context:
            raise UserError(f"this text has {len(ids)} tokens, but the model's context is "
                            f"{self.context}; shorten it")
        yield from self._generate(
            ids, lambda start: embed(self.model, self.tokenizer, [ids[start:]]),
            self.tokenizer.end_of_text, max_tokens, sampler, [])

    def _generate(self, ids, embeddings, stop, max_tokens, sampler, answer):
        """Yield the text that follows ids; `answer` gathers its ids."""
        self.decoding = self.decoding or Decoding(decoder_of(self.model))
        sampler, detokenizer = sampler or Sampler(Sampling()), Detokenizer(self.tokenizer)
        sampler.begin(ids)
        x = embeddings(self.decoding.reuse_prefix(ids))
        for token in generate(self.decoding, x, max_tokens, stop, sampler):
            ids.append(token)
            answer.append(token)
            if piece := detokenizer.add(token):
                yield piece
        if piece := detokenizer.flush():
            yield piece


class Detokenizer:
    """Ids to text, as soon as characters are complete."""

    def __init__(self, tokenizer):
        self.tokenizer, self.pending, self.n_shown = tokenizer, [], 0

    def add(self, token):
        """The text that an id completes, perhaps none."""
        self.pending.append(token)
        text = self.tokenizer.decode(self.pending)
        complete = text.removesuffix(UNFINISHED)
        piece = complete[self.n_shown :]
        self.n_shown += len(piece)
        if text.endswith((" ", "\n")):
            self.pending, self.n_shown = [], 0
        return piece

    def flush(self):
        """The rest, if the answer ended inside a character."""
        return self.tokenizer.decode(self.pending)[self.n_shown :]


# ------------------------------------------------------------------------------------- many prompts


@torch.inference_mode()
def encode_images(model, images):
    """PIL images as the decoder reads them: (M, P, C)."""
    pixels = to_pixels(images, *model.image_spec[1:])
    return model.image_tokens(pixels.to(next(model.parameters()).device))


@torch.inference_mode()
def embed(model, tokenizer, rows, features=None):
    """Embeddings (B, T, C) of rows of ids (B lists), padded on the right.

    features: (M * P, C), of all images, for the <|image|> ids in the rows, one after the other.
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


def expand_images(model, tokenizer, ids):
    """The ids of a rendered chat as the model reads them: P times <|image|> for an image."""
    patches = model.clip_config.n_patches if has_vision(model) else 1
    return [i for token in ids for i in [token] * (patches if token == tokenizer.image else 1)]


def fits(model, tokenizer, prompt, max_tokens):
    """Whether the ids of a prompt, its images and an answer of max_tokens fit the model."""
    return len(expand_images(model, tokenizer, prompt)) + max_tokens <= model.config.max_positions


def answer_all(model, tokenizer, chats, images, max_tokens=64, batch=64, samplers=None,
               stop=None, compile=False):
    """Answers (str) to many prompts: chats as ids that end where the answer begins, one <|image|>
    for each of its PIL images. samplers: one each, or None for greedy answers; stop: the id that
    ends an answer, <|end|> if None."""
    rows = [expand_images(model, tokenizer, chat) for chat in chats]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # less padding
    slots = min(max(map(len, rows), default=0) + max_tokens, model.config.max_positions)
    decoding = Decoding(decoder_of(model), min(batch, max(1, len(rows))), slots, compile)
    found = [""] * len(rows)
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        shown = [image for i in some for image in images[i]]
        features = encode_images(model, shown).flatten(0, 1) if shown else None
        x = embed(model, tokenizer, [rows[i] for i in some], features)
        answers = generate_batch(decoding, x, [len(rows[i]) for i in some], max_tokens,
                                 stop or tokenizer.end, samplers and [samplers[i] for i in some])
        for i, answer in zip(some, answers, strict=True):
            found[i] = tokenizer.decode(answer)
    return found


def turns_of(chats, i):
    """The assistant's turns of chat i of a Chats: (the ids before it, the reference ids)."""
    ids, supervised = chats.chat(i)
    edges = (supervised[1:] != supervised[:-1]).nonzero()[0] + 1
    bounds = [*edges.tolist(), len(ids)]
    return [(ids[:a].tolist(), ids[a : b - 1].tolist())  # without <|end|>
            for a, b in zip(bounds[::2], bounds[1::2], strict=False)]


def sample_answers(model, tokenizer, chats, n=8, max_tokens=64):
    """The first turns of the first n chats that fit, with the model's answers: for a report."""
    model.eval()
    spec = getattr(model, "image_spec", None)
    turns, images = [], []
    for i in range(min(len(chats), 10 * n)):
        turn = turns_of(chats, i)[0]
        if len(turns) < n and fits(model, tokenizer, turn[0], max_tokens):
            with contextlib.suppress(ImageError):  # deleted since it was prepared
                images.append(chats.images(i, spec)[: turn[0].count(tokenizer.image)])
                turns.append(turn)
    found = answer_all(model, tokenizer, [turn[0] for turn in turns], images)
    return [Sample([*messages_in(tokenizer, prompt), ("model", answer),
                    ("reference", tokenizer.decode(reference))], shown)
            for (prompt, reference), answer, shown in zip(turns, found, images, strict=True)]


def messages_in(tokenizer, ids):
    """The turns of a rendered chat as (role, text), without its special tokens."""
    roles, turns = {i: role for role, i in tokenizer.role_ids.items()}, []
    for i in ids:
        if i in roles:
            turns.append((roles[i], []))
        elif turns and i < tokenizer.end_of_text:  # special tokens come after all others
            turns[-1][1].append(i)
    return [(role, tokenizer.decode(text)) for role, text in turns if text]


def sample_texts(model, tokenizer, texts, n=8, given=16, max_tokens=60):
    """The first tokens of n windows of a data.Text with the model's continuations: for a report."""
    model.eval()
    end, n = tokenizer.end_of_text, min(n, len(texts))
    given = min(given, texts.T // 2, model.config.max_positions // 2)
    windows = [texts.window(i * len(texts) // n).tolist() for i in range(n)]
    windows = [window[window[0] == end :] for window in windows]  # without a leading <|endoftext|>
    found = answer_all(model, tokenizer, [[end, *window[:given]] for window in windows], [[]] * n,
                       max_tokens, stop=end)
    samples = []
    for window, text in zip(windows, found, strict=True):
        reference = window[given : given + max_tokens]
        reference = reference[: reference.index(end)] if end in reference else reference
        samples.append(Sample([("beginning", tokenizer.decode(window[:given]).strip()),
                               ("model", text.strip()),
                               ("reference", tokenizer.decode(reference).strip())]))
    return samples
