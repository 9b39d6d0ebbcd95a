"""Zero-shot classification: a CLIP tells apart the classes of a folder by their names alone.

    folder/tabby_cat/*.jpg    a subfolder a class, called as in a caption, with _ for a space
    folder/golf_ball/*.jpg

The caption of each class, "a photo of a golf ball.", is compared with each picture, and the nearest
is the answer (Radford et al. 2021, section 3.1).
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

from clip import normalise
from common.config import UserError
from common.device import cores
from common.images import ImageError, read_image, to_pixels

NAMED = 10  # so many of the pictures that cannot be read are named, the others counted


class Labelled:
    """The classes of a folder as captions, and its pictures with the number of their class."""

    def __init__(self, folder, prompt):
        self.folder = Path(folder)
        if "{}" not in prompt:
            raise UserError(f"--prompt={prompt!r} needs a {{}} where the name of the class belongs")
        if not self.folder.is_dir():
            raise UserError(f"there is no folder --zero_shot={folder}")
        classes = sorted(p for p in self.folder.iterdir() if p.is_dir() and p.name[0] != ".")
        self.captions = [prompt.replace("{}", path.name.replace("_", " ")) for path in classes]
        self.pictures = [(path, label) for label, of_class in enumerate(classes)
                         for path in sorted(of_class.rglob("*"))
                         if path.is_file() and path.name[0] != "."]
        if len(classes) < 2 or not self.pictures:
            raise UserError(f"--zero_shot={folder} holds {len(classes)} classes with "
                            f"{len(self.pictures)} pictures: it needs a subfolder of pictures for "
                            "each class, and at least two")


def zero_shot(model, tokenizer, labelled, machine, batch=256):
    """The share of a Labelled's pictures whose own class is the nearest to them."""
    right, n = counted(model, tokenizer, labelled, machine, batch)
    return right / n


@torch.no_grad()
def counted(model, tokenizer, labelled, machine, batch=256):
    """(how many of a Labelled's pictures have their own class nearest to them, of how many).

    The processes divide the pictures. Those that cannot be read do not count, and are named.
    """
    ids = caption_ids(tokenizer, labelled.captions, model.config.context).to(machine.device)
    with machine.autocast():
        texts = torch.cat([model.text_features(part) for part in ids.split(batch)])  # (classes, E)
    mine, lost = labelled.pictures[machine.rank :: machine.ranks], []
    counts = torch.zeros(2, dtype=torch.long, device=machine.device)  # right, all
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes that share this machine's cores
    with ThreadPoolExecutor(max(1, cores() // here)) as pool:
        for start in range(0, len(mine), batch):
            part = mine[start : start + batch]
            squares = list(pool.map(lambda item: square(item[0], model.config), part))
            lost += [str(error) for error in squares if isinstance(error, ImageError)]
            read = [i for i, pixels in enumerate(squares) if isinstance(pixels, torch.Tensor)]
            if not read:
                continue
            pixels = torch.cat([squares[i] for i in read]).to(machine.device)
            labels = torch.tensor([part[i][1] for i in read], device=machine.device)
            with machine.autocast():
                images = model.image_features(normalise(pixels))
            right = ((images @ texts.T).argmax(-1) == labels).sum()
            counts += torch.stack((right, labels.new_tensor(len(read))))
    if lost:
        more = f" and {len(lost) - NAMED} more" if len(lost) > NAMED else ""
        print(f"({labelled.folder}: {len(lost)} pictures left out: {'; '.join(lost[:NAMED])}"
              f"{more})", file=sys.stderr)
    right, n = machine.sum(counts).tolist()
    if n == 0:
        raise UserError(f"not one picture of --zero_shot={labelled.folder} can be read")
    return right, n


def square(path, config):
    """A picture as uint8 pixels (1, S, S, 3), or the ImageError that says why not."""
    size, how = config.image_size, config.fit
    try:
        return to_pixels([read_image(path, size=size, how=how)], size, how)
    except ImageError as error:
        return error


def caption_ids(tokenizer, captions, context):
    """Captions as CLIP was trained on, packing.Captions', as one tensor (captions, T)."""
    rows = [[tokenizer.end_of_text, *tokenizer.encode(text)[: context - 2], tokenizer.end]
            for text in captions]
    longest = max(map(len, rows))
    return torch.tensor([ids + [tokenizer.end] * (longest - len(ids)) for ids in rows])


# ------------------------------------------------------------------------------- caption retrieval


@torch.no_grad()
def features_of(model, pairs, machine, n, batch=256):
    """(pictures (n, E), captions (n, E), keys) of the first n of a packing.Captions, n at most."""
    images, texts, keys = [], [], []
    n = min(n, len(pairs))
    for start in range(0, n, batch):
        part = pairs.batch(range(start, min(start + batch, n))).to(machine.device)
        with machine.autocast():
            images.append(model.image_features(normalise(part.pixels)))
            texts.append(model.text_features(part.ids))
        keys += part.keys.tolist()
    return torch.cat(images), torch.cat(texts), keys


def caption_choice(model, pairs, machine, n=2048, choices=32, batch=256):
    """(share of pictures whose own caption, of `choices` different ones, is the nearest; the
    cross-entropy of that choice in nats), over the first n of a packing.Captions."""
    marks, loss = choose_captions(model, *features_of(model, pairs, machine, n, batch), choices)
    return sum(marks) / len(marks), loss


@torch.no_grad()
def choose_captions(model, images, texts, keys, choices=32):
    """(whether each picture chose its own caption, the cross-entropy) of what features_of found."""
    marks, losses = [], []
    for group in groups_of_different(keys, choices):
        logits = model.scale() * images[group] @ texts[group].T
        targets = torch.arange(len(group), device=logits.device)
        marks += (logits.argmax(-1) == targets).tolist()
        losses.append(F.cross_entropy(logits, targets).item())
    return marks, sum(losses) / len(losses)


def groups_of_different(keys, size):
    """Lists of `size` numbers into keys, no key twice in all of them; one list of fewer if there
    are no more different ones."""
    unlike = list({key: i for i, key in enumerate(keys)}.values())  # one row of each caption
    size = min(size, len(unlike))
    return [unlike[i : i + size] for i in range(0, len(unlike) - size + 1, size)]
