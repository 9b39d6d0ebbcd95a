"""Where rows come from: local files (READERS by suffix), data sets of the Hugging Face Hub.

A source has `rows()`, which yields (name for the user, row, size in bytes). A line of JSON stays
bytes until `parsed`, in the threads that tokenize.
"""

import json
import re
from pathlib import Path

from common.archives import identity_of, local_paths
from common.config import UserError, one_line

BLOCK = 1 << 20  # how much of a long file is read, or tokenized, at once
LONGEST_TEXT = 1 << 32  # bytes of a .txt file, which is read as one row
# GPT-2's pre-tokenizer never puts the start of white space inside a token: a long text that is cut
# there has the same ids as the complete text.
CUT = re.compile(r"(?<=\S)(?=\s)")
MOST_REASONS = 100  # that name the columns of a row
SEPARATORS = re.compile(r"[\s,]*")


class Refused(dict):
    """Rows left out, or with an unused column: {reason: {"rows": count, "first": five names}}."""

    def add(self, reason, names, n=1):
        if len(self) >= MOST_REASONS:
            reason = reason.split("; ")[0]  # without the columns
        entry = self.setdefault(reason, {"rows": 0, "first": []})
        entry["rows"] += n
        entry["first"] = (entry["first"] + names)[:5]

    def merge(self, other):
        for reason, entry in other.items():
            self.add(reason, entry["first"], entry["rows"])

    def table(self):
        """The same as a plain dict, the most frequent reason first."""
        return dict(sorted(self.items(), key=lambda item: -item[1]["rows"]))


def show(table, prefix=""):
    """Print a line for each reason of a Refused.table()."""
    for reason, entry in table.items():
        more = ", ..." if entry["rows"] > len(entry["first"]) else ""
        print(f"{prefix}{entry['rows']:,} rows: {reason} ({', '.join(entry['first'])}{more})")


def parsed(row):
    """A row, parsed if it is a line of JSON; ValueError if that is malformed."""
    if not isinstance(row, bytes):
        return row
    try:
        return json.loads(row)
    except (ValueError, RecursionError):
        raise ValueError("not a line of JSON") from None


class Files:
    """The rows of .jsonl, .json and .parquet files; a .txt file is one row, its text."""

    def __init__(self, patterns):
        self.name, self.paths = patterns, local_paths(patterns)
        self.identity = identity_of(self.paths)
        self.total = sum(size for _, size, _ in self.identity)

    def rows(self):
        for path in self.paths:
            try:
                rows = READERS.get(path.suffix, read_lines)(path)
                for number, (row, size) in enumerate(rows, 1):
                    if row != b"":  # a blank line
                        yield f"{one_line(path.name)}:{number}", row, size
            except (OSError, ValueError, RecursionError) as error:
                raise UserError(f"cannot read {one_line(path)}: {one_line(error)}") from None


def read_lines(path):
    """Yield (line, bytes) of a file, the lines stripped of white space."""
    with open(path, "rb") as file:
        for line in file:
            yield line.strip(), len(line)


def read_text(path):
    """Yield (text, bytes) of a file, once."""
    size = path.stat().st_size
    if size > LONGEST_TEXT:
        raise ValueError(f"more than {LONGEST_TEXT >> 30} GiB; split it into several files")
    yield path.read_text(encoding="utf-8-sig", errors="replace"), size


def read_parquet(path):
    """Yield (row, bytes) of a .parquet file."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            size = path.stat().st_size / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(max(1, min(256, int(16 * BLOCK / size)))):
                for row in batch.to_pylist():
                    yield row, size
    except pyarrow.ArrowException as error:
        raise ValueError(error) from None


def read_list(path):
    """Yield (row, bytes) of a JSON file that is one list, holding one row at a time.

    Not by ijson, which changes numbers and lone surrogates, and whose memory explodes on deeply
    nested lists.
    """
    decoder, at = json.JSONDecoder(), 1
    with open(path, encoding="utf-8-sig") as file:
        buffer = file.read(BLOCK).lstrip()
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
                yield row, end - at
                at = end
            elif block := file.read(max(BLOCK, len(buffer) - at)):  # the row may continue in it
                buffer, at = buffer[at:] + block, 0
            else:
                raise problem


READERS = {".json": read_list, ".txt": read_text, ".parquet": read_parquet}  # else read_lines


def pieces(text):
    """A text in pieces of about BLOCK characters, cut where no token is cut."""
    start = 0
    while cut := CUT.search(text, start + BLOCK):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


class Dataset:
    """The rows of a data set of the Hugging Face Hub, streamed, or of a local folder of one."""

    total = 0  # bytes: unknown

    def __init__(self, name, subset, split):
        self.name, self.subset, self.split = name, subset, split
        files = sorted(path for path in Path(name).rglob("*") if path.is_file())
        self.identity = [name, subset, split, [(str(path), path.stat().st_size) for path in files]]

    def rows(self):
        import datasets  # which itself retries a failing connection for minutes

        datasets.disable_progress_bars()
        try:
            data = datasets.load_dataset(self.name, self.subset or None, split=self.split,
                                         streaming=True)
            if data.features and "Image(" in repr(data.features):
                data = data.decode(False)  # images as bytes
            for number, row in enumerate(data, 1):
                yield f"{self.name}:{number}", row, size_of(row)
        except Exception as error:  # the exception types depend on the file format and HTTP client
            raise UserError(f"cannot read the data set {self.name} (subset {self.subset or 'none'}"
                            f", split {self.split}): {one_line(error) or repr(error)}; if it was "
                            "the network, the same command resumes") from None


def size_of(value):
    """Approximate number of bytes of text and images in a row."""
    if isinstance(value, str | bytes):
        return len(value)
    values = list(value.values()) if isinstance(value, dict) else value
    return sum(map(size_of, values)) if isinstance(values, list) else 0


def sources_of(cfg):
    """{name of its records: source} of the rows that the settings name, and of --val_files."""
    if bool(cfg.files) == bool(cfg.dataset):
        raise UserError("say which rows to read: either --files='books/*.jsonl' or --dataset=NAME")
    rows = Dataset(cfg.dataset, cfg.subset, cfg.split) if cfg.dataset else Files(cfg.files)
    return {"rows": rows, **({"val_rows": Files(cfg.val_files)} if cfg.val_files else {})}
