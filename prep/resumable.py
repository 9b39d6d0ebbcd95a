"""Rows to records, resumably: killed at any time, prepare.py continues with the same command.

Batches of rows become records on all cores, and are stored in the order of the rows in a SQLite
file. Once a second the new records and the number of rows that made them are committed together.
Started again with the same settings, reading continues after those rows; with other settings it
starts over. Neither the number of cores nor a restart changes a byte of the data set.
"""

import hashlib
import json
import os
import shutil
import sqlite3
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from urllib.parse import quote

import numpy as np
from tqdm import tqdm

from common.config import UserError
from common.device import cores
from common.images import ImageError
from prep.schema import MAX_IMAGES
from prep.sources import Refused, parsed

BATCH_ROWS, BATCH_BYTES = 128, 1 << 20  # a batch is full at either
COMMIT_SECONDS, PROGRESS_SECONDS = 1.0, 10.0
# Keys are numbers of rows: a document begins in its row, and ends before the next document's.
TABLES = """PRAGMA page_size = 16384;
CREATE TABLE IF NOT EXISTS progress (key INTEGER PRIMARY KEY, state TEXT);
CREATE TABLE IF NOT EXISTS documents (row INTEGER PRIMARY KEY);
CREATE TABLE IF NOT EXISTS records (row INTEGER PRIMARY KEY, ids BLOB, supervised BLOB);
CREATE TABLE IF NOT EXISTS images (number INTEGER PRIMARY KEY, content BLOB);
CREATE TABLE IF NOT EXISTS image_keys (number INTEGER PRIMARY KEY, key INTEGER)"""


@dataclass
class Record:
    """What is kept of a row: a document, the continuation of one (goes_on), or a chat."""

    ids: np.ndarray  # uint16
    supervised: list = field(default_factory=list)  # of a chat, as long as ids
    images: list = field(default_factory=list)  # encoded images
    goes_on: bool = False


def digest(value):
    """The sha256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Records:
    """The records of one source, in a SQLite file; len() counts documents or chats."""

    def __init__(self, path):
        """Open the file, or make it; sqlite3.Error or a KeyError if it is damaged."""
        # Without SQLite's locks, which network disks may lack: NewFolder has locked the folder.
        self.db = sqlite3.connect(f"file:{quote(os.fsencode(path))}?nolock=1", uri=True)
        self.db.executescript(TABLES)
        state = self.db.execute("SELECT state FROM progress").fetchone()
        state = json.loads(state[0]) if state else {"counts": {}, "refused": {}}
        self.rows, self.bytes = state.get("rows", 0), state.get("bytes", 0)
        self.documents, self.n_ids = state.get("documents", 0), state.get("n_ids", 0)
        self.complete = state.get("complete", False)
        self.refused = Refused(state["counts"], state["refused"])
        self.committed = time.monotonic()

    def __len__(self):
        return self.documents

    def add(self, results, n_bytes):
        """Add what a batch of rows gave: for each row a Record, or (reason, where) of a refusal."""
        for result in results:
            if isinstance(result, Record):
                self._insert(result)
            else:
                self.refused.add(*result)
            self.rows += 1
        self.bytes += n_bytes
        if time.monotonic() - self.committed >= COMMIT_SECONDS:
            self.commit()

    def _insert(self, record):
        supervised = np.array(record.supervised, np.bool_).tobytes()
        self.db.execute("INSERT INTO records VALUES (?, ?, ?)",
                        (self.rows, record.ids.tobytes(), supervised))
        self.n_ids += len(record.ids)
        if not record.goes_on:
            self.db.execute("INSERT INTO documents VALUES (?)", (self.rows,))
            self.documents += 1
        for number, image in enumerate(record.images, MAX_IMAGES * self.rows):
            key = hashlib.blake2b(image, digest_size=8).digest()
            self.db.execute("INSERT INTO images VALUES (?, ?)", (number, image))
            self.db.execute("INSERT INTO image_keys VALUES (?, ?)",
                            (number, int.from_bytes(key, "little", signed=True)))

    def commit(self, complete=False):
        """Force everything added so far to the disk. complete: the source has no more rows."""
        state = {"rows": self.rows, "bytes": self.bytes, "documents": self.documents,
                 "n_ids": self.n_ids, "complete": complete, "counts": self.refused.counts,
                 "refused": self.refused.first}
        self.db.execute("REPLACE INTO progress VALUES (0, ?)", (json.dumps(state),))
        self.db.commit()
        self.committed = time.monotonic()

    # ------------------------------------------------------------- reading, when it is complete

    def open(self):
        """Make ready for the methods below. starts: the row that every document begins with, and
        the number of rows."""
        starts = self.db.execute("SELECT row FROM documents ORDER BY row")
        self.starts = np.fromiter(chain((row for row, in starts), [self.rows]), np.int64)

    def _select(self, query, i, scale=1):
        """The one column of a query's rows that belong to document i."""
        limits = (self.starts[i : i + 2] * scale).tolist()
        return [value for value, in self.db.execute(query, limits)]

    def ids(self, i):
        parts = self._select("SELECT ids FROM records WHERE row >= ? AND row < ?", i)
        return np.frombuffer(b"".join(parts), np.uint16)

    def supervised(self, i):
        parts = self._select("SELECT supervised FROM records WHERE row >= ? AND row < ?", i)
        return np.frombuffer(b"".join(parts), np.bool_)

    def images(self, i):
        """The encoded images of chat i."""
        query = "SELECT content FROM images WHERE number >= ? AND number < ?"
        return self._select(query, i, MAX_IMAGES)

    def blocks(self, start, end):
        """Yield the ids of all documents, end to end, from position start to end, in blocks."""
        at = 0
        for (block,) in self.db.execute("SELECT ids FROM records ORDER BY row"):
            ids = np.frombuffer(block, np.uint16)
            yield ids[max(0, start - at) : max(0, end - at)]
            at += len(ids)

    def image_keys(self, n):
        """(chat, key) arrays, an element per image of the first n chats; equal images or names
        have equal keys."""
        found = self.db.execute("SELECT number, key FROM image_keys ORDER BY number").fetchall()
        numbers, keys = np.array(found, np.int64).reshape(-1, 2).T
        chats = np.searchsorted(self.starts, numbers // MAX_IMAGES)
        return chats[chats < n], keys[chats < n]


# --------------------------------------------------------------------------------- filling them


def fill(records, source, make, limit=0, workers=None):
    """Add make(row) of all rows of `source` that the Records lack, in order.

    make runs in threads, on all cores unless workers says otherwise: decoding and tokenizing
    release Python's lock. It refuses a row by a ValueError or ImageError with the reason. With
    a limit, reading ends soon after there are more records than that.
    """
    if records.complete:
        return
    workers = workers or cores()
    pool, waiting = ThreadPoolExecutor(workers), deque()
    bar = tqdm(total=source.total or None, initial=records.bytes, unit="B", unit_scale=True,
               mininterval=PROGRESS_SECONDS, delay=PROGRESS_SECONDS)

    def take(left):
        """Add results until `left` batches wait, or there are records enough: one more than the
        limit, as the last may continue."""
        while len(waiting) > left and not (limit and len(records) > limit):
            results, n_bytes = waiting.popleft().result()
            records.add(results, n_bytes)
            bar.update(n_bytes)

    try:
        for batch in batches(source.rows(records.rows)):
            waiting.append(pool.submit(convert, make, batch))
            take(2 * workers)
            if limit and len(records) > limit:
                break
        take(0)
        records.commit(complete=True)
    except UserError:  # of the source, or of a row: what came before it is kept
        records.commit()
        raise
    except sqlite3.Error as error:
        raise OSError(f"cannot store records: {error}") from None
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()


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
    """([Record or (reason, where) of each row of a batch], bytes of the rows)."""
    results = []
    for where, row, _ in batch:
        try:
            results.append(make(parsed(row)))
        except (ImageError, ValueError) as error:
            results.append((getattr(error, "reason", str(error)), where))
        except TypeError:
            results.append(("a row of another form", where))
    return results, sum(int(size) for _, _, size in batch)


def open_records(folder, name, settings):
    """The Records that an earlier start with the same settings left in a folder, or new ones.

    settings: everything that decides what the records are, as JSON can hold it.
    """
    path = folder / f"{name}-{digest(settings)[:16]}.sqlite"
    for other in folder.glob(f"{name}-*.sqlite"):
        if other != path:
            print(f"{other} was begun with other settings or files: starting over")
            other.unlink()
    try:
        records = Records(path)
    except (sqlite3.Error, ValueError, KeyError, TypeError):
        print(f"{path} is damaged: starting over")
        path.unlink()
        records = Records(path)
    if records.rows:
        print(f"resuming after {records.rows:,} completed rows", flush=True)
    return records


def read_all(work, cfg, sources, tokenizer, make, limit, workers=None, archives=()):
    """Records of all sources, filled: {name: Records}, and which rows were left out, printed.

    work: a folder for them, where an earlier start may have left some; cfg: its settings.
    archives: the identities of the files that images come from, as records depend on them too.
    """
    later = ("out", "files", "val_files", "val_share", "seed", "shard_tokens", "shard_bytes")
    kept = {name: value for name, value in vars(cfg).items()
            if name not in later}  # those change no record
    found, refused = {}, Refused()
    try:
        for name, source in sources.items():
            settings = {**kept, "tokenizer": tokenizer.fingerprint, "source": source.identity,
                        "archives": archives}
            found[name] = open_records(work, name, settings)
            fill(found[name], source, make, limit if name == "rows" else 0, workers)
            found[name].open()
    finally:
        for records in found.values():
            refused.add_all(records.refused)
        refused.show()
    if len(found["rows"]) == 0:
        shutil.rmtree(work)  # nothing in it is worth keeping
    return found, refused
