"""A conversation with a model: its turns, its pictures, its cache; and many questions at once.

One Conversation belongs to one user. What was said and seen stays in its KV cache, so a turn costs
only its own tokens, and a picture is encoded once.
"""

import contextlib

import torch

from common.config import UserError
from data import Batch
from model import KVCache, generate, generate_batch
from pictures import PictureError, to_pixels
from tokenizer import user_turn
from vision import VisionLanguageModel

BLIND = ("this checkpoint cannot see: it is a text model; "
         "a vision_pretrain or vision_sft checkpoint takes pictures")


class Conversation:
    """Turns of one user with a decoder or vision model."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.sees = isinstance(model, VisionLanguageModel)
        self.decoder = model.decoder if self.sees else model
        self.device = self.decoder.head.weight.device
        self.reset()

    def reset(self):
        """Forget everything said and seen."""
        self.cache = KVCache(self.decoder)
        self.begun = False

    def ask(self, text, images=(), max_tokens=256, **sampling):
        """Yield the answer to `text` and PIL `images` in pieces of text, as they are made."""
        if images and not self.sees:
            raise UserError(BLIND)
        ids = [] if self.begun else [self.tokenizer.end_of_text]
        ids += user_turn(self.tokenizer, [None] * len(images) + [text])
        yield from self._go_on([*ids, self.tokenizer.assistant], images, max_tokens,
                               self.tokenizer.end, sampling)

    def continue_text(self, text, max_tokens=256, **sampling):
        """Yield what follows `text`, as a document, not as a chat."""
        ids = [self.tokenizer.end_of_text, *self.tokenizer.encode(text)]
        yield from self._go_on(ids, (), max_tokens, self.tokenizer.end_of_text, sampling)

    def _go_on(self, ids, images, max_tokens, stop, sampling):
        embeddings = embed(self.model, self.tokenizer, [ids], [images])[0]
        used, room = self.cache.length, self.cache.keys.size(3)
        if used + embeddings.size(1) >= room:
            raise UserError(
                f"this turn has {embeddings.size(1)} tokens and {used} are used already, but the "
                f"model's context is {room}; " + ("/reset starts over" if used else "shorten it"))
        self.begun = True
        pending, shown = [], ""
        for token in generate(self.decoder, embeddings, self.cache, max_tokens, stop, **sampling):
            pending.append(token)
            text = self.tokenizer.decode(pending)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else a character is still in parts
                yield text[len(shown):]
                shown = text
            if text.endswith((" ", "\n")) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                pending, shown = [], ""


@torch.inference_mode()
def embed(model, tokenizer, chats, images):
    """Embeddings (B, T, C) of B chats as ids, padded on the right, and their lengths (B,).

    images[b] holds the PIL pictures of chat b, one for each <|image|> id in it.
    """
    sees = isinstance(model, VisionLanguageModel)
    device = next(model.parameters()).device
    P = model.clip_config.n_patches if sees else 1
    chats = [[i for token in chat for i in [token] * (P if token == tokenizer.image else 1)]
             for chat in chats]
    lengths = torch.tensor([len(chat) for chat in chats], device=device)
    ids = torch.full((len(chats), max(map(len, chats))), tokenizer.end_of_text)
    for row, chat in zip(ids, chats, strict=True):
        row[: len(chat)] = torch.tensor(chat)
    if not sees:
        return model.token_embedding(ids.to(device)), lengths
    batch = Batch(ids, ids)
    pictures = [picture for some in images for picture in some]
    if pictures:
        batch.pixels = to_pixels(pictures, *model.pictures[1:])
        batch.image_positions = (ids.flatten() == tokenizer.image).nonzero()[:, 0]
    batch.to(device)
    return model.embed(batch.ids, batch.pixels, batch.image_positions), lengths


def answer_all(model, tokenizer, chats, images, max_tokens=64, batch=64, autocast=None):
    """Greedy answers (str) to many prompts: chats as ids that end where the answer begins."""
    decoder = model.decoder if isinstance(model, VisionLanguageModel) else model
    order = sorted(range(len(chats)), key=lambda i: len(chats[i]))  # alike lengths, little padding
    found = [""] * len(chats)
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        with autocast() if autocast else torch.inference_mode():
            part = [chats[i] for i in some], [images[i] for i in some]
            x, lengths = embed(model, tokenizer, *part)
            rows = generate_batch(decoder, x, lengths, max_tokens, tokenizer.end)
        for i, row in zip(some, rows, strict=True):
            found[i] = tokenizer.decode(row)
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
    patches = model.clip_config.n_patches if isinstance(model, VisionLanguageModel) else 1
    positions = len(prompt) + prompt.count(tokenizer.image) * (patches - 1)
    return positions + max_tokens <= model.config.max_positions


def sample_answers(model, tokenizer, chats, n, max_tokens=64):
    """The first turns of the first n chats that fit, with the model's answers, for a report."""
    model.eval()
    pixels = model.pictures[1:] if isinstance(model, VisionLanguageModel) else ()
    turns, images = [], []
    for i in range(min(len(chats), 10 * n)):
        turn = turns_of(chats, i)[0]
        if len(turns) < n and fits(model, tokenizer, turn[0], max_tokens):
            with contextlib.suppress(PictureError):  # gone since it was prepared
                images.append(chats.images(i, *pixels)[: turn[0].count(tokenizer.image)])
                turns.append(turn)
    found = answer_all(model, tokenizer, [turn[0] for turn in turns], images)
    return [f"{tokenizer.decode(prompt)}\nmodel: {answer}\nright: {tokenizer.decode(right)}"
            for (prompt, right), answer in zip(turns, found, strict=True)]

