"""Rows to records, resumably: killed at any time, prepare.py continues with the same command.

Batches of rows become records on all cores, and are stored in the order of the rows in a SQLite
file. Once a second the new records and the number of rows that made them are committed together.
Started again with the same settings, reading continues after those rows; with other settings it
starts over. Neither the number of cores nor a restart changes a byte of the data set.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
from tqdm import tqdm

from common.config import UserError
from common.device import cores
from common.images import ImageError
from prep.schema import MAX_IMAGES
from prep.sources import Refused, parsed, show

BATCH_ROWS, BATCH_BYTES = 128, 1 << 20  # a batch is full at either
COMMIT_SECONDS, PROGRESS_SECONDS = 1.0, 10.0
# The images of record i have the numbers MAX_IMAGES * i, MAX_IMAGES * i + 1, ...
TABLES = """PRAGMA page_size = 16384;
CREATE TABLE IF NOT EXISTS state (key INTEGER PRIMARY KEY, content TEXT);
CREATE TABLE IF NOT EXISTS records (number INTEGER PRIMARY KEY, name TEXT, keys BLOB, ids BLOB,
                                    supervised BLOB);
CREATE TABLE IF NOT EXISTS images (number INTEGER PRIMARY KEY, content BLOB)"""


class Record(NamedTuple):
    """What is kept of a row: a document or a chat."""

    ids: np.ndarray  # uint16
    supervised: Sequence = ()  # of a chat, as long as ids
    images: Sequence = ()  # encoded images
    unused: Sequence = ()  # the row's columns with text that nothing reads


class Records:
    """The records of one source, in a SQLite file."""

    def __init__(self, path):
        """Open the file, or make it; sqlite3.Error or a ValueError if it is damaged."""
        # Without SQLite's locks, which network disks may lack: NewFolder has locked the folder.
        self.db = sqlite3.connect(f"file:{quote(os.fsencode(path))}?nolock=1", uri=True)
        self.db.executescript(TABLES)
        self.state = {"rows": 0, "bytes": 0, "records": 0, "complete": False, "refused": {},
                      "unused": {}}
        for (content,) in self.db.execute("SELECT content FROM state"):
            self.state |= json.loads(content)
        self.state["refused"] = self.refused = Refused(self.state["refused"])
        self.state["unused"] = self.unused = Refused(self.state["unused"])
        self.committed = time.monotonic()

    def __len__(self):
        return self.state["records"]

    def add(self, results, n_bytes):
        """Add what a batch gave: (name of a row, its [Record] or why it is refused) pairs."""
        for name, result in results:
            if isinstance(result, str):
                self.refused.add(result, [name])
                continue
            for column in result[0].unused:
                self.unused.add(f"column {column} is not used", [name])
            for ids, supervised, images, _ in result:
                n, ids = len(self), ids.tobytes()
                keys = b"".join(hashlib.blake2b(part, digest_size=8).digest()
                                for part in images or [ids])
                self.db.execute("INSERT INTO records VALUES (?, ?, ?, ?, ?)",
                                (n, name, keys, ids, bytes(supervised)))
                self.db.executemany("INSERT INTO images VALUES (?, ?)",
                                    enumerate(images, MAX_IMAGES * n))
                self.state["records"] += 1
        self.state["rows"] += len(results)
        self.state["bytes"] += n_bytes
        if time.monotonic() - self.committed >= COMMIT_SECONDS:
            self.commit()

    def commit(self, complete=False):
        """Force everything added so far to the disk. complete: the source has no more rows."""
        self.state["complete"] = complete
        self.db.execute("REPLACE INTO state VALUES (0, ?)", (json.dumps(self.state),))
        self.db.commit()
        self.committed = time.monotonic()

    def __getitem__(self, i):
        query = "SELECT ids, supervised FROM records WHERE number = ?"
        ids, supervised = self.db.execute(query, [int(i)]).fetchone()
        numbers = [MAX_IMAGES * int(i), MAX_IMAGES * (int(i) + 1)]
        images = self.db.execute("SELECT content FROM images WHERE number >= ? AND number < ?",
                                 numbers)
        return Record(np.frombuffer(ids, np.uint16), np.frombuffer(supervised, np.bool_),
                      [content for content, in images])

    def column(self, name):
        """Yield a column of all records, in order: name, or keys (8 bytes for each image, or for
        the ids where there is no image; what is equal has equal keys)."""
        return (value for value, in self.db.execute(f"SELECT {name} FROM records ORDER BY number"))

    def show_parts(self):
        """Print what comes from each of several data sets, whose rows have names like NAME:1."""
        first = f"{MAX_IMAGES} * records.number"
        parts = self.db.execute(
            "SELECT rtrim(name, '0123456789'), count(DISTINCT name), sum(length(ids)) / 2, sum(("
            f"SELECT count(*) FROM images WHERE number BETWEEN {first} AND {first} + "
            f"{MAX_IMAGES - 1})) FROM records GROUP BY 1").fetchall()
        for name, rows, tokens, images in parts:
            print(f"{name[:-1]}: {rows:,} rows used, {tokens:,} tokens "
                  f"({tokens / sum(part[2] for part in parts):.0%}), {images:,} images")


def in_order(job, items, workers=None):
    """Yield job(item) of all items, in order, computed in threads ahead of time."""
    workers, waiting = workers or cores(), deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            waiting.append(pool.submit(job, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def fill(records, source, make, limit=0, workers=None):
    """Add the [Record] that make(row) gives of all rows of `source` that are not in yet, in order.

    make runs in threads, as decoding and tokenizing release Python's lock; a ValueError or
    ImageError of it is the reason to refuse a row. With a limit, reading ends soon after there are
    so many records.
    """
    if records.state["complete"]:
        return
    rows = islice(source.rows(), records.state["rows"], None)
    done = in_order(partial(convert, make), batches(rows), workers)
    try:
        with tqdm(total=source.total or None, initial=records.state["bytes"], unit="B",
                  unit_scale=True, mininterval=PROGRESS_SECONDS, delay=PROGRESS_SECONDS) as bar:
            for results, n_bytes in done:
                records.add(results, n_bytes)
                bar.update(n_bytes)
                if limit and len(records) >= limit:
                    break
        records.commit(complete=True)
    except UserError:  # of the source, or of a row: what came before it is kept
        records.commit()
        raise
    except sqlite3.Error as error:
        raise OSError(f"cannot store records: {error}") from None
    finally:
        done.close()


def batches(rows):
    """Lists of (where, row, bytes), none of them long in rows or bytes."""
    batch, size = [], 0
    for item in rows:
        batch.append(item)
        size += item[2]
        if len(batch) == BATCH_ROWS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def convert(make, batch):
    """([(where, [Record] or reason of its refusal) of each row of a batch], bytes of the rows)."""
    results = []
    for where, row, _ in batch:
        try:
            result = make(parsed(row))
        except (ImageError, ValueError) as error:
            result = getattr(error, "reason", str(error))
        except TypeError:
            result = "a row of another form"
        results.append((where, result))
    return results, sum(int(size) for _, _, size in batch)


def open_records(folder, name, settings):
    """The Records that an earlier start with the same settings left in a folder, or new ones.

    settings: everything that decides what the records are, as JSON can hold it.
    """
    key = hashlib.sha256(json.dumps([TABLES, settings], sort_keys=True).encode()).hexdigest()
    path = folder / f"{name}-{key[:16]}.sqlite"
    for other in folder.glob(f"{name}-*.sqlite"):
        if other != path:
            print(f"{other} was begun with other settings or files: starting over")
            other.unlink()
    try:
        records = Records(path)
    except (sqlite3.Error, ValueError, TypeError):
        print(f"{path} is damaged: starting over")
        path.unlink()
        records = Records(path)
    if records.state["rows"]:
        print(f"resuming after {records.state['rows']:,} completed rows", flush=True)
    return records


@contextlib.contextmanager
def read_all(work, cfg, sources, tokenizer, make, limit, workers=None, archives=()):
    """A context with ({name: filled Records} of all sources, the tables "left_out" of rows and
    "unused" of columns for the manifest, which are printed). UserError if no row can be used.

    work: a folder for them, where an earlier start may have left some; cfg: its settings.
    archives: the identities of the files that images come from, as records depend on them too.
    """
    if tokenizer.n_vocab > 65536:
        raise UserError(f"the tokenizer {cfg.tokenizer} has {tokenizer.n_vocab} ids, and data sets "
                        "hold 16-bit ids: at most 65536")
    later = ("out", "files", "val_files", "val_share", "seed", "shard_tokens", "shard_bytes",
             "ignore_columns")
    kept = {name: value for name, value in vars(cfg).items() if name not in later}
    found, left_out, unused = {}, Refused(), Refused()
    with contextlib.ExitStack() as opened:
        try:
            for name, source in sources.items():
                settings = {**kept, "tokenizer": tokenizer.fingerprint, "source": source.identity,
                            "archives": archives}
                found[name] = open_records(work, name, settings)
                opened.callback(found[name].db.close)
                fill(found[name], source, make, limit if name == "rows" else 0, workers)
        finally:
            for records in found.values():
                left_out.merge(records.refused)
                unused.merge(records.unused)
            for column in cfg.ignore_columns.lower().split(","):
                unused.pop(f"column {column.strip()} is not used", None)
            show(left_out.table(), "left out ")
            show(unused.table())
        if len(found["rows"]) == 0:
            shutil.rmtree(work)  # nothing in it is worth keeping
            hint = "; is --image_root right?" if "a missing image" in left_out else ""
            raise UserError(f"{sources['rows'].name} holds no row that can be used{hint}")
        if hasattr(sources["rows"], "parts"):  # a Mixture
            found["rows"].show_parts()
        yield found, {"left_out": left_out.table(), "unused": unused.table()}
