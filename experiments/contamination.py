"""Which questions and images of a benchmark are in the data that a model was trained on.

    python experiments/contamination.py out/full/vision_sft --tasks=pope:coco_pope.json
    python experiments/contamination.py out/full/sft --tasks=... --data=data/expanded

A text is found by any 16 consecutive tokens, an image by its bytes, as they are or as prepare.py
stores them. Not found are paraphrases, shorter texts and images in another crop. It takes 4 minutes
for 10 B tokens of training data.
"""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import hub
from common.config import UserError, parse_checkpoint, read_json, run_main
from common.device import pick_device
from common.images import ImageError
from data import Chats, check_tokenizer, read_array, shards_in
from evals.runner import runners_of
from evals.tasks import DESCRIBE, LETTER, SHORT
from inference.conversation import open_for_chat
from prep.convert import resized

WINDOW = 16  # tokens, a power of 2
BLOCK = 1 << 18  # tokens hashed at once: they fit a CPU's cache
BASE, MIX = 0x9E3779B97F4A7C15, np.uint64(0xD6E8FEB86659FD93)
TABLE = 24  # bits of the hashes in a lookup table that rejects most windows
NONE = np.empty(0, np.uint64)


@dataclass
class Config:
    # --- benchmarks, as in eval.py
    tasks: str = ""  # NAME:FILE,NAME:FILE
    image_root: str = ""  # folder, zip or tar with their images
    items: int = 1000  # maximum number of items per task

    # --- training data
    data: str = ""  # comma-separated data folders; empty for all that the checkpoint is trained on


def main():
    name, cfg = parse_checkpoint(Config)
    model, tokenizer, info = open_for_chat(name, pick_device("cpu"))
    runners = runners_of(cfg, model, tokenizer, info, out="")
    folders = list(map(Path, filter(None, cfg.data.split(","))))
    for task, overlap in zip(runners, overlaps(list(runners.values()), info, folders), strict=True):
        print(f"{task}: {sentence(overlap)}")


def overlaps(runners, info, folders=()):
    """{"texts": share, "images": share, "n_texts", "n_images": of how many, "searched": folders}
    of each TaskRunner; a share is None where there is nothing to search for or in.

    info: of the checkpoint, as checkpoint.read returns it; its data folders are searched, or else
    `folders`.
    """
    folders = folders or data_folders(info)
    texts = [[windows_of(runner, question) for question in runner.questions] for runner in runners]
    wanted = np.unique(np.concatenate([NONE, *(found for some in texts for found in some)]))
    seen = texts_in(folders, wanted, runners[0].tokenizer) if len(wanted) else NONE
    results = []
    for runner, some in zip(runners, texts, strict=True):
        marks = [bool(is_in(found, seen).any()) for found in some if len(found)]
        hits, n_images = images_in(folders, runner)
        results.append({
            "texts": float(np.mean(marks)) if marks and folders else None, "n_texts": len(marks),
            "images": hits / n_images if n_images and folders else None, "n_images": n_images,
            "searched": list(map(str, folders))})
    return results


def sentence(overlap):
    """The overlap of a task in words."""
    if not overlap["searched"]:
        return "contamination unknown: the training data is not on this machine"
    counts = [f"{round(overlap[kind] * overlap[f'n_{kind}'])} of {overlap[f'n_{kind}']} {kind}"
              for kind in ("texts", "images") if overlap[kind] is not None]
    return (f"{', '.join(counts)} found in the training data" if counts
            else "contamination unknown: all texts are too short")


def data_folders(info):
    """The data folders of a checkpoint and its lineage that are on this machine."""
    stages = [info, *info.get("lineage", [])]
    configs = [Path(stage["folder"]) / "config.json" for stage in stages if "settings" not in stage]
    found = [*stages, *(read_json(config) for config in configs if config.is_file())]
    names = [config.get("settings", {}).get(key) for config in found
             for key in ("data", "text_data", "replay")]
    names = [f"data/hub/{name.removeprefix(hub.PREFIX).strip('/').replace('/', '--')}"
             if name.startswith(hub.PREFIX) else name  # where hub.stream puts it
             for name in dict.fromkeys(names) if name]
    return [Path(name) for name in names if Path(name).is_dir()]


def hashes(ids):
    """A hash (uint64) of each window of ids."""
    found = (np.asarray(ids).astype(np.uint64) + np.uint64(1)) * MIX
    for width in (2**i for i in range(WINDOW.bit_length() - 1)):
        found = found[:-width] * np.uint64(pow(BASE, width, 2**64)) + found[width:]
    return found


def is_in(values, known):
    """Which values are in the sorted array `known`, which np.isin would sort again."""
    return np.searchsorted(known, values, "right") > np.searchsorted(known, values)


def windows_of(runner, question):
    """The hashes of a question with each of its choices, and of its reference answers."""
    text = "\n".join(message["content"] for message in question.messages)
    for instruction in SHORT, LETTER, DESCRIBE:
        text = text.replace(f"\n{instruction}", "").replace(instruction, "")
    texts = [text, *(f"{text} {choice}" for choice in question.choices), *question.references]
    return np.unique(np.concatenate([hashes(runner.tokenizer.encode(t)) for t in texts]))


def texts_in(folders, wanted, tokenizer):
    """Those of some hashes (sorted) that are in the training texts of data folders."""
    table = np.zeros(1 << TABLE, bool)
    table[wanted >> np.uint64(64 - TABLE)] = True
    found = [NONE]
    for folder in folders:
        try:
            check_tokenizer(folder, tokenizer)
        except UserError:  # of a CLIP with another vocabulary
            continue
        for path in [*shards_in(folder, "train"), *folder.glob("train/ids.npy")]:
            for start in range(0, len(read_array(path, np.uint16)) - WINDOW + 1, BLOCK):
                # Mapped again for each block: pages that were read count as memory of the process.
                block = read_array(path, np.uint16)[start : start + BLOCK + WINDOW - 1]
                here = hashes(block)
                here = here[table[here >> np.uint64(64 - TABLE)]]
                found.append(here[is_in(here, wanted)])
    return np.unique(np.concatenate(found))


def images_in(folders, runner):
    """(how many of a TaskRunner's images are in data folders, how many are readable)."""
    contents = []
    for name in dict.fromkeys(name for question in runner.questions for name in question.images):
        with contextlib.suppress(ImageError):
            contents.append(name if isinstance(name, bytes) else runner.find(name))
    hits = np.zeros(len(contents), bool)
    for folder in folders if contents else ():
        if any(folder.glob("train/images_*.bin")):
            chats, variants = Chats(folder, "train"), [{content} for content in contents]
            if how := chats.manifest.get("stored_images"):
                cfg = SimpleNamespace(image_size=how["size"], fit=how["fit"])
                for content, variant in zip(contents, variants, strict=True):
                    with contextlib.suppress(ImageError):
                        variant.add(resized(content, None, cfg))  # as prepare.py stores it
            wanted = set().union(*variants)
            same_size = np.isin(np.diff(chats.image_offsets), list(map(len, wanted)))
            stored = map(chats._bytes, np.flatnonzero(same_size))  # the others are not read
            found = {content for content in stored if content in wanted}
            hits |= [not variant.isdisjoint(found) for variant in variants]
    return int(hits.sum()), len(contents)


if __name__ == "__main__":
    run_main(main)
