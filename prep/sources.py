"""Where rows come from: other people's files, and data sets of the Hugging Face hub.

A source has `rows(skip)`, which yields (where, row, bytes) behind the first `skip` rows: where
names the row for the user, and a line of JSON stays unparsed bytes until `parsed`, so that skipping
rows is quick and parsing happens where the tokenising happens.
"""

import json
import re
import time
from collections import Counter, defaultdict
from pathlib import Path

from common.archives import identity_of, local_paths
from common.config import UserError, one_line

BLOCK = 1 << 20  # how much of a long file is read at once
WAITS = (5, 60)  # seconds before the network is tried again; the library has tries of its own
# A token never spans the place where white space begins, in GPT-2's way of cutting text into words:
# a long text cut there gives the ids that the whole text gives.
CUT = re.compile(r"(?<=\S)(?=\s)")
SEPARATORS = re.compile(r"[\s,]*")


class Refused:
    """Counts rows left out, by reason, and remembers the first of each."""

    def __init__(self, counts=(), first=()):
        self.counts, self.first = Counter(counts), defaultdict(list, first)

    def add(self, reason, where):
        self.counts[reason] += 1
        if len(self.first[reason]) < 5:
            self.first[reason].append(where)

    def add_all(self, other):
        """Add what another one counted."""
        self.counts.update(other.counts)
        for reason, where in other.first.items():
            self.first[reason] = (self.first[reason] + where)[:5]

    def table(self):
        """{reason: how many rows, and the first of them}, the most frequent first."""
        return {reason: {"rows": n, "first": self.first[reason]}
                for reason, n in self.counts.most_common()}

    def show(self):
        for reason, n in self.counts.most_common():
            more = ", ..." if n > len(self.first[reason]) else ""
            print(f"left out {n} rows: {reason} ({', '.join(self.first[reason])}{more})")


class Piece(str):
    """A part of a .txt file; goes_on: it continues the piece before it."""

    goes_on = False


def parsed(row):
    """A row as it is, or parsed if it still is a line of JSON; ValueError if it is no such line."""
    if not isinstance(row, bytes):
        return row
    try:
        return json.loads(row)
    except (ValueError, RecursionError):  # includes text that is not UTF-8
        raise ValueError("not a line of JSON") from None


# ------------------------------------------------------------------------------------------ files


class Files:
    """The rows of .jsonl, .json and .parquet files; a .txt file is one row, in pieces."""

    def __init__(self, patterns):
        self.name, self.paths = patterns, paths_of(patterns)
        self.identity = identity_of(self.paths)
        self.total = sum(size for _, size, _ in self.identity)

    def rows(self, skip=0):
        """Yield (where, row, bytes) of all files in order, without the first `skip` rows."""
        for path in self.paths:
            try:
                if path.suffix == ".parquet":
                    skip = yield from read_parquet(path, skip)
                    continue
                for where, row, size in READERS.get(path.suffix, read_lines)(path):
                    if skip:
                        skip -= 1
                    else:
                        yield f"{one_line(path.name)}:{where}", row, size
            except (OSError, ValueError, RecursionError) as error:
                raise UserError(f"cannot read {one_line(path)}: {one_line(error)}") from None


def paths_of(patterns):
    """The files that comma-separated patterns name; UserError if one names none, or a folder."""
    paths = local_paths(patterns)
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name files, like {path}/*.jsonl")
    return paths


def read_parquet(path, skip):
    """Yield the rows of a .parquet file behind the first `skip`; returns how many to skip still."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            n_rows, number = file.metadata.num_rows, 0
            if skip >= n_rows:
                return skip - n_rows
            size = path.stat().st_size / n_rows
            for batch in file.iter_batches(max(1, min(256, int(16 * BLOCK / size)))):
                rows = batch.slice(min(len(batch), max(0, skip - number)))
                for i, row in enumerate(rows.to_pylist(), number + len(batch) - len(rows) + 1):
                    yield f"{one_line(path.name)}:{i}", row, size
                number += len(batch)
    except pyarrow.ArrowException as error:
        raise ValueError(error) from None
    return 0


def read_lines(path):
    """Yield (number, line, bytes) of the lines of a file that are not blank."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line, len(line)


def read_list(path):
    """Yield (number, row, bytes) of a file that is one JSON list, without holding all of it."""
    decoder, number = json.JSONDecoder(), 0
    with open(path, encoding="utf-8") as file:
        buffer = ""
        while not buffer and (block := file.read(BLOCK)):
            buffer = block.lstrip()
        if not buffer.startswith("["):
            raise UserError(f"{path} is not a JSON list of rows")
        at = 1
        while True:
            at = SEPARATORS.match(buffer, at).end()
            if buffer.startswith("]", at):
                return
            problem = ValueError("its end is missing")
            try:
                row, end = decoder.raw_decode(buffer, at)
            except ValueError as error:
                end, problem = len(buffer), error
            if end < len(buffer):  # else the row may go on in the next block
                number += 1
                yield number, row, end - at
                at = end
                continue
            block = file.read(max(BLOCK, len(buffer) - at))
            if not block:
                raise problem
            buffer, at = buffer[at:] + block, 0


def read_text(path):
    """Yield (1, Piece, bytes) of a text file; all pieces but the first go on."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for i, part in enumerate(pieces(iter(lambda: file.read(BLOCK), ""))):
            piece = Piece(part)
            piece.goes_on = i > 0
            yield 1, piece, len(piece)


READERS = {".json": read_list, ".txt": read_text}


def pieces(blocks):
    """The text of some blocks in pieces of about BLOCK, cut where no token is cut."""
    buffer, start = "", 0
    for block in blocks:
        buffer, start = buffer[start:] + block, 0
        while cut := CUT.search(buffer, start + BLOCK):
            yield buffer[start : cut.start()]
            start = cut.start()
    yield buffer[start:]


# ----------------------------------------------------------------------------- data sets of the hub


class Dataset:
    """The rows of a data set on the Hugging Face hub, streamed, or of a local folder of one."""

    total = 0  # bytes: nobody knows

    def __init__(self, name, subset, split):
        self.name, self.subset, self.split = name, subset, split
        files = sorted(path for path in Path(name).rglob("*") if path.is_file())
        self.identity = [name, subset, split, [(str(path), path.stat().st_size) for path in files]]

    def rows(self, skip=0):
        """Yield (where, row, bytes) behind the first `skip` rows; the network may fail at times."""
        return retried(self._open, skip, self.name)

    def _open(self, skip):
        import datasets

        datasets.disable_progress_bars()
        try:
            data = datasets.load_dataset(self.name, self.subset or None, split=self.split,
                                         streaming=True)
            if data.features and "Image(" in repr(data.features):
                data = data.decode(False)  # pictures as bytes
            for number, row in enumerate(data.skip(skip) if skip else data, skip + 1):
                yield f"{self.name}:{number}", row, size_of(row)
        except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise UserError(f"cannot read the data set {self.name} (subset {self.subset or 'none'}"
                            f", split {self.split}): {reason}") from None


def retried(open_rows, skip, name, waits=WAITS, say=print):
    """Yield from open_rows(skip), opened again behind the last good row when it fails.

    UserError when it failed once more than there are `waits` (seconds) in a row.
    """
    failures = 0
    while True:
        try:
            for item in open_rows(skip):
                yield item
                skip, failures = skip + 1, 0
            return
        except UserError:
            raise
        except Exception as error:  # every layer of the network has exceptions of its own
            reason = f"{type(error).__name__} {error}".strip().splitlines()[0]
            if failures == len(waits):
                raise UserError(f"cannot read {name}, row {skip + 1}: {reason}; the same command "
                                "goes on from where it was") from None
            say(f"{name}, row {skip + 1}: {reason}; trying again in {waits[failures]} s")
            time.sleep(waits[failures])
            failures += 1


def size_of(value):
    """About how many bytes of text and pictures a row has."""
    if isinstance(value, str | bytes):
        return len(value)
    values = value.values() if isinstance(value, dict) else value
    return sum(map(size_of, values)) if isinstance(values, list | type({}.values())) else 0


# -------------------------------------------------------------------------------- what is asked for


def at_least(cfg, **lowest):
    """UserError if a setting is below its lowest value that makes sense."""
    for name, low in lowest.items():
        if getattr(cfg, name) < low:
            raise UserError(f"--{name}={getattr(cfg, name)} is too small: {low} at least")


def source_of(cfg):
    """The source that the settings name: --files or --dataset."""
    if cfg.files and cfg.dataset:
        raise UserError("both --files and --dataset are given; say only one")
    if cfg.dataset:
        return Dataset(cfg.dataset, cfg.subset, cfg.split)
    if not cfg.files:
        raise UserError("say which files to read, like --files='books/*.jsonl', or a --dataset")
    return Files(cfg.files)


def sources_of(cfg):
    """{name of the journal: source} of the rows, and of the validation rows if they are files."""
    sources = {"rows": source_of(cfg)}
    return {**sources, "val_rows": Files(cfg.val_files)} if cfg.val_files else sources
