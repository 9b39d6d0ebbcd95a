"""Zero-shot classification and caption retrieval by a CLIP.

    folder/tabby_cat/*.jpg    one subfolder per class, named as in a caption, with _ for a space

The class whose caption, "a photo of a tabby cat.", is the most similar to an image is the answer
(Radford et al. 2021, section 3.1).
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from clip import caption_ids, contrast, normalise
from common.config import UserError
from common.device import cores
from common.images import ImageError, fit, read_image, to_pixels
from vision import image_spec

NAMED = 10  # unreadable images that are named; more are counted


class Labelled:
    """The classes of a folder as captions, and its images with the number of their class."""

    def __init__(self, folder, prompt):
        self.folder = Path(folder)
        if "{}" not in prompt:
            raise UserError(f"--prompt={prompt!r} needs {{}} in the place of the class name")
        classes = sorted(p for p in self.folder.glob("*") if p.is_dir() and p.name[0] != ".")
        self.captions = [prompt.replace("{}", path.name.replace("_", " ")) for path in classes]
        self.images = [(path, label) for label, of_class in enumerate(classes)
                       for path in sorted(of_class.rglob("*"))
                       if path.is_file() and path.name[0] != "."]
        if len(classes) < 2 or not self.images:
            raise UserError(f"--zero_shot={folder} has {len(classes)} classes with "
                            f"{len(self.images)} images: it has to be a folder with a subfolder of "
                            "images for each class, and at least two classes")


@torch.no_grad()
def zero_shot(model, tokenizer, labelled, machine, batch=256):
    """(images of a Labelled that are most similar to the caption of their class, all its images).

    The images are divided among the processes. Unreadable ones are named and not counted.
    """
    ids = caption_ids(tokenizer, labelled.captions, model.config.context).to(machine.device)
    with machine.autocast():
        texts = torch.cat([model.text_features(part) for part in ids.split(batch)])  # (classes, E)
    mine, spec = labelled.images[machine.rank :: machine.ranks], image_spec(model.config)[1:]
    counts, errors = torch.zeros(2, dtype=torch.long, device=machine.device), []  # correct, all
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # that share the cores
    with ThreadPoolExecutor(max(1, cores() // processes)) as pool:
        for start in range(0, len(mine), batch):
            part, images, labels = mine[start : start + batch], [], []
            loading = [pool.submit(lambda path: fit(read_image(path, None, *spec), *spec), path)
                       for path, _ in part]
            for image, (_, label) in zip(loading, part, strict=True):
                try:
                    images.append(image.result())
                    labels.append(label)
                except ImageError as error:
                    errors.append(str(error))
            if images:
                with machine.autocast():
                    images = model.image_features(normalise(
                        to_pixels(images, *spec).to(machine.device)))
                nearest = (images @ texts.T).argmax(-1)
                counts[0] += (nearest == nearest.new_tensor(labels)).sum()
                counts[1] += len(labels)
    if errors:
        more = f" and {len(errors) - NAMED} more" if len(errors) > NAMED else ""
        print(f"({labelled.folder}: {len(errors)} images left out: {'; '.join(errors[:NAMED])}"
              f"{more})", file=sys.stderr)
    correct, total = machine.sum(counts).tolist()
    if total == 0:
        raise UserError(f"no image of --zero_shot={labelled.folder} is readable")
    return correct, total


@torch.no_grad()
def features_of(model, pairs, machine, n, batch=256):
    """(image features (n, E), text features (n, E), keys) of the first n pairs of a Captions."""
    images, texts, keys = [], [], []
    n = min(n, len(pairs))
    for start in range(0, n, batch):
        part = pairs.batch(range(start, min(start + batch, n))).to(machine.device)
        with machine.autocast():
            images.append(model.image_features(normalise(part.pixels)))
            texts.append(model.text_features(part.ids))
        keys += part.keys.tolist()
    return torch.cat(images), torch.cat(texts), keys


@torch.no_grad()
def caption_choice(images, texts, keys, choices=32):
    """Whether each image is most similar to its caption among `choices` different ones, of what
    features_of returned."""
    marks = []
    for group in groups_of_different(keys, choices):
        nearest = (images[group] @ texts[group].T).argmax(-1)
        marks += (nearest == torch.arange(len(group), device=nearest.device)).tolist()
    return marks


@torch.no_grad()
def contrastive_loss(model, images, texts, keys, batch):
    """The training loss (clip.contrast) of what features_of returned: the mean over groups of
    `batch` pairs, or over all pairs if there are fewer."""
    n, keys = min(batch, len(keys)), torch.tensor(keys, device=images.device)
    groups = zip(*(x[: len(x) // n * n].split(n) for x in (images, texts, keys)), strict=True)
    losses = [contrast(images, texts, model.scale(), keys, gather=lambda rows: rows).item()
              for images, texts, keys in groups]
    return sum(losses) / len(losses)


def groups_of_different(keys, size):
    """Lists of `size` indices into keys without equal keys; a single shorter list if there are
    fewer different ones."""
    unique = list({key: i for i, key in enumerate(keys)}.values())
    size = min(size, len(unique))
    return [unique[i : i + size] for i in range(0, len(unique) - size + 1, size)]
