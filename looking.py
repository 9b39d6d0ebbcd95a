"""Does the model look? Held-out loss with the right pictures, with another chat's, and with none.

A model that answers from the question alone has the same loss three times.
"""

from data import validation_loss
from packing import Packed

LEAST_GAIN = 0.01  # nats a token that the right picture should bring


class Held:
    """Some chats of a Chats, with their own pictures, with another's that has as many, or none.

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

    def images(self, i, size=0, how="pad"):
        number = self.numbers[i]
        if self.pictures == "other":
            number = self.other[number]
        return self.chats.images(number, size, how)


class Looking:
    """The first n held-out chats, packed three times: what fits with its pictures, in all."""

    def __init__(self, chats, n, T, tokenizer, *pictures):
        own = Packed([Held(chats, n, tokenizer)], T, tokenizer, *pictures)
        fits = dict(own.chats[:, 1:3].tolist())
        self.packed = {"own": own}
        for kind in "other", "none":
            held = Held(chats, n, tokenizer, kind, fits)
            self.packed[kind] = Packed([held], T, tokenizer, *pictures)

    def losses(self, machine, model, micro_rows):
        """{"val_loss", "val_other_picture", "val_no_picture"}, in nats a supervised token."""
        names = ("val_loss", "val_other_picture", "val_no_picture")
        return {name: validation_loss(machine, packed, micro_rows, model, len(packed))
                for name, packed in zip(names, self.packed.values(), strict=True)}


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
