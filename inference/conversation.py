"""Conversations with a model, and answers to many prompts at once.

A prompt is a list of ids, with a negative id, different for each image, for every image patch: so a
common prefix of prompts stays in the KV cache (Decoding.reuse_prefix), and a turn costs only its
new tokens, even after an answer was stopped, or a question removed.
"""

import itertools
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence

from common.config import UserError
from common.device import pick_dtype
from common.images import to_pixels
from inference.generate import UNFINISHED, Decoding, Sampler, Sampling, generate, generate_batch
from inference.quantized_linear import for_decoding
from tokenizer import END_OF_TEXT
from vision import VisionLanguageModel, open_model

TEXT_ONLY = ("this checkpoint is a text-only model; "
             "a vision_pretrain or vision_sft checkpoint takes images")


def open_for_chat(name, device, precision="auto"):
    """(model, tokenizer, info) of a decoder or vision checkpoint; info gains the number of
    "parameters". precision: see quantized_linear.for_decoding."""
    model, tokenizer, info = open_model(name, device, kinds=("decoder", "vision"))
    info["parameters"] = sum(p.numel() for p in model.parameters())
    return ready_to_chat(model, precision), tokenizer, info


def ready_to_chat(model, precision="auto"):
    """Make a decoder or vision model fast at decoding, in place. The vision encoder is not
    quantized: it runs in fp32 or the training precision."""
    decoder = for_decoding(decoder_of(model), precision)
    if model is not decoder:
        dtype = pick_dtype(decoder.token_embedding.weight.device,
                           "fp32" if precision == "fp32" else "auto")
        model.vision_tower.to(dtype)
        model.projector.to(dtype)
    return model.eval()


def has_vision(model):
    return isinstance(model, VisionLanguageModel)


def decoder_of(model):
    """The decoder of a vision model; a decoder itself."""
    return model.decoder if has_vision(model) else model


def check_length(model, n):
    """UserError if a prompt of n tokens, patches of images included, leaves no room to answer."""
    context = model.config.max_positions
    if n >= context:
        raise UserError(f"the question has {n} tokens with its images, but the model's context is "
                        f"{context}; shorten it")


@dataclass
class EncodedImage:
    """An image's token embeddings, and the negative id that stands for each of its patches."""

    features: torch.Tensor  # (P, C)
    picture: object = None  # the PIL image, for inference.attention_page
    id: int = field(default_factory=itertools.count(-1, -1).__next__)


@dataclass
class Turn:
    """A question with its images, and the model's answer."""

    text: str
    images: list  # of EncodedImage
    ids: list  # of the user's turn, and <|assistant|>, which the answer follows
    answer: list = field(default_factory=list)  # ids, without <|end|>


class Conversation:
    """The turns of one user, and the Decoding that `answer` uses."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.decoding, self.turns = model, tokenizer, None, []

    def ids(self, turns=None):
        """The prompt: all turns, the last one without its <|end|>."""
        ids = [self.tokenizer.end_of_text]
        for turn in turns or self.turns:
            ids += [*turn.ids, *turn.answer, self.tokenizer.end]
        return ids[:-1]

    @torch.inference_mode()
    def embeddings(self, prompt, start=0):
        """Embeddings (1, T, C) of prompt[start:]."""
        embedding, ids = decoder_of(self.model).token_embedding, torch.tensor(prompt[start:])
        x = embedding(ids.clamp_min(0).to(embedding.weight.device))
        for image in (image for turn in self.turns for image in turn.images):
            where = (ids == image.id).nonzero()[:, 0]
            # An image that is cached in part has its last patches left.
            features = image.features.repeat(prompt.count(image.id) // len(image.features), 1)
            x[where.to(x.device)] = features[len(features) - len(where) :].to(x.dtype)
        return x[None]

    def add_question(self, text, images=(), max_tokens=256):
        """Add a question with its PIL images; returns how many of the oldest turns were dropped.
        UserError, with the conversation unchanged, if the question alone does not fit."""
        if images and not has_vision(self.model):
            raise UserError(TEXT_ONLY)
        features = encode_images(self.model, images) if images else []
        encoded = list(map(EncodedImage, features, images))
        return self.fit([*self.turns, self.turn(text, encoded)], max_tokens)

    def turn(self, text, images, answer=()):
        """A Turn of texts and of a list of EncodedImage; texts cannot contain special tokens."""
        t = self.tokenizer
        patches = [image.id for image in images for _ in image.features]
        return Turn(text, images, [t.user, *patches, *t.encode(text), t.end, t.assistant],
                    list(answer))

    def fit(self, turns, max_tokens):
        """Continue with the newest of these turns that fit the context with an answer (max_tokens,
        at most a quarter); returns how many were dropped. Images of a dropped turn move to the next
        one, unless later turns have their own. UserError if the last turn does not fit."""
        n, context = len(turns), self.model.config.max_positions
        limit = context - min(max_tokens, context // 4)
        while len(self.ids(turns)) > limit and len(turns) > 1:
            first, second, *rest = turns
            if not any(turn.images for turn in (second, *rest)):
                second = self.turn(second.text, first.images, second.answer)
            turns = [second, *rest]
        check_length(self.model, len(self.ids(turns)))
        self.turns = turns
        return n - len(turns)

    def answer(self, max_tokens=256, sampler=None):
        """Yield the answer to the last question in pieces of text, as it is generated."""
        yield from self._generate(self.ids(), self.tokenizer.end, max_tokens, sampler,
                                  self.turns[-1].answer)

    def ask(self, text, images=(), max_tokens=256, sampler=None):
        """add_question and answer: yields the pieces of the answer."""
        self.add_question(text, images, max_tokens)
        yield from self.answer(max_tokens, sampler)

    def continue_text(self, text, max_tokens=256, sampler=None):
        """Yield what follows `text`, as a document, not as a chat."""
        ids = [self.tokenizer.end_of_text, *self.tokenizer.encode(text)]
        check_length(self.model, len(ids))
        yield from self._generate(ids, self.tokenizer.end_of_text, max_tokens, sampler, [])

    def _generate(self, ids, stop, max_tokens, sampler, answer):
        """Yield the text that follows ids; `answer` gathers its ids."""
        self.decoding = self.decoding or Decoding(decoder_of(self.model))
        sampler, shown = sampler or Sampler(Sampling()), ""
        sampler.begin(ids)
        x = self.embeddings(ids, self.decoding.reuse_prefix(ids))
        for token in generate(self.decoding, x, max_tokens, stop, sampler):
            ids.append(token)
            answer.append(token)
            text = self.tokenizer.decode(answer).removesuffix(UNFINISHED)
            if text != shown:
                yield text[len(shown) :]
            shown = text
        if rest := self.tokenizer.decode(answer)[len(shown) :]:
            yield rest


@torch.inference_mode()
def encode_images(model, images):
    """PIL images as token embeddings: (M, P, C)."""
    pixels = to_pixels(images, *model.image_spec[1:])
    return model.image_tokens(pixels.to(next(model.parameters()).device))


@torch.inference_mode()
def embed(model, tokenizer, rows, features=None):
    """Embeddings (B, T, C) of B lists of ids, padded on the right; features (M * P, C), if given,
    replace those of the <|image|> ids, in order."""
    embedding = decoder_of(model).token_embedding
    ids = pad_sequence(list(map(torch.tensor, rows)), True, tokenizer.end_of_text)
    ids = ids.to(embedding.weight.device)
    x = embedding(ids)
    if features is not None:
        x[ids == tokenizer.image] = features.to(x.dtype)
    return x


def expand_images(model, tokenizer, ids):
    """The ids of a rendered chat as the model reads them: P times <|image|> for an image."""
    patches = model.image_spec.n_patches if has_vision(model) else 1
    return [i for token in ids for i in [token] * (patches if token == tokenizer.image else 1)]


def fits(model, tokenizer, prompt, max_tokens):
    """Whether the ids of a prompt, its images and an answer of max_tokens fit the model."""
    return len(expand_images(model, tokenizer, prompt)) + max_tokens <= model.config.max_positions


def answer_all(model, tokenizer, chats, images, max_tokens=64, batch=64, samplers=None,
               stop=None):
    """Answers (str) to prompts: chats as ids with one <|image|> for each of its PIL images.
    samplers: one each, or None for greedy decoding; stop: <|end|> if None."""
    rows = [expand_images(model, tokenizer, chat) for chat in chats]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # less padding
    slots = min(max(map(len, rows), default=0) + max_tokens, model.config.max_positions)
    decoding = Decoding(decoder_of(model), min(batch, max(1, len(rows))), slots)
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
    """Samples for a report: the first turn of each of the first n chats that fit."""
    spec, numbers = getattr(model, "image_spec", None), range(min(len(chats), 10 * n))
    turns = {i: turns_of(chats, i)[0] for i in numbers}
    fitting = [i for i in numbers if fits(model, tokenizer, turns[i][0], max_tokens)][:n]
    images = [chats.images(i, spec)[: turns[i][0].count(tokenizer.image)] for i in fitting]
    return samples(model, tokenizer, [turns[i] for i in fitting], images, max_tokens)


def sample_texts(model, tokenizer, texts, n=8, given=16, max_tokens=60):
    """Samples for a report: the first tokens of n windows of a data.Text, continued."""
    n, given = min(n, len(texts)), min(given, texts.T // 2, model.config.max_positions // 2)
    windows = [texts.window(i * len(texts) // n).tolist() for i in range(n)]
    turns = [(window[:given], window[given : given + max_tokens]) for window in windows]
    return samples(model, tokenizer, turns, [[]] * n, max_tokens, tokenizer.end_of_text)


def samples(model, tokenizer, turns, images, max_tokens, stop=None):
    """Samples of (prompt, reference) ids for report.sample_blocks, with the model's answers."""
    answers = answer_all(model.eval(), tokenizer, [prompt for prompt, _ in turns], images,
                         max_tokens, stop=stop)
    return [([("prompt", tokenizer.decode(prompt)), ("model", answer.strip()),
              ("reference", tokenizer.decode(reference).split(END_OF_TEXT)[0].strip())], shown)
            for (prompt, reference), answer, shown in zip(turns, answers, images, strict=True)]
