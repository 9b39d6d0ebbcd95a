"""Does the model look? Held-out loss with the right pictures, with another chat's, and with none.

A model that answers from the question alone has the same loss three times. What the right picture
saves, against another chat's or a blank one, is the vision gain.
"""

import numpy as np
import torch

from common.images import blank
from evals.metrics import bootstrap
from model import compute_dtype, head_loss, packed_mask
from train.loader import validation_loss
from train.packing import Packed

LEAST_GAIN = 0.01  # nats a token that the right picture should bring


class Held:
    """Some chats of a Chats, with their own pictures, with another's that has as many, or none.

    pictures: "own", "other", "none", or "blank" for a grey one in the place of each.
    lengths: {number of the chat in Chats: how many of its ids}; None for all of the first n.
    """

    def __init__(self, chats, n, tokenizer, pictures="own", lengths=None):
        self.folder, self.manifest, self.chats = chats.folder, chats.manifest, chats
        self.tokenizer, self.pictures = tokenizer, pictures
        self.lengths = lengths or dict.fromkeys(range(min(n, len(chats))))
        self.numbers = list(self.lengths)
        alike = {}  # number of pictures -> the chats that have so many
        for number in self.numbers:
            alike.setdefault(chats.n_images(number), []).append(number)
        # half of them away: neighbours may show the same picture
        self.other = {number: some[(k + max(1, len(some) // 2)) % len(some)]
                      for some in alike.values() for k, number in enumerate(some)}

    def __len__(self):
        return len(self.numbers)

    def chat(self, i):
        number = self.numbers[i]
        ids, supervised = (part[: self.lengths[number]] for part in self.chats.chat(number))
        if self.pictures == "none":
            kept = ids != self.tokenizer.image
            ids, supervised = ids[kept], supervised[kept]
        return ids, supervised

    def images(self, i, spec=None):
        number = self.numbers[i]
        if self.pictures == "none":
            return []
        if self.pictures == "blank":
            return [blank(spec.size if spec else 1)] * self.chats.n_images(number)
        if self.pictures == "other":
            number = self.other[number]
        return self.chats.images(number, spec)


class Looking:
    """The first n held-out chats, packed three times: what fits with its pictures, in all."""

    kinds = "other", "none"

    def __init__(self, chats, n, T, tokenizer, spec=None):
        own = Packed([Held(chats, n, tokenizer)], T, tokenizer, spec)
        fits = dict(own.chats[["number", "n_ids"]].tolist())
        self.packed = {"own": own}
        for kind in self.kinds:
            held = Held(chats, n, tokenizer, kind, fits)
            self.packed[kind] = Packed([held], T, tokenizer, spec)

    def losses(self, machine, model, micro_rows):
        """{"val_loss", "val_other_picture", "val_no_picture"}, in nats a supervised token."""
        names = ("val_loss", "val_other_picture", "val_no_picture")
        return {name: validation_loss(machine, packed, micro_rows, model, len(packed))
                for name, packed in zip(names, self.packed.values(), strict=True)}


class Gains(Looking):
    """The same and a fourth time, with blank pictures: what every chat costs with each kind.

    Only chats with pictures, of which another has as many, count for the gains.
    """

    kinds = "other", "none", "blank"

    def nats(self, machine, model, micro_rows):
        """{kind: {number of a chat: (its nats, its supervised tokens)}}"""
        return {kind: nats_by_chat(machine, model, packed, micro_rows)
                for kind, packed in self.packed.items()}

    def gains(self, nats):
        """{"other", "blank"}: (nats a token that the right picture saves against it, the error).

        Empty where no chat has a picture. Standard errors by bootstrap over the chats.
        """
        own, held, found = nats["own"], self.packed["other"].sources[0], {}
        for kind in "other", "blank":
            saved = [(nats[kind][number][0] - own[number][0], own[number][1]) for number in own
                     if number in nats[kind] and held.other[number] != number
                     and held.chats.n_images(number)]
            if saved:
                found[kind] = a_token(saved)
        return found


def a_token(chats):
    """(nats a token, its standard error) of chats: pairs of nats and of tokens (N, 2)."""
    chats = np.array(chats, float)

    def mean(rows):
        return rows[:, 0].sum() / rows[:, 1].sum()

    return float(mean(chats)), bootstrap(chats, statistic=mean)


@torch.no_grad()
def nats_by_chat(machine, model, packed, micro_rows):
    """{number: (nats, supervised tokens)} of the chats of a Packed of one Held.

    Without those whose pictures cannot be read. All processes do the same.
    """
    found, decoder, held = {}, getattr(model, "decoder", model), packed.sources[0]
    for start in range(0, len(packed), micro_rows):
        rows = range(start, min(start + micro_rows, len(packed)))
        batch = packed.batch(rows).to(machine.device)
        with machine.autocast():
            x = (decoder.token_embedding(batch.ids) if model is decoder
                 else model.embed(batch.ids, batch.pixels, batch.image_positions))
            mask = packed_mask(batch.segments, batch.bounds, batch.longest, compute_dtype(x))
            x = decoder.hidden(x, batch.positions, mask).flatten(0, 1)[batch.where]  # (N, C)
            # the supervised positions of a chat stand together; so many there are of each
            segments = batch.segments.flatten()[batch.where]
            chats, counts = torch.stack((batch.where // packed.T, segments)).unique_consecutive(
                dim=1, return_counts=True)
            counts = counts.tolist()
            parts = zip(chats.T.tolist(), x.split(counts), batch.targets.split(counts), strict=True)
            for (row, number), states, targets in parts:
                place = packed.chats["number"][packed.rows[rows[row]][number - 1]]
                nats = head_loss(states, decoder.head.weight, targets).item()
                found[held.numbers[place]] = nats, len(targets)
    return found


def blind(losses):
    """A sentence for a user whose model does not look, or "" where the pictures help."""
    others = losses["val_other_picture"] - losses["val_loss"]
    none = losses["val_no_picture"] - losses["val_loss"]
    if min(others, none) >= LEAST_GAIN:
        return ""
    return ("the model is not looking: on held-out chats the right picture saves "
            f"{others:.3f} nats a token against another chat's picture, and {none:.3f} against "
            "none. If that stays so, train longer or with a higher learning rate, and look with "
            "prepare.py check whether pictures and texts belong together")
