"""What training will make of a row: its turns, ids and pictures, or the reason why nothing.

Rows come from where somebody has them (Originals) or from a folder that prepare.py made (Made);
check.py asks both the same: rows(skip), and look(where, row).
"""

import hashlib
import io
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

import tokenizer as tokenizers
from common.archives import open_images
from common.checksums import check_sums
from common.config import UserError, read_sealed
from common.images import ImageError, read_image
from data import Chats, check_tokenizer
from prep.schema import ask_shortly, images_of, messages_of
from prep.sources import parsed, source_of
from prep.unpack import unpacked
from train.packing import Packed

NO_PICTURE, SEVERAL = "no picture: a chat about text", "more than one picture"
UNMARKED = "a picture without <image> in the text: it goes to the start of the first question"
COPY = "a copy of an earlier row: the same text and picture"


@dataclass
class Row:
    """What one row turned out to be. Ids and images are dropped as soon as they are measured."""

    name: str  # file:line, and the row's id if it has one
    problem: str = ""  # why it cannot be used, as prepare.py says it
    notes: list = field(default_factory=list)  # what is worth knowing of a row that can be used
    ids: np.ndarray | None = None  # int64, one <|image|> id a picture
    supervised: np.ndarray | None = None
    images: list = field(default_factory=list)  # PIL, where they are to be kept
    text: str = ""  # how a row that cannot be used begins, where that is to be kept
    sizes: list = field(default_factory=list)  # (width, height) of its pictures
    key: bytes = b""  # the same for rows with the same text and pictures
    lengths: tuple = ()  # ids, positions, turns, answers
    used: int = 0  # positions that training uses of it


class Originals:
    """The rows that somebody has, and their pictures where they have them."""

    def __init__(self, cfg):
        self.cfg, self.source = cfg, source_of(cfg)
        self.name, self.total = self.source.name, self.source.total
        self.tokenizer = tokenizers.load(cfg.tokenizer)
        self.temporary, self.left_out = [], {}
        self.find = open_images(cfg.image_root, self._unpack)

    def _unpack(self, paths, codec):
        """A plain tar for a compressed one, here and not in /tmp, which may be small."""
        try:
            self.temporary.append(tempfile.TemporaryDirectory(prefix=".unpacked-", dir="."))
            return unpacked(paths, codec, Path(self.temporary[-1].name))
        except OSError as error:
            raise UserError(f"cannot unpack {paths[0]} in this folder: {error}") from None

    def rows(self, skip=0):
        return self.source.rows(skip)

    def look(self, where, row, keep=False):
        """The Row of a row, its pictures decoded. The order is prepare.py's, so are the reasons."""
        found = Row(where)
        try:
            row = parsed(row)
            if isinstance(row, dict) and isinstance(row.get("id"), str | int):
                name = " ".join(str(row["id"])[:60].split()).encode(errors="replace").decode()
                found.name += f" (id {name})"
            messages = messages_of(row)
            pictures = images_of(row, messages)
            for source in pictures:
                content = source if isinstance(source, bytes) else self.find(source)
                image, size = decode(content, self.cfg)
                found.sizes.append(size)
                found.images += [image] if keep else []
            messages = ask_shortly(messages) if self.cfg.short_answers else messages
            chat = tokenizers.render(self.tokenizer, messages, len(pictures))
        except ImageError as error:
            found.problem = error.reason
        except ValueError as error:
            found.problem = str(error)
        except TypeError:
            found.problem = "a row of another form"
        if found.problem:
            found.text = repr(row)[:400] if keep else ""
            return found
        found.ids, found.supervised = np.array(chat.ids), np.array(chat.supervised)
        found.notes = notes_of(messages, len(pictures))
        names = [hashlib.blake2b(p).digest() if isinstance(p, bytes) else p for p in pictures]
        found.key = hashlib.blake2b(repr((messages, names)).encode(errors="replace"),
                                    digest_size=8).digest()
        return found


def decode(content, cfg):
    """A picture as training sees it, before it is fitted, and the (width, height) it came with."""
    image = read_image(content, "a picture", cfg.image_size, cfg.fit)
    with Image.open(io.BytesIO(content)) as header:
        width, height = header.size
    turned = (width > height) != (image.width > image.height)  # a camera held upright
    return image, (height, width) if turned else (width, height)


def notes_of(messages, n_images):
    """What is worth knowing of a row that can be used."""
    marked = any(tokenizers.IMAGE_MARK in m["content"] for m in messages if m["role"] == "user")
    notes = {NO_PICTURE: n_images == 0, SEVERAL: n_images > 1, UNMARKED: n_images and not marked}
    return [note for note, true in notes.items() if true]


class Made:
    """The chats in a folder that prepare.py made; its sums are checked first."""

    def __init__(self, cfg):
        self.folder, self.name = Path(cfg.files), cfg.files.rstrip("/")
        if not (self.folder / "manifest.json").is_file():
            raise UserError(f"the folder {self.name} has no manifest.json, so prepare.py did not "
                            f"make it; name files, like '{self.name}/*.json'")
        manifest = read_sealed(self.folder / "manifest.json")
        inside = sorted(p.parent.name for p in self.folder.glob("*/ids.npy"))
        if not inside:
            sets = sorted(p.parent.name for p in self.folder.glob("*/manifest.json"))
            raise UserError(f"{self.name} holds no chats" + (
                f"; name one of the folders in it: {', '.join(sets)}" if sets
                else "; check looks at chats and pictures, not at shards of text"))
        check_sums(self.folder, manifest.get("sha256", {}), anew=True)
        self.tokenizer = check_tokenizer(self.folder)
        self.left_out = manifest.get("left_out", {})
        self.chats = {split: Chats(self.folder, split) for split in ("train", "val", *inside)
                      if split in inside}
        self.total = sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())

    def rows(self, skip=0):
        """Yield (where, (split, number), bytes), the splits one after another."""
        size = self.total / max(1, sum(map(len, self.chats.values())))
        for split, chats in self.chats.items():
            for i in range(min(skip, len(chats)), len(chats)):
                yield f"{split}:{i + 1}", (split, i), size
            skip = max(0, skip - len(chats))

    def look(self, where, row, keep=False):
        """The Row of a chat, its pictures decoded."""
        found, chats = Row(where), self.chats[row[0]]
        found.ids, found.supervised = chats.chat(row[1])
        try:
            images = chats.images(row[1])
        except ImageError as error:
            found.problem = error.reason
            return found
        if np.count_nonzero(found.ids == self.tokenizer.image) != len(images):
            found.problem = "<|image|> ids and pictures that do not match"
        found.sizes = [image.size for image in images]
        found.notes = [NO_PICTURE] * (not images) + [SEVERAL] * (len(images) > 1)
        key = hashlib.blake2b(found.ids.tobytes(), digest_size=8)
        for image in images:
            key.update(image.tobytes())
        found.key, found.images = key.digest(), images if keep else []
        return found


# --------------------------------------------------------------------------------- does it fit?


class Rendered:
    """Some rows as packing.Packed reads chats."""

    def __init__(self, rows):
        self.rows, self.folder, self.manifest = rows, "", {}

    def __len__(self):
        return len(self.rows)

    def chat(self, i):
        return self.rows[i].ids, self.rows[i].supervised


def measured(cfg, data, batch, keep=False):
    """The Rows of a batch, with what is in them or not; training's own code says what fits."""
    rows = [data.look(where, row, keep) for where, row, _ in batch]
    good, tokenizer = [row for row in rows if not row.problem], data.tokenizer
    packed = Packed([Rendered(good)], cfg.context, tokenizer, cfg.patches) if good else None
    for _, i, _, positions, _, cut in packed.chats if good else ():
        good[i].used = int(positions)
        if cut:
            good[i].notes.append(f"longer than {cfg.context:,} positions: cut behind an answer")
    for row in good:
        n_images = np.count_nonzero(row.ids == tokenizer.image)
        turns = np.isin(row.ids, list(tokenizer.role_ids.values())).sum()
        answers = np.count_nonzero(row.supervised & (row.ids == tokenizer.end))
        n = len(row.ids)
        row.lengths = n, n + n_images * (cfg.patches - 1), turns, answers
        if not row.used:
            row.problem = (f"its first answer ends beyond {cfg.context:,} positions" if answers
                           else "nothing to learn in it")
    for row in rows if not keep else ():
        row.ids = row.supervised = None
    return rows
