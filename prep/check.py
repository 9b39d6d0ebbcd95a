"""A look at a data set before anybody pays for a GPU: python prepare.py check DATA

DATA is a file of rows, or a folder that prepare.py made. Every row goes the way it goes in training
(its turns, its pictures, its ids, whether it fits), and nothing is written but a report. Of a row
only its name and a few numbers are kept, so a data set of any size takes little memory.
"""

import os
import warnings
from array import array
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from common.checkpoint import write_json
from common.config import UserError
from common.device import cores
from prep.look import COPY, NO_PICTURE, Made, Originals, measured
from prep.report import draw_sheet, print_figures, print_tokens
from prep.resumable import Progress, batches
from prep.sources import Refused, at_least
from train.packing import pack

QUANTILES = {"min": 0, **{f"{q} %": q for q in (5, 25, 50, 75, 95, 99)}, "max": 100}
TILES = 16  # rows on the contact sheet


@dataclass
class Check:
    """What is in a data set, what is wrong with it, and whether it can be trained on.

    DATA is a .json, .jsonl or .parquet file or a pattern, or a folder that prepare.py made.
    """

    files: str = ""  # DATA, where it does not come first: paths or patterns, separated by commas
    dataset: str = ""  # instead of files: a data set of the Hugging Face hub, or a folder of one
    subset: str = ""  # which configuration of the data set, where it has several
    split: str = "train"  # which split of the data set
    image_root: str = ""  # where the pictures are, as in prepare.py images
    tokenizer: str = "gpt2"  # gpt2, or a folder with a tokenizer.json; a made folder has its own
    items: int = 0  # rows to look at, the first ones; 0 for all

    context: int = 1024  # positions of a training row
    patches: int = 256  # positions that a picture takes in it: 256 for ViT-L/14 at 224 pixels
    image_size: int = 224  # pixels of the square that pictures are fitted into
    fit: Literal["pad", "short"] = "pad"  # how they are, as in prepare.py images
    short_answers: bool = False  # as in prepare.py images
    batch_tokens: int = 65_536  # positions of a training step

    sheet: str = "contact_sheet.png"  # 16 rows drawn at random, as a picture; empty for none
    seed: int = 0  # of the draw
    report: str = ""  # a .json file for the same figures, for scripts
    show: int = 0  # above 0: print row number N token by token, and nothing else


def data_first(argv):
    """DATA as the flag --files, where it is the first argument."""
    if not argv or argv[0].startswith("-"):
        return argv
    if any(flag.startswith("--files") for flag in argv):
        raise UserError(f"both {argv[0]} and --files are given; say only one")
    return [f"--files={argv[0]}", *argv[1:]]


def check(cfg):
    """Print what is in the data set; with --show one row of it."""
    at_least(cfg, items=0, context=2, patches=1, image_size=1, batch_tokens=1, seed=0, show=0)
    for path in cfg.sheet, cfg.report:
        if path and not Path(path).absolute().parent.is_dir():
            raise UserError(f"there is no folder for {path}; make it first")
    data = Made(cfg) if os.path.isdir(cfg.files) and not cfg.dataset else Originals(cfg)
    with warnings.catch_warnings():  # here, because threads share what read_image sets for itself
        warnings.simplefilter("ignore")
        if cfg.show:
            return show(cfg, data)
        tally = look_at_all(cfg, data)
        figures = tally.figures(data)
        tiles = measured(cfg, data, tally.drawn if cfg.sheet else [], keep=True)
    print_figures(figures)
    try:
        if cfg.sheet:
            draw_sheet(cfg.sheet, data.tokenizer, tiles)
            print(f"contact sheet: {len(tiles)} rows drawn at random, in {cfg.sheet}")
        if cfg.report:
            write_json(cfg.report, figures)
    except OSError as error:
        raise UserError(f"cannot write the report: {error}") from None
    print(figures["verdict"])


def show(cfg, data):
    item = next(islice(data.rows(cfg.show - 1), 1), None)
    if item is None:
        raise UserError(f"--show={cfg.show}: {data.name} has fewer rows than that")
    row = data.look(*item[:2])
    if row.problem:
        raise UserError(f"row {cfg.show} of {data.name}, {row.name}, cannot be used: {row.problem}")
    print_tokens(data.tokenizer, row, cfg.patches)


# ------------------------------------------------------------------------------------ all rows


def look_at_all(cfg, data):
    """The Tally of all rows, looked at by all cores, in their order."""
    tally, waiting = Tally(cfg), deque()
    progress = Progress(tally, data, cfg.items)

    def take(left):
        while len(waiting) > left:
            batch, future = waiting.popleft()
            for item, row in zip(batch, future.result(), strict=True):
                tally.add(item, row)
            progress.show()

    pool = ThreadPoolExecutor(cores())
    try:
        for batch in batches(islice(data.rows(), cfg.items or None)):
            waiting.append((batch, pool.submit(measured, cfg, data, batch)))
            take(2 * cores())
        take(0)
    finally:
        pool.shutdown(cancel_futures=True)
    if not tally.rows:
        raise UserError(f"{data.name} holds no rows")
    if tally.problems.counts["not a line of JSON"] == tally.rows:
        raise UserError(f"{data.name} is not JSON: no line of it is a row")
    return tally


class Tally:
    """Counts of all rows. What Progress reads of a Journal is here too: rows, bytes, lengths."""

    def __init__(self, cfg):
        self.cfg, self.rng = cfg, np.random.default_rng(cfg.seed)
        self.rows, self.bytes, self.lengths = 0, 0, {"ids": 0, "image_starts": 0}
        self.problems, self.notes, self.keys = Refused(), Refused(), set()
        self.measures = {name: array("q") for name in (
            "ids of a row", "positions of a row", "picture width", "picture height")}
        self.used, self.n_good = array("q"), dict.fromkeys(
            ("rows", "no picture", "one picture", "several", "turns", "answers", "pictures"), 0)
        self.drawn = []  # (where, row, bytes), each row as likely as any other

    def __len__(self):
        return self.rows

    def add(self, item, row):
        self.rows, self.bytes = self.rows + 1, self.bytes + item[2]
        if len(self.drawn) < TILES:
            self.drawn.append(item)
        elif (spot := self.rng.integers(self.rows)) < TILES:
            self.drawn[spot] = item
        if row.lengths:
            self.lengths["ids"] += row.lengths[0]
            self.lengths["image_starts"] += len(row.sizes)
            self.measures["ids of a row"].append(row.lengths[0])
            self.measures["positions of a row"].append(row.lengths[1])
            for width, height in row.sizes:
                self.measures["picture width"].append(width)
                self.measures["picture height"].append(height)
        if row.problem:
            self.problems.add(row.problem, row.name)
            return
        if row.key in self.keys:
            row.notes.append(COPY)
        self.keys.add(row.key)
        for note in row.notes:
            self.notes.add(note, row.name)
        self.used.append(row.used)
        kind = ("no picture", "one picture", "several")[min(2, len(row.sizes))]
        for name, n in {"rows": 1, kind: 1, "turns": row.lengths[2], "answers": row.lengths[3],
                        "pictures": len(row.sizes)}.items():
            self.n_good[name] += int(n)

    def figures(self, data):
        """All there is to say, as JSON can hold it."""
        cfg, n_good = self.cfg, self.n_good["rows"]
        smaller = zip(self.measures["picture width"], self.measures["picture height"], strict=True)
        side = max if cfg.fit == "pad" else min
        training_rows = len(pack(self.used.tolist(), cfg.context, cfg.seed))
        notes = self.notes.table()
        if self.n_good["no picture"] == n_good:  # a data set of text: that is no news of a row
            notes.pop(NO_PICTURE, None)
        a_step = max(1, cfg.batch_tokens // cfg.context)
        return {
            "data": data.name, "items": cfg.items, "rows": self.rows, "good": self.n_good,
            "left_out": self.problems.table(), "notes": notes,
            "left_out_when_made": data.left_out,
            "percentiles": {name: dict(zip(QUANTILES, np.percentile(
                values, list(QUANTILES.values()), method="nearest").tolist(), strict=True))
                for name, values in self.measures.items() if len(values)},
            "pictures_enlarged": sum(side(size) < cfg.image_size for size in smaller),
            "image_size": cfg.image_size, "patches": cfg.patches,
            "epoch": {"context": cfg.context, "batch_tokens": cfg.batch_tokens,
                      "training_rows": training_rows, "steps": -(-training_rows // a_step),
                      "filled": sum(self.used) / max(1, training_rows * cfg.context)},
            "share_lost": 1 - n_good / self.rows, "verdict": self.verdict(),
        }

    def verdict(self):
        """Whether this can be trained on, in one line."""
        rows, good = self.rows, self.n_good["rows"]
        hint = "; most pictures are missing: is --image_root right?" if (
            self.problems.counts["a missing image"] > rows / 2) else ""
        if good == 0:
            return f"none of {rows:,} rows is good: this cannot be trained on{hint or ' as it is'}"
        if good == rows:
            return f"all {rows:,} rows are good: this can be trained on as it is"
        if good < 0.9 * rows:
            return (f"only {good:,} of {rows:,} rows are good; training leaves the others out"
                    f"{hint or ', so look at the reasons first'}")
        return f"{good:,} of {rows:,} rows are good; training leaves the others out"
