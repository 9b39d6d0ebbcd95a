"""Where rows come from: local files, and data sets of the Hugging Face Hub.

A source has `rows(skip)`, which yields (where, row, bytes) after the first `skip` rows. `where`
names the row for the user. A line of JSON stays bytes until `parsed`, in the threads that tokenize.
"""

import json
import re
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

from common.archives import identity_of, local_paths
from common.config import UserError, one_line

BLOCK = 1 << 20  # how much of a long file is read at once
# GPT-2's pre-tokenizer never puts the start of white space inside a token: a long text that is cut
# there has the same ids as the complete text.
CUT = re.compile(r"(?<=\S)(?=\s)")
SEPARATORS = re.compile(r"[\s,]*")


class Refused:
    """Counts the rows left out, by reason, and keeps the names of the first five of each."""

    def __init__(self, counts=(), first=()):
        self.counts, self.first = Counter(counts), defaultdict(list, first)

    def add(self, reason, where):
        self.counts[reason] += 1
        if len(self.first[reason]) < 5:
            self.first[reason].append(where)

    def add_all(self, other):
        self.counts.update(other.counts)
        for reason, where in other.first.items():
            self.first[reason] = (self.first[reason] + where)[:5]

    def table(self):
        """{reason: {"rows": count, "first": names}}, the most frequent reason first."""
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
    """A row, parsed if it is a line of JSON; ValueError if that is malformed."""
    if not isinstance(row, bytes):
        return row
    try:
        return json.loads(row)
    except (ValueError, RecursionError):
        raise ValueError("not a line of JSON") from None


# ------------------------------------------------------------------------------------------ files


class Files:
    """The rows of .jsonl, .json and .parquet files; a .txt file is one row, in pieces."""

    def __init__(self, patterns):
        self.name, self.paths = patterns, local_paths(patterns)
        for path in self.paths:
            if path.is_dir():
                raise UserError(f"{path} is a folder; name files, like {path}/*.jsonl")
        self.identity = identity_of(self.paths)
        self.total = sum(size for _, size, _ in self.identity)

    def rows(self, skip=0):
        """Yield (where, row, bytes) of all files in order, after the first `skip` rows."""
        return islice(self._all_rows(), skip, None)

    def _all_rows(self):
        for path in self.paths:
            try:
                for number, row, size in READERS.get(path.suffix, read_lines)(path):
                    yield f"{one_line(path.name)}:{number}", row, size
            except (OSError, ValueError, RecursionError) as error:
                raise UserError(f"cannot read {one_line(path)}: {one_line(error)}") from None


def read_lines(path):
    """Yield (number, line, bytes) of the lines of a file that are not blank."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line, len(line)


def read_parquet(path):
    """Yield (number, row, bytes) of a .parquet file."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            size, number = path.stat().st_size / max(1, file.metadata.num_rows), 0
            for batch in file.iter_batches(max(1, min(256, int(16 * BLOCK / size)))):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row, size
    except pyarrow.ArrowException as error:
        raise ValueError(error) from None


def read_list(path):
    """Yield (number, row, bytes) of a JSON file that is one list, holding one row at a time.

    Not by ijson, which changes numbers and lone surrogates, and whose memory explodes on deeply
    nested lists.
    """
    decoder, number, at = json.JSONDecoder(), 0, 1
    with open(path, encoding="utf-8") as file:
        buffer = ""
        while not buffer and (block := file.read(BLOCK)):
            buffer = block.lstrip()
        if not buffer.startswith("["):
            raise ValueError("it is not a JSON list of rows")
        while True:
            at = SEPARATORS.match(buffer, at).end()
            if buffer.startswith("]", at):
                return
            problem = ValueError("its end is missing")
            try:
                row, end = decoder.raw_decode(buffer, at)
            except ValueError as error:
                end, problem = len(buffer), error
            if end < len(buffer):
                number += 1
                yield number, row, end - at
                at = end
                continue
            block = file.read(max(BLOCK, len(buffer) - at))  # the row may continue in it
            if not block:
                raise problem
            buffer, at = buffer[at:] + block, 0


def read_text(path):
    """Yield (1, Piece, bytes) of a text file."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for i, part in enumerate(pieces(iter(lambda: file.read(BLOCK), ""))):
            piece = Piece(part)
            piece.goes_on = i > 0
            yield 1, piece, len(piece)


READERS = {".json": read_list, ".txt": read_text, ".parquet": read_parquet}


def pieces(blocks):
    """The text of some blocks in pieces of about BLOCK characters, cut where no token is cut."""
    buffer, start = "", 0
    for block in blocks:
        buffer, start = buffer[start:] + block, 0
        while cut := CUT.search(buffer, start + BLOCK):
            yield buffer[start : cut.start()]
            start = cut.start()
    yield buffer[start:]


# ----------------------------------------------------------------------------- data sets of the hub


class Dataset:
    """The rows of a data set of the Hugging Face Hub, streamed, or of a local folder of one."""

    total = 0  # bytes: unknown

    def __init__(self, name, subset, split):
        self.name, self.subset, self.split = name, subset, split
        files = sorted(path for path in Path(name).rglob("*") if path.is_file())
        self.identity = [name, subset, split, [(str(path), path.stat().st_size) for path in files]]

    def rows(self, skip=0):
        """Yield (where, row, bytes) after the first `skip` rows. `datasets` itself retries a
        failing connection for minutes."""
        import datasets

        datasets.disable_progress_bars()
        try:
            data = datasets.load_dataset(self.name, self.subset or None, split=self.split,
                                         streaming=True)
            if data.features and "Image(" in repr(data.features):
                data = data.decode(False)  # images as bytes
            for number, row in enumerate(data.skip(skip) if skip else data, skip + 1):
                yield f"{self.name}:{number}", row, size_of(row)
        except Exception as error:  # the exception types depend on the file format and HTTP client
            raise UserError(f"cannot read the data set {self.name} (subset {self.subset or 'none'}"
                            f", split {self.split}): {one_line(error) or repr(error)}; if it was "
                            "the network, the same command resumes") from None


def size_of(value):
    """Approximate number of bytes of text and images in a row."""
    if isinstance(value, str | bytes):
        return len(value)
    values = value.values() if isinstance(value, dict) else value
    return sum(map(size_of, values)) if isinstance(values, list | type({}.values())) else 0


# ----------------------------------------------------------------------------------------- settings


def at_least(cfg, **lowest):
    """UserError if a setting is below its lowest valid value."""
    for name, low in lowest.items():
        if getattr(cfg, name) < low:
            raise UserError(f"--{name}={getattr(cfg, name)} is too small: {low} at least")


def source_of(cfg):
    """The source that --files or --dataset names."""
    if bool(cfg.files) == bool(cfg.dataset):
        raise UserError("say which rows to read: either --files='books/*.jsonl' or --dataset=NAME")
    return Dataset(cfg.dataset, cfg.subset, cfg.split) if cfg.dataset else Files(cfg.files)


def sources_of(cfg):
    """{name of its journal: source} of the rows, and of --val_files if given."""
    sources = {"rows": source_of(cfg)}
    return {**sources, "val_rows": Files(cfg.val_files)} if cfg.val_files else sources
