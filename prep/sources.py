"""Where rows come from: local files (readers.py), and data sets of the Hugging Face Hub.

A source has `rows()`, which yields (name for the user, row, size in bytes). A row is a dict, a
text, a list of turns, a line of JSON as bytes, or the ValueError that refuses it; `parsed`, in the
threads that tokenize, makes the first three of the others or raises.
"""

import json
import re
from pathlib import Path

from common.archives import BLOCK, identity_of, local_paths
from common.config import UserError, one_line
from common.hub import failure
from prep.readers import rows_of, size_of

# GPT-2's pre-tokenizer never puts the start of white space inside a token: a long text that is cut
# there has the same ids as the complete text.
CUT = re.compile(r"(?<=\S)(?=\s)")
MOST_REASONS = 100  # that name the columns of a row


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
    """A row, parsed if it is a line of JSON; ValueError if that is malformed or the row is one."""
    if isinstance(row, ValueError):
        raise row
    try:
        return json.loads(row) if isinstance(row, bytes) else row
    except UnicodeDecodeError:
        raise ValueError("not UTF-8; prepare.py reads other encodings with --encoding") from None
    except (ValueError, RecursionError):
        raise ValueError("not a line of JSON") from None


class Files:
    """The rows of files in any of the forms that `rows_of` reads."""

    def __init__(self, patterns, encoding=""):
        self.name, self.paths, self.encoding = patterns, local_paths(patterns), encoding
        self.identity = identity_of(self.paths)
        self.total = sum(size for _, size, _ in self.identity)

    def rows(self):
        for path in self.paths:
            name = one_line(path.name)
            for number, (row, size) in enumerate(rows_of(path, self.encoding), 1):
                if row != b"":  # a blank line
                    yield f"{name}:{number}", row, size


def pieces(text):
    """A text in pieces of about BLOCK characters, cut where no token is cut."""
    start = 0
    while cut := CUT.search(text, start + BLOCK):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


class Dataset:
    """Streamed rows of a data set of the hub (NAME or NAME@REVISION), or a local folder of one."""

    total = 0  # bytes: unknown

    def __init__(self, name, subset, split):
        self.name, self.subset, self.split = name, subset, split
        files = sorted(path for path in Path(name).rglob("*") if path.is_file())
        self.identity = [name, subset, split, [(str(path), path.stat().st_size) for path in files]]

    def rows(self):
        import datasets  # which itself retries a failing connection for minutes

        datasets.disable_progress_bars()
        name, _, revision = (self.name, "", "") if Path(self.name).exists() else (
            self.name.partition("@"))
        try:
            data = datasets.load_dataset(name, self.subset or None, split=self.split,
                                         revision=revision or None, streaming=True)
            if data.features and "Image(" in repr(data.features):
                data = data.decode(False)  # images as bytes
            for number, row in enumerate(data, 1):
                yield f"{self.name}:{self.subset}".rstrip(":") + f":{number}", row, size_of(row)
        except Exception as error:  # the exception types depend on the file format and HTTP client
            raise failure(f"cannot read the data set {self.name} (subset {self.subset or 'none'}, "
                          f"split {self.split})", error) from None


# Public text by a short name: its data set and subset on the hub, and what its licence asks for
NAMED = {
    "FineWeb-Edu": ("HuggingFaceFW/fineweb-edu:sample-10BT", "ODC-By 1.0: name the source"),
    "ClimbMix": ("karpathy/climbmix-400b-shuffle", "CC BY-NC 4.0: no commercial use"),
    "TinyStories": ("roneneldan/TinyStories", "CDLA-Sharing 1.0"),
}


class Mixture:
    """Rows of several data sets in turn, so that each has its weight's share of the bytes. It ends
    with the first data set that ends."""
    total = 0

    def __init__(self, parts, weights):
        self.parts, self.weights = parts, weights
        self.name = ", ".join(part.name for part in parts)
        self.identity = [list(weights), *(part.identity for part in parts)]

    def rows(self):
        parts, sizes, found = [part.rows() for part in self.parts], [0] * len(self.parts), True
        while found:
            i = min(range(len(sizes)), key=lambda i: sizes[i] / self.weights[i])
            if found := next(parts[i], None):
                sizes[i] += found[2]
                yield found
        print(f"the mixture ends with the last row of {self.parts[i].name}")


def data_set(cfg):
    """The rows of --dataset: of one data set, or of several with weights."""
    parts, weights = [], []
    entries = [cfg.dataset] if Path(cfg.dataset).exists() else cfg.dataset.split(",")
    for entry in entries:
        name, _, weight = (entry, "", "") if Path(entry).exists() else entry.partition("=")
        subset = ""
        if not Path(name).exists():
            if name in NAMED:
                name, licence = NAMED[name]
                print(f"{entry}: {name} on the Hugging Face Hub; licence {licence}")
            name, _, subset = name.partition(":")
        try:
            weights.append(float(weight or 1))
        except ValueError:
            weights.append(0)
        if not name or not 0 < weights[-1] < float("inf"):
            raise UserError(f"--dataset={cfg.dataset}: {entry!r} is not NAME or NAME=WEIGHT; "
                            "for example FineWeb-Edu=2,ClimbMix=1")
        parts.append(Dataset(name, subset or cfg.subset, cfg.split))
    return parts[0] if len(parts) == 1 else Mixture(parts, weights)


def sources_of(cfg):
    """{name of its records: source} of the rows that the settings name, and of --val_files."""
    if bool(cfg.files) == bool(cfg.dataset):
        raise UserError("say which rows to read: either --files='books/*.jsonl' or --dataset=NAME")
    try:
        "a".encode(cfg.encoding or "utf-8")
    except (LookupError, ValueError):
        raise UserError(f"--encoding={cfg.encoding} is not the name of an encoding; use one like "
                        "utf-16-le, cp1252, gbk or shift_jis") from None
    dataset = data_set(cfg) if cfg.dataset else None
    files = {"rows": cfg.files, "val_rows": cfg.val_files}
    files = {name: Files(paths, cfg.encoding) for name, paths in files.items() if paths}
    return {"rows": dataset, **files} if dataset else files
