"""Does the model look? Held-out loss with the right pictures, with another chat's, and with none.

A model that answers from the question alone has the same loss three times.
"""

from data import validation_loss
from packing import Packed

LEAST_GAIN = 0.01  # nats a token that the right picture should bring


class Held:
    """The first n chats of a Chats, with their own pictures, with another's, or with none."""

    def __init__(self, chats, n, tokenizer, pictures="own"):
        self.folder, self.manifest, self.chats = chats.folder, chats.manifest, chats
        self.n, self.tokenizer, self.pictures = min(n, len(chats)), tokenizer, pictures
        alike = {}  # number of pictures -> the chats that have so many
        for i in range(self.n):
            alike.setdefault(chats.n_images(i), []).append(i)
        self.other = {i: some[(k + 1) % len(some)] for some in alike.values()
                      for k, i in enumerate(some)}

    def __len__(self):
        return self.n

    def chat(self, i):
        ids, supervised = self.chats.chat(i)
        if self.pictures == "none":
            kept = ids != self.tokenizer.image
            ids, supervised = ids[kept], supervised[kept]
        return ids, supervised

    def images(self, i, size=0, how="pad"):
        return self.chats.images(self.other[i] if self.pictures == "other" else i, size, how)


class Looking:
    """Held-out chats, packed three times; n of them, the same ones at every evaluation."""

    def __init__(self, chats, n, T, tokenizer, *pictures):
        self.packed = {kind: Packed([Held(chats, n, tokenizer, kind)], T, tokenizer, *pictures)
                       for kind in ("own", "other", "none")}

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
