"""Data sets for the Loader: complete chats packed into rows, and captioned images for CLIP."""

import bisect

import numpy as np
import torch

from common.config import UserError
from common.images import to_pixels
from data import Batch

# What Packed stores of each chat; see Packed.measure.
CHAT = np.dtype([("source", int), ("number", int),  # sources[source].chat(number)
                 ("n_ids", int),  # up to the end of the last answer that fits
                 ("length", int),  # positions: one for each id but the last, P for an image
                 ("n_targets", int), ("truncated", bool)])


class Packed:
    """Rows of T positions, filled with complete chats of `sources`, as data.Chats describes them.

    A chat longer than T is truncated after its last answer that fits; one without an answer that
    fits is left out. spec: the data.ImageSpec of a model that reads images.

    chats: array of CHAT. rows: the indices into it that each row holds.
    """

    def __init__(self, sources, T, tokenizer, spec=None, seed=0):
        self.name = " + ".join(str(chats.folder) for chats in sources)
        self.sources, self.T, self.tokenizer, self.spec = sources, T, tokenizer, spec
        self.n_patches = spec.n_patches if spec else 0
        for chats in sources:
            check_stored(chats, spec)
        total = sum(len(chats) for chats in sources)
        self.chats = np.concatenate([part for s in range(len(sources)) for part in self.measure(s)])
        self.left_out = total - len(self.chats)
        if len(self.chats) == 0:
            raise UserError(f"{self.name}: of {total} chats none fits --context={T}" + (
                f", where an image alone takes {self.n_patches}" if spec else "") + "; raise it")
        self.rows = pack(self.chats["length"].tolist(), T, seed)
        self.targets = np.array([self.chats["n_targets"][row].sum() for row in self.rows])
        self.filled = self.chats["length"].sum() / (len(self.rows) * T)

    def __len__(self):
        return len(self.rows)

    def n_targets(self, rows):
        return int(self.targets[rows].sum())

    def note(self):
        """A line for the report: how full the rows are, what was truncated and left out."""
        line = (f"{self.name}: {len(self.chats)} chats in {len(self)} rows of {self.T}, "
                f"{self.filled:.1%} filled")
        if truncated := self.chats["truncated"].sum():
            line += f"; {truncated} truncated after an answer"
        if self.left_out:
            line += f"; {self.left_out} left out: too long, or nothing supervised"
        return line

    def measure(self, s, at_once=4096):
        """Yield arrays of CHAT for source s, a few thousand chats at a time."""
        chats = self.sources[s]
        yield np.empty(0, CHAT)
        for begin in range(0, len(chats), at_once):
            parts = [chats.chat(i) for i in range(begin, min(begin + at_once, len(chats)))]
            starts = np.cumsum([0, *(len(ids) for ids, _ in parts)])
            ids = np.concatenate([ids for ids, _ in parts])
            supervised = np.concatenate([mask for _, mask in parts])
            may_end = ids == self.tokenizer.end  # an answer; a document ends with its last id
            may_end[starts[1:] - 1] = True
            ends = np.flatnonzero(supervised & may_end)
            owner = np.searchsorted(starts, ends, side="right") - 1  # the chat of each end
            widths = np.where(ids == self.tokenizer.image, self.n_patches, 1)
            before = np.cumsum(widths) - widths  # positions before each id
            length = before[ends] - before[starts[owner]]  # the last id is no input
            last = {chat: k for k, chat in enumerate(owner.tolist()) if length[k] <= self.T}
            chat, k = np.array(list(last), int), np.array(list(last.values()), int)
            n_supervised = np.cumsum(np.where(supervised, widths, 0))  # as batch repeats them
            found = np.empty(len(chat), CHAT)
            found["source"], found["number"] = s, begin + chat
            found["n_ids"], found["length"] = ends[k] + 1 - starts[chat], length[k]
            found["n_targets"] = n_supervised[ends[k]] - n_supervised[starts[chat]]
            found["truncated"] = ends[k] + 1 < starts[chat + 1]
            yield found

    def batch(self, rows):
        """The Batch of some rows."""
        B, T = len(rows), self.T
        ids = np.full(B * T, self.tokenizer.end_of_text)
        targets = np.full(B * T, -1)  # -1: unsupervised
        positions, segments = np.zeros(B * T, int), np.zeros(B * T, np.int32)
        bounds, padding, images, longest, attended = [], [], [], 0, 0
        for b, row in enumerate(rows):
            start = b * T
            for segment, chat in enumerate(self.chats[self.rows[row]], 1):
                found, supervised, own_images = self._read(chat)
                length = len(found) - 1
                part = slice(start, start + length)
                ids[part], positions[part], segments[part] = found[:-1], np.arange(length), segment
                targets[part] = np.where(supervised[1:], found[1:], -1)
                images += own_images
                bounds.append(start)
                longest, attended = max(longest, length), attended + length**2
                start += length
            padding.append((start, b * T + T))
        # Padding is cut into pieces, so that it costs the attention no more than chats do.
        bounds += [at for tail in padding for at in range(*tail, longest)]
        where = np.flatnonzero(targets >= 0)
        batch = Batch(
            ids=torch.from_numpy(ids).view(B, T),
            targets=torch.from_numpy(targets[where]), where=torch.from_numpy(where),
            positions=torch.from_numpy(positions).view(B, T),
            segments=torch.from_numpy(segments).view(B, T),
            bounds=torch.tensor([*sorted(bounds), B * T], dtype=torch.int32), longest=longest,
            attended=attended)
        if images:
            batch.pixels = to_pixels(images, self.spec.size, self.spec.fit)
            batch.image_positions = torch.from_numpy(np.flatnonzero(ids == self.tokenizer.image))
        return batch

    def _read(self, chat):
        """(ids, supervised, PIL images) of a CHAT, each <|image|> id repeated for every patch."""
        source, number = self.sources[chat["source"]], chat["number"]
        ids, supervised = (part[: chat["n_ids"]] for part in source.chat(number))
        is_image = ids == self.tokenizer.image
        repeats = np.where(is_image, self.n_patches, 1)
        n = is_image.sum() if self.spec else 0  # further images are after the truncation
        images = source.images(number, self.spec)[:n] if n else []
        return np.repeat(ids, repeats), np.repeat(supervised, repeats), images


def check_stored(chats, spec):
    """UserError if the stored images of a data.Chats do not suit an ImageSpec."""
    stored = chats.manifest.get("stored_images", {})
    if not spec or not stored:
        return
    if spec.fit == "crop" and stored["fit"] == "pad":
        raise UserError(f"the images in {chats.folder} were padded to squares, and this CLIP needs "
                        "them cropped; prepare them with --fit=short")
    if stored["size"] < spec.size:
        raise UserError(f"the images in {chats.folder} were stored at {stored['size']} pixels, too "
                        f"few for this CLIP; prepare them with --image_size={spec.size}")


def pack(lengths, T, seed, window=4096):
    """Lists of indices into `lengths`, each list with a sum of at most T.

    Best fit within windows of a seeded order, so that chats that are neighbours in the data set
    come into different rows. The longest come first, unless the seeded order leaves fewer gaps.
    """
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    rows = []
    for begin in range(0, len(order), window):
        part = order[begin : begin + window]
        found = best_fit(sorted(part, key=lambda c: -lengths[c]), lengths, T)
        if sum(lengths[c] for c in part) < 0.97 * len(found) * T:
            found = min(found, best_fit(part, lengths, T), key=len)
        rows += found
    return rows


def best_fit(indices, lengths, T):
    """Each index, in this order, into the fullest list that has room for its length."""
    rows, room = [], []  # room: sorted (free positions, row)
    for c in indices:
        spot = bisect.bisect_left(room, (lengths[c], -1))
        if spot == len(room):
            rows.append([])
            free, row = T, len(rows) - 1
        else:
            free, row = room.pop(spot)
        rows[row].append(c)
        bisect.insort(room, (free - lengths[c], row))
    return rows


class Captions:
    """The images of data.Chats, each with the first answer about it as its caption, for CLIP."""

    def __init__(self, chats, tokenizer, spec, context):
        check_stored(chats, spec)
        self.name, self.chats, self.tokenizer = str(chats.folder), chats, tokenizer
        self.spec, self.context = spec, context
        self.chosen = [i for i in range(len(chats)) if chats.n_images(i) == 1]
        if not self.chosen:
            raise UserError(f"{chats.folder} has no images for CLIP, which needs chats with one")

    def __len__(self):
        return len(self.chosen)

    def n_targets(self, rows):
        return len(rows)

    def caption(self, i):
        """The ids of caption i: <|endoftext|>, the text, <|end|>; truncated to the context."""
        ids, supervised = self.chats.chat(self.chosen[i])
        start = int(supervised.argmax())
        text = ids[start:][: int((ids[start:] == self.tokenizer.end).argmax())]
        text = text[: self.context - 2].tolist()
        return [self.tokenizer.end_of_text, *text, self.tokenizer.end]

    def batch(self, rows):
        """Batch of pixels, ids and keys."""
        captions = [self.caption(i) for i in rows]
        images = [self.chats.images(self.chosen[i], self.spec)[0] for i in rows]
        longest = min(self.context, -(-max(map(len, captions)) // 8) * 8)  # few different shapes
        ids = [ids + [self.tokenizer.end] * (longest - len(ids)) for ids in captions]
        keys = [hash(tuple(ids)) for ids in captions]  # of ints: the same in every process
        return Batch(torch.tensor(ids), pixels=to_pixels(images, self.spec.size, self.spec.fit),
                     keys=torch.tensor(keys))
