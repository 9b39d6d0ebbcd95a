"""Inspect a data set before paying for a GPU: prepare.py check.

Rows are converted as `prepare.py images` does it, in a temporary folder; a folder that prepare.py
made is taken as it is. Then every chat is read as training reads it.
"""

import os
import tempfile
import textwrap
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import tokenizer as tokenizers
from common.atomic import check_output, writing
from common.config import UserError
from data import Chats, ImageSpec, check_kind, check_tokenizer
from prep.convert import read_chats, splits_of
from prep.sources import Refused, show, sources_of
from prep.writers import write_split
from train.packing import Packed

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)


@dataclass
class DataSet:
    """A data set of prepare.py: its chats, what to call them, and the rows that it left out."""

    name: str
    tokenizer: object
    splits: list  # data.Chats, that of training first
    chats: list  # (name, split, number in the split)
    left_out: dict  # {reason: {"rows": count, "first": names}}
    unused: dict  # the same of its columns with text that nothing reads


def check(cfg):
    """Print what is in the data set, or with --show one chat of it."""
    if cfg.sheet and not cfg.show:
        check_output(cfg.sheet, "--sheet=")
    # beside the data that prepare.py will make, as /tmp may be small
    with tempfile.TemporaryDirectory(prefix=".check-", dir=".") as work, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the sheet's font lacks
        if os.path.isdir(cfg.files) and not cfg.dataset:
            data = opened(cfg.files)
        else:
            data = converted(cfg, Path(work))
        if cfg.show > len(data.chats):
            raise UserError(f"--show={cfg.show}: {data.name} has only {len(data.chats):,} chats "
                            "that can be used")
        if cfg.show:
            return print_tokens(data, *data.chats[cfg.show - 1], cfg.patches)
        verdict = print_figures(cfg, data)
        if cfg.sheet:
            with writing(cfg.sheet, "--sheet="):
                draw_sheet(cfg.sheet, data, cfg.seed)
            print(f"contact sheet of random chats: {cfg.sheet}")
        print(verdict)


def opened(path):
    """The DataSet in a folder that prepare.py made; its checksums are verified first."""
    folder, name = Path(path), path.rstrip("/")
    names = sorted({path.parent.name for path in folder.glob("*/ids.npy")},
                   key=lambda name: (name != "train", name))
    check_kind(name, "images", "chats", setting="")
    if names[:1] != ["train"] or not (folder / "manifest.json").is_file():
        raise UserError(f"{name} has no manifest.json or no train folder: prepare.py did not make "
                        "it, or it is not complete")
    tokenizer = check_tokenizer(folder)
    splits = [Chats(folder, split) for split in names]
    chats = [(f"{split}:{i + 1}", s, i) for s, split in enumerate(names)
             for i in range(len(splits[s]))]
    tables = (splits[0].manifest.get(table, {}) for table in ("left_out", "unused"))
    return DataSet(name, tokenizer, splits, chats, *tables)


def converted(cfg, work):
    """The DataSet that prepare.py images makes of rows; no more than --show needs."""
    cfg = replace(cfg, max_chats=cfg.show or cfg.max_chats, val_files="",
                  val_share=0 if cfg.val_files else cfg.val_share)
    sources, tokenizer = sources_of(cfg), tokenizers.load(cfg.tokenizer)
    (work / "records").mkdir()
    name, splits, places = sources["rows"].name, [], {}
    with read_chats(cfg, work / "records", sources, tokenizer) as (records, notes):
        names = list(records["rows"].column("name"))
        for split, (rows, numbers) in splits_of(cfg, records, cfg.max_chats).items():
            if len(numbers):  # nothing may be held out
                write_split(work / "data" / split, (rows[i] for i in np.sort(numbers)))
                places |= {i: (len(splits), k) for k, i in enumerate(np.sort(numbers))}
                splits.append(Chats(work / "data", split))
    chats = [(names[i], *places[i]) for i in sorted(places)]
    return DataSet(name, tokenizer, splits, chats, **notes)


def inspected(cfg, data, packed):
    """(counts of good chats, positions of every chat, Refused by training, Refused with notes)."""
    used = packed.chats[["source", "number", "n_ids", "truncated"]].tolist()
    kept = {(split, number): found for split, number, *found in used}
    good, positions, left_out, notes = Counter(), [], Refused(), Refused()
    for name, split, number in data.chats:
        ids, supervised = data.splits[split].chat(number)
        is_image, is_end = ids == data.tokenizer.image, supervised & (ids == data.tokenizer.end)
        positions.append(len(ids) + is_image.sum() * (cfg.patches - 1))
        if (split, number) not in kept:
            left_out.add(f"its first answer ends beyond {cfg.context:,} positions" if is_end.any()
                         else "no supervised token", [name])
            continue
        n_ids, truncated = kept[split, number]
        if truncated:
            notes.add(f"truncated after an answer to {cfg.context:,} positions", [name])
        good.update(rows=1, answers=is_end[:n_ids].sum(), images=is_image[:n_ids].sum())
    return good, positions, left_out, notes


def print_figures(cfg, data):
    """Print what training makes of a data set; returns whether it can be trained on, in a line."""
    packed, training = (Packed(splits, cfg.context, data.tokenizer, ImageSpec(cfg.patches, 0))
                        for splits in (data.splits, data.splits[:1]))
    good, positions, left_out, notes = inspected(cfg, data, packed)
    print(f"{data.name}: {len(data.chats):,} chats, {good['rows']:,} of them good, with "
          f"{good['answers']:,} answers and {good['images']:,} images")
    for title, table in {"left out when prepared": data.left_out,
                         "left out by training": left_out.table(),
                         "kept, and worth knowing": notes.table() | data.unused}.items():
        if table:
            print(f"\n{title}")
            show(table)
    percentiles = np.percentile(positions, PERCENTILES, method="nearest")
    print(f"\n{'percentile':<20}" + "".join(f"{q:>8}" for q in PERCENTILES))
    print(f"{'positions per chat':<20}" + "".join(f"{n:>8,}" for n in percentiles))
    steps = -(-len(training) // max(1, cfg.batch_tokens // cfg.context))
    print(f"\nan epoch of the training split: {steps:,} steps of {cfg.batch_tokens:,} positions "
          f"({len(training):,} packed rows of {cfg.context:,}, {training.filled:.1%} filled)")
    n_rows = len(data.chats) + sum(entry["rows"] for entry in data.left_out.values())
    if data.unused:
        return (f"{good['rows']:,} of {n_rows:,} rows can be trained on, but without the columns "
                "that are not used (above): rename them, or name them in --ignore_columns")
    if good["rows"] == n_rows:
        return f"all {n_rows:,} rows are good: this can be trained on as it is"
    return f"{good['rows']:,} of {n_rows:,} rows are good; training leaves the others out"


def print_tokens(data, name, split, number, patches):
    """The ids of a chat one per line; text is in quotes, special tokens are not."""
    tokenizer = data.tokenizer
    print(f"{name}\n{'position':>9}  {'id':>6}  {'supervised':<10}  token")
    at, special = 0, set(tokenizer.specials.values())
    for i, mask in zip(*data.splits[split].chat(number), strict=True):
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
    axes = figure.subplots(4, 4)
    figure.subplots_adjust(0.01, 0.12, 0.99, 0.98, wspace=0.05, hspace=0.8)
    for ax in axes.flat:
        ax.set_axis_off()
    chosen = np.random.default_rng(seed).permutation(len(data.chats))[:16]
    for ax, i in zip(axes.flat, np.sort(chosen), strict=False):
        name, split, number = data.chats[i]
        ids, _ = data.splits[split].chat(number)
        for image in data.splits[split].images(number)[:1]:
            ax.imshow(image)
        ax.set_title(name, fontsize=8, color="grey", loc="left")
        lines = textwrap.wrap(data.tokenizer.decode(ids), 44, max_lines=10)
        ax.text(0, -0.02, "\n".join(lines), transform=ax.transAxes, fontsize=8, va="top",
                parse_math=False)
    figure.savefig(path, format="png", dpi=100)
