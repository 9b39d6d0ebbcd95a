"""A journal of rows already read: what lets prepare.py be killed at any moment and go on.

Rows stream in, batches of them become token ids on all cores, and the results are appended, in the
order of the rows, to a few growing files. About once a second the files are forced to the disk and
progress.json is replaced, which says how long each file is and how many rows that makes. Started
again with the same settings, the journal cuts its files to those lengths and goes on behind those
rows; with other settings it starts over. Neither the number of cores nor a restart changes a byte.
"""

import hashlib
import json
import os
import shutil
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import numpy as np

from common.checkpoint import write_json
from common.config import UserError, read_json
from common.device import cores
from common.images import ImageError
from prep.sources import Refused, parsed

FILES = {"ids": np.uint16, "supervised": np.bool_, "images": np.uint8, "starts": np.int64,
         "image_starts": np.int64, "first_image": np.int64, "image_keys": np.uint64}
COUNTS_IN = {"starts": "ids", "image_starts": "images", "first_image": "image_starts"}
BATCH_ROWS, BATCH_BYTES = 128, 1 << 20  # a batch is full at either
BLOCK_IDS = 1 << 20
COMMIT_SECONDS, SAY_SECONDS = 1.0, 10.0


@dataclass
class Record:
    """What is kept of a row: a document, the continuation of one (goes_on), or a chat."""

    ids: np.ndarray  # uint16
    supervised: list = field(default_factory=list)  # a chat's, as long as ids
    images: list = field(default_factory=list)  # encoded pictures
    goes_on: bool = False


def digest(value):
    """The sha256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Journal:
    """The files of one source's records in a folder; len() counts documents or chats."""

    def __init__(self, folder, settings):
        """settings: whatever decides what the records are, as JSON can hold it."""
        self.folder, self.path = folder, folder / "progress.json"
        self.settings = digest(settings)
        self.rows, self.bytes, self.complete = 0, 0, False
        self.lengths, self.refused = dict.fromkeys(FILES, 0), Refused()
        if not self._resume():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self.files = {name: open(folder / name, "ab") for name in FILES}  # noqa: SIM115
        self.committed = time.monotonic()

    def _resume(self):
        """Take up what an earlier start left; False if there is nothing to go on with."""
        if not self.path.is_file():
            return False
        try:
            progress = read_json(self.path)
            if progress["settings"] != self.settings:
                print(f"{self.folder} was begun with other settings or files: starting over")
                return False
            for name, dtype in FILES.items():
                size = progress["lengths"][name] * np.dtype(dtype).itemsize
                if (self.folder / name).stat().st_size < size:
                    raise ValueError
                os.truncate(self.folder / name, size)
        except (UserError, OSError, KeyError, TypeError, ValueError):
            print(f"{self.folder} is damaged: starting over")
            return False
        self.rows, self.bytes = progress["rows"], progress["bytes"]
        self.complete, self.lengths = progress["complete"], progress["lengths"]
        self.refused = Refused(progress["refused_counts"], progress["refused"])
        print(f"going on after {self.rows:,} rows that are done", flush=True)
        return True

    def __len__(self):
        return self.lengths["starts"]

    def append(self, part):
        """Add the records of a batch of rows."""
        lengths = dict(self.lengths)
        for name, values in part.arrays.items():
            values = values + lengths[COUNTS_IN[name]] if name in COUNTS_IN else values
            self.files[name].write(values.astype(FILES[name], copy=False).tobytes())
            self.lengths[name] += len(values)
        for reason, where in part.refused:
            self.refused.add(reason, where)
        self.rows, self.bytes = self.rows + part.rows, self.bytes + part.bytes
        if time.monotonic() - self.committed >= COMMIT_SECONDS:
            self.commit()

    def commit(self, complete=False):
        """Make what was appended so far last; a journal without any record is not worth it."""
        self.complete = complete
        for file in self.files.values():
            file.flush()
            if len(self):
                os.fsync(file.fileno())
        if len(self):
            fresh = self.path.with_suffix(".new")
            write_json(fresh, {
                "settings": self.settings, "rows": self.rows, "bytes": self.bytes,
                "complete": complete, "lengths": self.lengths, "refused": self.refused.first,
                "refused_counts": self.refused.counts})
            fresh.replace(self.path)
        self.committed = time.monotonic()

    # ------------------------------------------------------------------------------ reading it

    def open(self):
        """Make ready for `ids`, `supervised` and `images`, when nothing more will be appended."""
        for file in self.files.values():
            file.close()
        self.at = {name: np.append(np.fromfile(self.folder / name, np.int64),
                                   self.lengths[COUNTS_IN[name]]) for name in COUNTS_IN}
        self.image_keys = np.fromfile(self.folder / "image_keys", np.uint64)
        self.handles = {name: open(self.folder / name, "rb", buffering=0)  # noqa: SIM115
                        for name in ("ids", "supervised", "images")}

    def ids(self, i):
        return self._read("ids", self.at["starts"][i], self.at["starts"][i + 1])

    def blocks(self, start, end):
        """Yield the ids from position start to end, a few at a time."""
        for at in range(start, end, BLOCK_IDS):
            yield self._read("ids", at, min(at + BLOCK_IDS, end))

    def supervised(self, i):
        return self._read("supervised", self.at["starts"][i], self.at["starts"][i + 1])

    def images(self, i):
        """The encoded pictures of chat i."""
        bounds = self.at["image_starts"]
        return [self._read("images", bounds[n], bounds[n + 1]).tobytes()
                for n in range(*self.at["first_image"][i : i + 2])]

    def _read(self, name, start, end):
        # Reads, not a memory map: pages of a map would count as this process's memory.
        size, parts = np.dtype(FILES[name]).itemsize, []
        at, end = int(start) * size, int(end) * size
        while at < end:  # one call reads 2 GiB at most
            parts.append(os.pread(self.handles[name].fileno(), end - at, at))
            at += len(parts[-1])
        return np.frombuffer(b"".join(parts), FILES[name])


# --------------------------------------------------------------------------------- filling it


@dataclass
class Part:
    """The records of a batch of rows, ready to be appended."""

    arrays: dict  # by the names of FILES; positions count from the start of the part
    refused: list  # (reason, where)
    rows: int
    bytes: int


def fill(journal, source, make, limit=0, workers=None):
    """Read the rows of `source` behind the journal's and append make(row) of each, in order.

    make runs in threads, on all cores unless workers says otherwise: decoding and tokenising let go
    of Python's lock. It refuses a row by a ValueError or ImageError with the reason. Where limit
    is above 0, reading ends soon after that many records are there.
    """
    if journal.complete:
        return
    workers = workers or cores()
    pool, waiting, progress = ThreadPoolExecutor(workers), deque(), Progress(journal, source, limit)

    def take(left):
        """Append what is ready until `left` batches wait; True once that is enough."""
        while len(waiting) > left and not (limit and len(journal) > limit):
            journal.append(waiting[0].result())  # it stays the first where it raises an error
            waiting.popleft()
            progress.show()
        return limit and len(journal) > limit  # one more than the limit: the last may go on

    try:
        for batch in batches(source.rows(journal.rows)):
            waiting.append(pool.submit(work, make, batch))
            if take(2 * workers):
                break
        take(0)
        journal.commit(complete=True)
    except UserError:  # the source failed; or a row did, and take raises its error again
        take(0)
        journal.commit()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def batches(rows):
    """Lists of (where, row, bytes), none of them long in rows or bytes."""
    batch, size = [], 0
    try:
        for item in rows:
            batch.append(item)
            size += item[2]
            if len(batch) == BATCH_ROWS or size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    except UserError:  # what came before it counts
        yield batch
        raise
    yield batch


def work(make, batch):
    """The Part that a batch of rows makes."""
    records, refused = [], []
    for where, row, _ in batch:
        try:
            records.append(make(parsed(row)))
        except ImageError as error:
            refused.append((error.reason, where))
        except ValueError as error:
            refused.append((str(error), where))
        except TypeError:
            refused.append(("a row of another form", where))
    return Part(pack(records), refused, len(batch), sum(int(item[2]) for item in batch))


def pack(records):
    """The arrays of FILES for some records, end to end."""
    arrays = {"ids": [np.empty(0, np.uint16)], "supervised": [np.empty(0, np.bool_)]}
    images, starts, image_starts, first_image, n_ids, n_bytes = [], [], [], [], 0, 0
    for record in records:
        if not record.goes_on:
            starts.append(n_ids)
            first_image.append(len(image_starts))
        for image in record.images:
            image_starts.append(n_bytes)
            n_bytes += len(image)
        images += record.images
        arrays["ids"].append(record.ids)
        arrays["supervised"].append(np.array(record.supervised, np.bool_))
        n_ids += len(record.ids)
    return {
        **{name: np.concatenate(parts) for name, parts in arrays.items()},
        "images": np.frombuffer(b"".join(images), np.uint8),
        "starts": np.array(starts, np.int64), "image_starts": np.array(image_starts, np.int64),
        "first_image": np.array(first_image, np.int64),
        "image_keys": np.array([key_of(image) for image in images], np.uint64),
    }


def key_of(image):
    """A number that a picture shares only with the same bytes, or the same name."""
    return int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "little")


class Progress:
    """Prints every ten seconds how far a journal is."""

    def __init__(self, journal, source, limit):
        self.journal, self.total, self.limit = journal, source.total, limit
        self.began = self.said = time.monotonic()
        self.bytes_before, self.share_before = journal.bytes, self._share()
        self.pictures_before = self._pictures()

    def _pictures(self):
        return self.journal.lengths.get("image_starts", 0)

    def _share(self):
        """How much of the work is done, 0 to 1, or None where nobody knows."""
        if self.limit:
            return min(1, len(self.journal) / self.limit)
        return min(1, self.journal.bytes / self.total) if self.total else None

    def show(self):
        now, journal = time.monotonic(), self.journal
        if now - self.said < SAY_SECONDS:
            return
        self.said, seconds, share = now, now - self.began, self._share()
        left = ""
        if share is not None and share > self.share_before:
            rest = seconds * (1 - share) / (share - self.share_before)
            left = f", {rest / 60:.0f} min left" if rest >= 90 else f", {rest:.0f} s left"
        if pictures := self._pictures() - self.pictures_before:
            left = f", {pictures / seconds:.0f} pictures/s{left}"
        print(f"{journal.rows:,} rows, {journal.lengths['ids']:,} tokens, "
              f"{(journal.bytes - self.bytes_before) / seconds / 1e6:.1f} MB/s{left}", flush=True)


# ------------------------------------------------------------------------------ all of a data set


def read_all(folder, cfg, sources, tokenizer, make, limit, workers=None, archives=()):
    """Journals, filled, of all sources: {name: journal}, and which rows were left out, printed.

    archives: the identities of the files that pictures come from, as records depend on them too.
    """
    later = ("out", "files", "val_files", "val_share", "seed", "shard_tokens", "shard_bytes")
    kept = {name: value for name, value in asdict(cfg).items()
            if name not in later}  # they change no record
    journals, refused = {}, Refused()
    try:
        for name, source in sources.items():
            settings = {**kept, "tokenizer": tokenizer.fingerprint, "source": source.identity,
                        "archives": archives}
            journals[name] = Journal(folder.work / name, settings)
            fill(journals[name], source, make, limit if name == "rows" else 0, workers)
            journals[name].open()
    finally:
        for journal in journals.values():
            refused.add_all(journal.refused)
        refused.show()
    if len(journals["rows"]) == 0:
        shutil.rmtree(folder.work)  # nothing in it is worth keeping
    return journals, refused
