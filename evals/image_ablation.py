"""Image ablation: validation loss with the correct images, with those of another chat, without.

A model that answers from the text alone has the same loss each time. What the correct image saves
against a mismatched or a blank one is the vision gain.
"""

import torch

from common.images import blank
from evals.metrics import ratio, score
from model import compute_dtype, head_loss, packed_mask
from train.loader import validation_loss
from train.packing import Packed

LEAST_GAIN = 0.01  # nats per token that the correct image should save
SUFFIXES = {"correct": "", "mismatched": "_mismatched_image", "text_only": "_text_only",
            "blank": "_blank_image"}  # of the names of losses


class AblatedChats:
    """The first n chats of a Chats with other images in the place of their own.

    images: "correct", "mismatched" for those of another chat with as many, "blank" for grey ones,
    or "text_only". lengths: {number of the chat: ids to keep} instead of n.
    """

    def __init__(self, chats, n, tokenizer, images="correct", lengths=None):
        self.folder, self.manifest, self.chats = chats.folder, chats.manifest, chats
        self.tokenizer, self.kind = tokenizer, images
        self.lengths = lengths or dict.fromkeys(range(min(n, len(chats))))
        self.numbers = list(self.lengths)
        by_count = {}  # number of images -> chats with as many
        for number in self.numbers:
            by_count.setdefault(chats.n_images(number), []).append(number)
        # Half the list away: neighbours may show the same image.
        self.mismatched = {number: group[(k + max(1, len(group) // 2)) % len(group)]
                           for group in by_count.values() for k, number in enumerate(group)}

    def __len__(self):
        return len(self.numbers)

    def chat(self, i):
        number = self.numbers[i]
        ids, supervised = (part[: self.lengths[number]] for part in self.chats.chat(number))
        if self.kind == "text_only":
            kept = ids != self.tokenizer.image
            ids, supervised = ids[kept], supervised[kept]
        return ids, supervised

    def images(self, i, spec=None):
        number = self.numbers[i]
        if self.kind == "text_only":
            return []
        if self.kind == "blank":
            return [blank(spec.size)] * self.chats.n_images(number)
        return self.chats.images(
            self.mismatched[number] if self.kind == "mismatched" else number, spec)


class ImageAblation:
    """The first n validation chats that fit T positions, packed once for each kind of images."""

    def __init__(self, chats, n, T, tokenizer, spec=None, others=("mismatched", "text_only")):
        correct = Packed([AblatedChats(chats, n, tokenizer)], T, tokenizer, spec)
        lengths = dict(correct.chats[["number", "n_ids"]].tolist())
        self.packed = {"correct": correct} | {
            kind: Packed([AblatedChats(chats, n, tokenizer, kind, lengths)], T, tokenizer, spec)
            for kind in others}

    def losses(self, machine, model, micro_rows):
        """{"val_loss", "val_loss_mismatched_image", "val_loss_text_only"}, nats per token."""
        return {f"val_loss{SUFFIXES[kind]}": validation_loss(
            machine, packed, micro_rows, model, len(packed))
            for kind, packed in self.packed.items()}

    def gains(self, nats):
        """{"mismatched", "blank"}: Score of the nats per token that the correct image saves.

        nats: {kind: what nats_by_chat returned}. Only chats with images, of which another has as
        many, count; empty if there are none.
        """
        correct, chats, found = nats["correct"], self.packed["mismatched"].sources[0], {}
        for kind in "mismatched", "blank":
            saved = {number: (nats[kind][number][0] - loss, n)
                     for number, (loss, n) in correct.items()
                     if chats.mismatched[number] != number and chats.chats.n_images(number)}
            if saved:
                found[kind] = score([*saved.values()], ratio, chance=0.0,
                                    clusters=[*map(chats.chats.cluster, saved)])
        return found


@torch.no_grad()
def nats_by_chat(machine, model, packed, micro_rows):
    """{number: (nats, supervised tokens)} of the chats of a Packed of one AblatedChats."""
    found, decoder, ablated = {}, getattr(model, "decoder", model), packed.sources[0]
    for start in range(0, len(packed), micro_rows):
        rows = range(start, min(start + micro_rows, len(packed)))
        batch = packed.batch(rows).to(machine.device)
        with machine.autocast():
            x = (decoder.token_embedding(batch.ids) if model is decoder
                 else model.embed(batch.ids, batch.pixels, batch.image_positions))
            mask = packed_mask(batch.segments, batch.bounds, batch.longest, compute_dtype(x))
            x = decoder.hidden(x, batch.positions, mask).flatten(0, 1)[batch.where]  # (N, C)
            # The supervised positions of a chat are consecutive: count those of each.
            segments = batch.segments.flatten()[batch.where]
            chats, counts = torch.stack((batch.where // packed.T, segments)).unique_consecutive(
                dim=1, return_counts=True)
            counts = counts.tolist()
            parts = zip(chats.T.tolist(), x.split(counts), batch.targets.split(counts), strict=True)
            for (row, number), states, targets in parts:
                place = packed.chats["number"][packed.rows[rows[row]][number - 1]]
                nats = head_loss(states, decoder.head.weight, targets).item()
                found[ablated.numbers[place]] = nats, len(targets)
    return found


def ignored_images_warning(losses):
    """A warning for the user if what ImageAblation.losses returned shows no gain, else ""."""
    mismatched = losses["val_loss_mismatched_image"] - losses["val_loss"]
    text_only = losses["val_loss_text_only"] - losses["val_loss"]
    if min(mismatched, text_only) >= LEAST_GAIN:
        return ""
    return ("warning: the model ignores images: the correct image lowers the validation loss by "
            f"only {mismatched:.3f} nats per token against a mismatched one and {text_only:.3f} "
            "against none. Train longer, with a higher rate; prepare.py check shows the data")
