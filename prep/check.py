"""Inspect a data set before paying for a GPU.

    python prepare.py check DATA

DATA is a file of rows, which is converted into a temporary folder just as `prepare.py images` does
it, or a folder that prepare.py made. Then every chat is read as training reads it.
"""

import hashlib
import os
import tempfile
import textwrap
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np

import tokenizer as tokenizers
from common.config import UserError, read_sealed
from common.device import cores
from common.images import ImageError
from data import Chats, ImageSpec, check_tokenizer
from prep.convert import image_reader, read_chats, write_split
from prep.sources import Refused, at_least, source_of
from prep.writers import check_size
from train.packing import Packed

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
COLUMNS, TILES = 4, 16  # of the contact sheet
LINE_WIDTH, LINES = 44, 10  # characters and lines of the text of a tile
BLOCK = 4096  # chats inspected at a time


@dataclass
class Check:
    """Count what is in a data set, what is wrong with it, and what training makes of it.

    DATA is a .json, .jsonl or .parquet file or a pattern, or a folder that prepare.py made.
    """

    # --- source
    files: str = ""  # DATA, if it is not the first argument: paths or patterns, comma-separated
    dataset: str = ""  # instead of files: a data set of the Hugging Face hub, or a folder of one
    subset: str = ""  # which configuration of the data set, where it has several
    split: str = "train"  # which split of the data set
    image_root: str = ""  # where the images are, as in prepare.py images
    max_chats: int = 0  # chats of files or a dataset to convert, the first ones; 0 for all

    # --- training
    tokenizer: str = "gpt2"  # gpt2, or a folder with a tokenizer.json; a made folder has its own
    context: int = 1024  # positions of a training row
    patches: int = 256  # positions of an image in it: 256 for ViT-L/14 at 224 pixels
    image_size: int = 224  # pixels of the square that images are fitted into
    fit: Literal["pad", "short"] = "pad"  # how they are fitted, as in prepare.py images
    short_answers: bool = False  # as in prepare.py images
    batch_tokens: int = 65_536  # positions of a training step

    # --- output
    sheet: str = "contact_sheet.png"  # image of 16 random chats; empty for none
    seed: int = 0  # of the draw
    show: int = 0  # above 0: print chat number N token by token, and nothing else


def data_first(argv):
    """DATA as the flag --files, where it is the first argument."""
    if not argv or argv[0].startswith("-"):
        return argv
    if any(flag.startswith("--files") for flag in argv):
        raise UserError(f"both {argv[0]} and --files are given; say only one")
    return [f"--files={argv[0]}", *argv[1:]]


def check(cfg):
    """Print what is in the data set, and return these figures; with --show one chat of it."""
    at_least(cfg, max_chats=0, context=2, patches=1, image_size=1, batch_tokens=1, seed=0, show=0)
    if cfg.sheet and not Path(cfg.sheet).absolute().parent.is_dir():
        raise UserError(f"there is no folder for {cfg.sheet}; make it first")
    # beside the data that prepare.py will make, as /tmp may be small
    with tempfile.TemporaryDirectory(prefix=".check-", dir=".") as work, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of images, and of letters that the sheet's font lacks
        if os.path.isdir(cfg.files) and not cfg.dataset:
            data = opened(cfg.files)
        else:
            data = converted(cfg, Path(work))
        if cfg.show > len(data.chats):
            raise UserError(f"--show={cfg.show}: {data.name} has only {len(data.chats):,} chats "
                            "that can be used")
        if cfg.show:
            return print_tokens(data, data.chats[cfg.show - 1], cfg.patches)
        figures = inspected(cfg, data)
        print_figures(figures)
        if cfg.sheet:
            try:
                draw_sheet(cfg.sheet, data, cfg.seed)
            except OSError as error:
                raise UserError(f"cannot write the contact sheet: {error}") from None
            print(f"contact sheet of random chats: {cfg.sheet}")
    print(figures["verdict"])
    return figures


# ------------------------------------------------------------------------------------ the data set


@dataclass
class DataSet:
    """A data set of prepare.py: its chats, what to call them, and the rows that it left out."""

    name: str
    tokenizer: object
    splits: list  # data.Chats
    chats: list  # (name, split, number in the split)
    left_out: dict  # {reason: {"rows": how many, "first": names}}


def opened(path):
    """The DataSet in a folder that prepare.py made; its checksums are verified first."""
    folder, name = Path(path), path.rstrip("/")
    if not (folder / "manifest.json").is_file():
        raise UserError(f"the folder {name} has no manifest.json, so prepare.py did not make it; "
                        f"name files, like '{name}/*.json'")
    found = {path.parent.name for path in folder.glob("*/ids.npy")}
    if not found:
        raise UserError(f"{name} holds no chats; name a folder that prepare.py chat or images made")
    tokenizer = check_tokenizer(folder)
    names = sorted(found, key=lambda split: (split != "train", split != "val", split))
    splits = [Chats(folder, split) for split in names]
    chats = [(f"{split}:{i + 1}", s, i) for s, split in enumerate(names)
             for i in range(len(splits[s]))]
    left_out = read_sealed(folder / "manifest.json").get("left_out", {})
    return DataSet(name, tokenizer, splits, chats, left_out)


def converted(cfg, work):
    """The DataSet that prepare.py images makes of rows, in one split; no more than --show needs."""
    source, tokenizer = source_of(cfg), tokenizers.load(cfg.tokenizer)
    check_size(tokenizer, cfg)
    settings = SimpleNamespace(**vars(cfg), copy=True)
    settings.max_chats = cfg.show or cfg.max_chats
    (work / "records").mkdir()
    found, refused = read_chats(settings, work / "records", {"rows": source}, tokenizer,
                                image_reader(settings))
    records, left_out = found["rows"], refused.table()
    if len(records) == 0:
        hint = "; is --image_root right?" if "a missing image" in left_out else ""
        raise UserError(f"{source.name} holds no row that can be used{hint}")
    chosen = range(min(len(records), settings.max_chats or len(records)))
    write_split(work / "data/train", records, chosen, shard_bytes=1_000_000_000)
    chats = [(f"row {row + 1}", 0, i) for i, row in enumerate(records.starts[chosen])]
    return DataSet(source.name, tokenizer, [Chats(work / "data", "train")], chats, left_out)


# ------------------------------------------------------------------------------------- its figures


def measured(data, chat):
    """(ids, images, answers, key, problem) of a chat: three counts, a key that equal chats share,
    and why the chat cannot be used."""
    _, split, number = chat
    ids, supervised = data.splits[split].chat(number)
    key, problem, images = hashlib.blake2b(ids.tobytes(), digest_size=8), "", []
    try:
        images = data.splits[split].images(number)
    except ImageError as error:
        problem = error.reason
    for image in images:
        key.update(image.tobytes())
    n_images = int(np.count_nonzero(ids == data.tokenizer.image))
    answers = int(np.count_nonzero(supervised & (ids == data.tokenizer.end)))
    return len(ids), n_images, answers, key.digest(), problem


def all_measured(data):
    """Yield (chat, *measured(data, chat)) of every chat, in order; images are decoded in threads.
    """
    with ThreadPoolExecutor(cores()) as pool:
        for start in range(0, len(data.chats), BLOCK):
            block = data.chats[start : start + BLOCK]
            for chat, found in zip(block, pool.map(partial(measured, data), block), strict=True):
                yield chat, *found


def inspected(cfg, data):
    """The figures of a data set."""
    packed = Packed(data.splits, cfg.context, data.tokenizer, ImageSpec(cfg.patches, 0))
    used = packed.chats[["source", "number", "truncated"]].tolist()
    truncated = {(split, number): truncated for split, number, truncated in used}
    left_out, notes, keys, positions, good = Refused(), Refused(), set(), [], Counter()
    for (name, *place), n_ids, n_images, n_answers, key, problem in all_measured(data):
        place = tuple(place)
        positions.append(n_ids + n_images * (cfg.patches - 1))
        if not problem and place not in truncated:
            problem = (f"its first answer ends beyond {cfg.context:,} positions"
                       if n_answers else "no supervised token")
        if problem:
            left_out.add(problem, name)
            continue
        for note, applies in (
            (f"truncated after an answer to {cfg.context:,} positions", truncated[place]),
            ("no image", n_images == 0), ("more than one image", n_images > 1),
            ("a copy of an earlier chat: the same text and images", key in keys),
        ):
            if applies:
                notes.add(note, name)
        keys.add(key)
        good.update(rows=1, answers=n_answers, images=n_images)
    return {
        "data": data.name, "rows": len(data.chats), "good": dict(good),
        "left out when prepared": data.left_out, "left out by training": left_out.table(),
        "kept, and worth knowing": notes.table(),
        "positions": np.percentile(positions, PERCENTILES, method="nearest").tolist(),
        "training_rows": len(packed), "filled": float(packed.filled),
        "steps": -(-len(packed) // max(1, cfg.batch_tokens // cfg.context)),
        "context": cfg.context, "batch_tokens": cfg.batch_tokens,
        "verdict": verdict(good["rows"], len(data.chats), data.left_out),
    }


def verdict(good, chats, left_out):
    """Whether the data set can be trained on, in one line."""
    rows = chats + sum(found["rows"] for found in left_out.values())
    if good == rows:
        return f"all {rows:,} rows are good: this can be trained on as it is"
    hint = "; look at the reasons first" if good < 0.9 * rows else ""
    return f"{good:,} of {rows:,} rows are good; training leaves the others out{hint}"


def print_figures(figures):
    """The figures of `inspected`, aligned."""
    good = figures["good"]
    print(f"{figures['data']}: {figures['rows']:,} chats, {good['rows']:,} of them good, "
          f"with {good['answers']:,} answers and {good['images']:,} images")
    for title in "left out when prepared", "left out by training", "kept, and worth knowing":
        print(f"\n{title}" * bool(figures[title]))
        for reason, found in figures[title].items():
            more = ", ..." if found["rows"] > len(found["first"]) else ""
            print(f"{found['rows']:>8,}  {reason} ({', '.join(found['first'])}{more})")
    print(f"\n{'percentile':<20}" + "".join(f"{q:>8}" for q in PERCENTILES))
    print(f"{'positions per chat':<20}" + "".join(f"{n:>8,}" for n in figures["positions"]))
    print(f"\nan epoch: {figures['steps']:,} steps of {figures['batch_tokens']:,} positions "
          f"({figures['training_rows']:,} packed rows of {figures['context']:,}, "
          f"{figures['filled']:.1%} filled)")


# ------------------------------------------------------------------------------------ single chats


def print_tokens(data, chat, patches):
    """The ids of a chat one per line: position, id, whether it is supervised, text (special
    tokens without quotes)."""
    (name, split, i), tokenizer = chat, data.tokenizer
    ids, supervised = data.splits[split].chat(i)
    print(f"{name}\n{'position':>9}  {'id':>6}  {'supervised':<10}  token")
    at, special = 0, set(tokenizer.specials.values())
    for i, mask in zip(ids.tolist(), supervised.tolist(), strict=True):
        text = tokenizer.decode([i])
        text = text if i in special else repr(text)
        width = patches if i == tokenizer.image else 1
        times = f" x {width}" if i == tokenizer.image else ""
        print(f"{at:>9,}  {i:>6}  {'yes' if mask else '-':<10}  {text}{times}")
        at += width


def draw_sheet(path, data, seed):
    """A PNG of random chats: the first image of each, and the beginning of its text."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 15))
    axes = figure.subplots(TILES // COLUMNS, COLUMNS)
    figure.subplots_adjust(0.01, 0.12, 0.99, 0.98, wspace=0.05, hspace=0.8)
    for ax in axes.flat:
        ax.set_axis_off()
    chosen = np.sort(np.random.default_rng(seed).permutation(len(data.chats))[:TILES])
    for ax, number in zip(axes.flat, chosen.tolist(), strict=False):
        name, split, i = data.chats[number]
        text = data.tokenizer.decode(data.splits[split].chat(i)[0].tolist())
        try:
            images = data.splits[split].images(i)
        except ImageError as error:
            images, text = [], f"{error.reason}: {text}"
        if images:
            ax.imshow(images[0])
        ax.set_title(name, fontsize=8, color="grey", loc="left")
        lines = textwrap.wrap(text, LINE_WIDTH, max_lines=LINES)
        ax.text(0, -0.02, "\n".join(lines), transform=ax.transAxes, fontsize=8, va="top",
                parse_math=False)
    figure.savefig(path, format="png", dpi=100)
