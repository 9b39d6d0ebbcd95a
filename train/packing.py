"""Chats packed whole into rows, with their pictures; and captioned pictures for CLIP."""

import bisect
from dataclasses import dataclass, field

import numpy as np
import torch

from common.config import UserError
from common.images import ImageError, blank, to_pixels
from data import Batch


class Packed:
    """Rows of T positions, filled with whole chats of one or more Chats.

    A chat longer than T is cut behind its last answer that fits (`cut` counts them); one whose
    first answer does not fit, or that has nothing to learn, is left out (`left_out`). A picture is
    n_patches positions, its pixels fitted into a square of image_size as `how` says.
    """

    def __init__(self, sources, T, tokenizer, n_patches=0, image_size=0, how="pad", seed=0):
        self.name = " + ".join(str(chats.folder) for chats in sources)
        self.T, self.tokenizer = T, tokenizer
        self.n_patches, self.image_size, self.how = n_patches, image_size, how
        self.sources = sources
        for chats in sources:
            check_stored(chats, image_size, how)
        total = sum(len(chats) for chats in sources)
        # a row a chat: source, chat, how many ids of it, positions, supervised positions, was cut
        self.chats = np.concatenate([self._measure(s) for s in range(len(sources))])
        self.left_out, self.cut = total - len(self.chats), int(self.chats[:, 5].sum())
        if len(self.chats) == 0:
            raise UserError(f"{self.name}: of {total} chats none fits --context={T}" + (
                f", where a picture alone takes {n_patches}" if n_patches else "") + "; raise it")
        self.rows = pack(self.chats[:, 3].tolist(), T, seed)
        self.targets = np.array([self.chats[row, 4].sum() for row in self.rows], dtype=np.int64)
        self.filled = self.chats[:, 3].sum() / max(1, len(self.rows) * T)

    def __len__(self):
        return len(self.rows)

    def n_targets(self, rows):
        return int(self.targets[rows].sum())

    def summary(self):
        """One line for the log: how many chats in how many rows, how full, what was lost."""
        cut = f"; {self.cut} too long, cut behind an answer" if self.cut else ""
        left = f"; {self.left_out} chats too long or with nothing to learn left out"
        return (f"{self.name}: {len(self.chats)} chats in {len(self)} rows of {self.T}, "
                f"{self.filled:.1%} filled{cut}{left if self.left_out else ''}")

    def notes(self):
        """Lines for the report: the summary, and what prepare.py left out, by reason."""
        lines = [self.summary()]
        for chats in self.sources:
            reasons = chats.manifest.get("left_out", {})
            if reasons:
                total = sum(reason["rows"] for reason in reasons.values())
                lines.append(f"{chats.folder.parent}: {total} rows were left out when it was "
                             "prepared: " + ", ".join(f"{found['rows']} {reason}" for reason, found
                                                      in reasons.items()))
        return lines

    def _measure(self, s):
        """The table of source s, see __init__, a few thousand chats at a time."""
        chats, n = self.sources[s], len(self.sources[s])
        found = [np.empty((0, 6), dtype=np.int64)]
        for begin in range(0, n, 4096):
            parts = [chats.chat(i) for i in range(begin, min(begin + 4096, n))]
            starts = np.cumsum([0, *(len(ids) for ids, _ in parts)])
            ids = np.concatenate([ids for ids, _ in parts])
            supervised = np.concatenate([mask for _, mask in parts])
            widths = np.where(ids == self.tokenizer.image, self.n_patches, 1)
            may_end = ids == self.tokenizer.end  # where answers end, and what is no chat
            may_end[starts[1:] - 1] = True
            ends = np.flatnonzero(supervised & may_end)
            owner = np.searchsorted(starts, ends, side="right") - 1
            before = np.cumsum(widths) - widths  # positions in front of each id, and of each chat
            positions = before[ends] - before[starts[owner]]  # the last id is no input
            last = {int(c): k for k, c in enumerate(owner) if positions[k] <= self.T}
            c, k = np.array(list(last), dtype=int), np.array(list(last.values()), dtype=int)
            learnt = np.cumsum(supervised)
            kept = ends[k] + 1 - starts[c]
            cut = kept < starts[c + 1] - starts[c]
            found.append(np.stack((np.full(len(c), s), begin + c, kept, positions[k],
                                   learnt[ends[k]] - learnt[starts[c]], cut), axis=1))
        return np.concatenate(found)

    def batch(self, rows):
        B, T, P = len(rows), self.T, self.n_patches
        ids = torch.full((B, T), self.tokenizer.end_of_text)
        positions, segments = torch.zeros(B, T, dtype=torch.long), torch.zeros(B, T).int()
        where, targets = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        bounds, lengths, padding, images, image_positions, lost = [], [], [], [], [], []
        for b, row in enumerate(rows):
            start = 0
            for number, c in enumerate(self.rows[row], 1):
                s, i, n, length = self.chats[c, :4].tolist()
                chat, supervised = (part[:n] for part in self.sources[s].chat(i))
                repeats = np.where(chat == self.tokenizer.image, P, 1)
                chat, supervised = np.repeat(chat, repeats), np.repeat(supervised, repeats)
                part = slice(start, start + length)
                ids[b, part] = torch.from_numpy(chat[:-1])
                positions[b, part], segments[b, part] = torch.arange(length), number
                bounds.append(b * T + start)
                lengths.append(length)
                learnt = np.flatnonzero(supervised[1:])
                where.append(learnt + b * T + start)
                targets.append(chat[learnt + 1])
                slots = np.flatnonzero(chat == self.tokenizer.image)
                if len(slots):
                    try:
                        images += self._images(s, i)[: len(slots) // P]
                    except ImageError as error:  # gone since it was prepared
                        lost.append(str(error))
                        images += [blank(self.image_size)] * (len(slots) // P)
                        where.pop(), targets.pop()  # so nothing is learnt from it
                    image_positions.append(slots + b * T + start)
                start += length
            padding.append((b * T + start, b * T + T))
        longest = max(lengths)
        bounds += [at for tail in padding for at in range(*tail, longest)]  # padding, in pieces
        bounds = torch.tensor([*sorted(bounds), B * T], dtype=torch.int32)
        batch = Batch(ids, torch.from_numpy(np.concatenate(targets)),
                      torch.from_numpy(np.concatenate(where)), positions, segments, bounds,
                      longest, lost=lost)
        if images:
            batch.pixels = to_pixels(images, self.image_size, self.how)
            batch.image_positions = torch.from_numpy(np.concatenate(image_positions))
        return batch

    def _images(self, s, i):
        return self.sources[s].images(i, self.image_size, self.how)


def check_stored(chats, image_size, how):
    """UserError if the pictures of some Chats were stored in a way that these settings spoil."""
    stored = chats.manifest.get("stored_images", {})
    if not image_size or not stored.get("copied", True):
        return
    if how == "crop" and stored.get("fit") == "pad":
        raise UserError(f"the pictures in {chats.folder} were padded to squares already, and this "
                        "CLIP wants them cropped; prepare them with --fit=short")
    if stored.get("size", image_size) < image_size:
        raise UserError(f"the pictures in {chats.folder} were stored at {stored['size']} pixels, "
                        f"and this CLIP takes {image_size}; prepare them with "
                        f"--image_size={image_size}")


def pack(lengths, T, seed, window=4096):
    """Lists of numbers into `lengths`, each list at most T long in sum: best fit among a few
    thousand at a time, in a seeded order (so rows mix what the data set does not). The longest go
    first, unless that leaves gaps and the seeded order fewer, as among captions of one length."""
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    rows = []
    for begin in range(0, len(order), window):
        part = order[begin : begin + window]
        found = best_fit(sorted(part, key=lambda c: -lengths[c]), lengths, T)
        if sum(lengths[c] for c in part) < 0.97 * len(found) * T:
            found = min(found, best_fit(part, lengths, T), key=len)
        rows += found
    return rows


def best_fit(numbers, lengths, T):
    """Each number, in this order, into the fullest list that has room for its length."""
    rows, room = [], []  # room: sorted (free positions, row)
    for c in numbers:
        spot = bisect.bisect_left(room, (lengths[c], -1))
        if spot == len(room):
            rows.append([])
            free, row = T, len(rows) - 1
        else:
            free, row = room.pop(spot)
        rows[row].append(c)
        bisect.insort(room, (free - lengths[c], row))
    return rows


# --------------------------------------------------------------------------------------- captions


@dataclass
class Pairs:
    """Pictures with their captions, for CLIP."""

    pixels: torch.Tensor  # (B, S, S, 3) uint8
    ids: torch.Tensor  # (B, context), ended and padded with the end id
    keys: torch.Tensor  # (B,) equal for identical captions
    n_targets: int = 0
    lost: list = field(default_factory=list)

    to, pin_memory, _each = Batch.to, Batch.pin_memory, Batch._each


class Captions:
    """Pictures of Chats with the first answer about each as its caption."""

    def __init__(self, chats, tokenizer, image_size, context, how="pad"):
        if not chats.has_images:
            raise UserError(f"{chats.folder} holds no pictures, so it cannot train CLIP")
        self.name, self.chats, self.tokenizer = str(chats.folder), chats, tokenizer
        self.image_size, self.how, self.context = image_size, how, context
        check_stored(chats, image_size, how)
        self.chosen = [i for i in range(len(chats)) if chats.n_images(i) == 1]
        if not self.chosen:
            raise UserError(f"no chat of {chats.folder} has just one picture, as CLIP needs them")

    def __len__(self):
        return len(self.chosen)

    def n_targets(self, rows):
        return len(rows)

    def caption(self, i):
        """The ids of caption i: <|endoftext|>, the text, <|end|>, cut to the context."""
        ids, supervised = self.chats.chat(self.chosen[i])
        start = int(supervised.argmax())
        text = ids[start:][: int((ids[start:] == self.tokenizer.end).argmax())]
        text = text[: self.context - 2].tolist()
        return [self.tokenizer.end_of_text, *text, self.tokenizer.end]

    def batch(self, rows):
        found, lost = {}, []
        for i in rows:
            try:
                found[i] = self.chats.images(self.chosen[i], self.image_size, self.how)[0]
            except ImageError as error:  # gone since it was prepared
                lost.append(str(error))
        if not found:
            raise UserError(f"no picture of a whole batch of {self.name} can be read: {lost[0]}")
        rows = [i if i in found else next(iter(found)) for i in rows]  # twice is as good as once
        captions, images = [self.caption(i) for i in rows], [found[i] for i in rows]
        longest = min(self.context, -(-max(map(len, captions)) // 8) * 8)  # few different shapes
        padded = [ids + [self.tokenizer.end] * (longest - len(ids)) for ids in captions]
        keys = [hash(tuple(ids)) for ids in captions]  # of ints: the same in every process
        return Pairs(to_pixels(images, self.image_size, self.how), torch.tensor(padded),
                     torch.tensor(keys), lost=lost)
