"""Which questions and pictures of a benchmark stand in the data that a model was trained on.

A text is found by any 16 tokens that follow each other, a picture by its bytes, as they are or as
prepare.py stores them. Not found are a text in other words or of fewer tokens, a picture that was
cut differently, and pictures that were not copied (--copy=False).

The search grows with the training data alone: 40 M tokens a second of one processor, so under 1 s
in the demo's and 4 minutes in 10 B tokens; of pictures only those of equal length are read.
"""

import contextlib
import hashlib
import io
from pathlib import Path

import numpy as np

from common import hub
from common.config import UserError, read_json
from common.images import ImageError, fit, read_image
from data import Chats, check_tokenizer, read_array
from evals.tasks import DESCRIBE, LETTER, SHORT

WINDOW = 16  # tokens, a power of 2
BLOCK = 1 << 18  # tokens hashed at once: they stay in a processor's cache
BASE, MIX = 0x9E3779B97F4A7C15, np.uint64(0xD6E8FEB86659FD93)
TABLE = 24  # bits of the numbers of a table that most windows are turned away by
NONE, SETTINGS = np.empty(0, np.uint64), ("data", "text_data")


def overlaps(askings, info):
    """{"texts": share, "pictures": share, "n_texts", "n_pictures": of how many, "looked_at":
    folders} of each Asking; a share is None where there is nothing to look for or to look in.
    info: of the checkpoint, as checkpoint.read gives it."""
    folders = [folder for folder in data_folders(info) if folder.is_dir()]
    texts = [[windows_of(asking, question) for question in asking.questions] for asking in askings]
    texts = [[found for found in some if len(found)] for some in texts]
    wanted = np.unique(np.concatenate([NONE, *(found for some in texts for found in some)]))
    seen = texts_in(folders, wanted, askings[0].tokenizer) if len(wanted) else NONE
    results = []
    for asking, some in zip(askings, texts, strict=True):
        marks = [bool(among(found, seen).any()) for found in some]
        hits, n_shown = pictures_in(folders, asking)
        results.append({
            "texts": float(np.mean(marks)) if marks and folders else None, "n_texts": len(marks),
            "pictures": hits / n_shown if n_shown and folders else None, "n_pictures": n_shown,
            "looked_at": list(map(str, folders))})
    return results


def sentence(overlap):
    """The overlap of a task in words."""
    counts = [f"{round(overlap[kind] * overlap[f'n_{kind}'])} of {overlap[f'n_{kind}']} {kind}"
              for kind in ("texts", "pictures") if overlap[kind] is not None]
    if not overlap["looked_at"]:
        return "the training data is not here, so nothing was sought in it"
    return f"{', '.join(counts) or 'nothing that could be sought'} stand in the training data"


def data_folders(info):
    """The data folders that a checkpoint and those behind it were trained on, where it says so."""
    configs = [Path(stage["folder"]) / "config.json" for stage in info.get("lineage", [])]
    found = [info, *(read_json(config) for config in configs if config.is_file())]
    names = [config.get("settings", {}).get(key) for config in found for key in SETTINGS]
    return [Path(f"data/hub/{name.removeprefix(hub.PREFIX).strip('/').replace('/', '--')}"
                 if name.startswith(hub.PREFIX) else name)  # where hub.stream puts it
            for name in dict.fromkeys(names) if name]


# -------------------------------------------------------------------------------------------- texts


def hashes(ids):
    """A number (uint64) for each window of ids, the same for the same tokens."""
    found = (np.asarray(ids).astype(np.uint64) + np.uint64(1)) * MIX
    for width in (2**i for i in range(WINDOW.bit_length() - 1)):
        found = found[:-width] * np.uint64(pow(BASE, width, 2**64)) + found[width:]
    return found


def among(values, known):
    """Which values are in `known`, which is sorted; np.isin would sort it again."""
    return np.searchsorted(known, values, "right") > np.searchsorted(known, values)


def windows_of(asking, question):
    """The hashes of a question with each of its choices, and of its answers in words."""
    text = "\n".join(message["content"] for message in question.messages)
    for instruction in SHORT, LETTER, DESCRIBE:
        text = text.replace(f"\n{instruction}", "").replace(instruction, "")
    texts = [text, *(f"{text} {choice}" for choice in question.choices), *question.wanted]
    return np.unique(np.concatenate([NONE, *(hashes(asking.tokenizer.encode(t)) for t in texts)]))


def texts_in(folders, wanted, tokenizer):
    """Those of some hashes (sorted) that stand in the training texts of data folders."""
    table = np.zeros(1 << TABLE, bool)
    table[wanted >> np.uint64(64 - TABLE)] = True
    found = []
    for folder in folders:
        try:
            check_tokenizer(folder, tokenizer)
        except UserError:  # of a CLIP with a vocabulary of its own
            continue
        for path in [*sorted(folder.glob("*train*.npy")), *folder.glob("train/ids.npy")]:
            for start in range(0, len(read_array(path, np.uint16)) - WINDOW + 1, BLOCK):
                # Mapped for a block at a time: pages that were read belong to the process.
                block = read_array(path, np.uint16)[start : start + BLOCK + WINDOW - 1]
                here = hashes(block)
                here = here[table[here >> np.uint64(64 - TABLE)]]
                found.append(here[among(here, wanted)])
    return np.unique(np.concatenate([NONE, *found]))


# ----------------------------------------------------------------------------------------- pictures


def pictures_in(folders, asking):
    """(how many of an Asking's pictures stand in data folders, how many of them can be read)."""
    contents = []
    for name in dict.fromkeys(name for question in asking.questions for name in question.images):
        with contextlib.suppress(ImageError):
            contents.append(name if isinstance(name, bytes) else asking.find(name))
    hits = np.zeros(len(contents), bool)
    for folder in folders if contents else ():
        if not any(folder.glob("train/images_*.bin")):
            continue
        chats = Chats(folder, "train")
        if chats.stored.get("copied", True):
            stored = [{content, prepared(content, chats.stored)} for content in contents]
            there = stored_in(chats, set().union(*stored))
            hits |= [not some.isdisjoint(there) for some in stored]
    return int(hits.sum()), len(contents)


def prepared(content, stored):
    """What prepare.py makes of a picture's bytes; themselves where it cannot, or says not how."""
    if not {"size", "fit"} <= stored.keys():
        return content
    file, how = io.BytesIO(), (stored["size"], stored["fit"])
    with contextlib.suppress(ImageError):
        fit(read_image(content, "a picture", *how), *how).save(file, "JPEG", quality=90)
    return file.getvalue() or content


def stored_in(chats, wanted):
    """Those of some pictures' bytes that a Chats holds, by their sha256."""
    sums = {hashlib.sha256(content).digest(): content for content in wanted}
    alike = np.isin(np.diff(chats.image_offsets), list(map(len, wanted)))  # only these are read
    found = {hashlib.sha256(chats._bytes(n)).digest() for n in np.flatnonzero(alike)}
    return {sums[digest] for digest in found & sums.keys()}
