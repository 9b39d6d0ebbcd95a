"""Conversion of rows (sources.py, schema.py) to a folder of token shards or chats (writers.py)."""

import hashlib
import io
import lzma
import os
from array import array
from functools import partial
from itertools import chain, islice

import numpy as np
from tqdm import tqdm

import tokenizer as tokenizers
from common.archives import BLOCK, Joined, decompressed, identity_of, open_images
from common.config import UserError
from common.images import fit, read_image
from prep.resumable import Record, in_order, read_all
from prep.schema import Columns, chats_of, check_quality, text_of
from prep.sources import parsed, pieces, sources_of
from prep.writers import new_data_set, write_manifest, write_shards, write_split

VOCABULARY_TEXT = 200_000_000  # characters that a tokenizer is trained on, at most
LONG = 16 * BLOCK  # characters of a text that is tokenized on several cores
MOST_IDS = 499_000_000  # of a document: SQLite stores at most 10^9 bytes in a row
RATIO, ROOM = 100, 1 << 30  # an archive that unpacks to more than RATIO times and ROOM is a bomb


def convert_text(cfg):
    """Tokenize documents, shuffled, into shards."""
    sources, folder = sources_of(cfg), new_data_set(cfg.out, "text")
    with folder as out:
        if cfg.vocabulary:
            texts = islice(texts_of(sources["rows"], cfg.field), cfg.max_documents or None)
            tokenizer = tokenizers.train(chain.from_iterable(map(pieces, texts)), cfg.vocabulary)
        else:
            tokenizer = tokenizers.load(cfg.tokenizer)

        def encode(piece):
            return np.array(tokenizer.encode(piece), np.uint16)

        def make(row):
            text = text_of(row, cfg.field)
            parts = (in_order if len(text) > LONG else map)(encode, pieces(text))
            ids = np.concatenate([np.array([tokenizer.end_of_text], np.uint16), *parts])
            if len(ids) > MOST_IDS:
                raise ValueError(f"a document of more than {MOST_IDS} tokens")
            others = {**row, cfg.field: None} if isinstance(row, dict) else {}
            return [Record(ids, unused=Columns(others).unread())]

        reading = read_all(folder.work, cfg, sources, tokenizer, make, cfg.max_documents)
        with reading as (records, counts):
            for split, (n, documents) in documents_of(cfg, records, tokenizer).items():
                n_tokens = write_shards(out, split, documents, cfg.shard_tokens)
                counts[f"{split}_tokens"] = n_tokens
                print(f"{cfg.out}/{split}: {n} documents, {n_tokens:,} tokens")
            write_manifest(out, "text", tokenizer, **counts)


def texts_of(source, field):
    """Yield the first texts of a source, about VOCABULARY_TEXT characters."""
    n_characters = 0
    for _, row, _ in source.rows():
        try:
            text = text_of(parsed(row), field)
        except ValueError:
            continue
        yield text
        n_characters += len(text)
        if n_characters > VOCABULARY_TEXT:
            return


def documents_of(cfg, records, tokenizer):
    """{split: (number of documents, iterable of their ids)}"""
    if len(records) == 1 and len(records["rows"]) == 1:  # one long text, whose end is held out
        ids = records["rows"][0].ids
        n_held = max(1, round(len(ids) * cfg.val_share)) if cfg.val_share else 0
        train, val = np.split(ids, [len(ids) - n_held])
        held_out = (1, [[tokenizer.end_of_text], val]) if n_held else (0, [])
        return {"train": (1, [train]), "val": held_out}
    kind = "document" if cfg.val_share or cfg.val_files else ""
    splits = splits_of(cfg, records, cfg.max_documents, kind)
    return {split: (len(numbers), (record.ids for record in map(source.__getitem__, numbers)))
            for split, (source, numbers) in splits.items()}


def splits_of(cfg, records, limit, kind=""):
    """{split: (Records, numbers of its records)}; training numbers come in a seeded order.

    Equal rows and rows that show the same image stay together, as what is held out could else be in
    both: LLaVA-Instruct-150K has about two rows per image. How many rows that are is printed.
    UserError if none is left for validation, with the kind of rows unless that is empty.
    """
    from scipy.sparse import coo_array, csgraph

    rows = records["rows"]
    n = min(len(rows), limit or len(rows))
    order, (row, keys) = np.random.default_rng(cfg.seed).permutation(n), keys_of(rows, n)
    if "val_rows" in records:
        val = records["val_rows"]
        val_row, val_keys = keys_of(val, len(val))
        if n_known := len(set(val_row[np.isin(val_keys, keys)])):
            print(f"{n_known:,} of {len(val):,} validation rows equal a training row or show its "
                  "image")
        train, held_out = order, np.arange(len(val))
    else:
        # Nodes are the rows and their keys, so a group is a connected component.
        val, (names, key) = rows, np.unique(keys, return_inverse=True)
        edges = coo_array((np.ones(len(row), np.int8), (row, n + key)), [n + len(names)] * 2)
        group = csgraph.connected_components(edges, directed=False)[1][:n]
        sizes = np.bincount(group)
        if n_grouped := sizes[sizes > 1].sum():
            print(f"{n_grouped:,} of {n:,} rows equal another or show its image: they stay "
                  "together")
        is_val = np.isin(group, chosen_groups(cfg, n, sizes))
        train, held_out = order[~is_val[order]], np.flatnonzero(is_val)
    if kind and len(held_out) == 0:
        raise UserError(f"no {kind} is left for validation (equal ones and those about the same "
                        "image stay together); give --val_files or a larger --val_share")
    return {"train": (rows, train), "val": (val, held_out)}


def chosen_groups(cfg, n, sizes):
    """The random groups of rows that are held out: the first that make val_share of all n rows,
    without those that are too large; the smallest if all are."""
    groups = np.random.default_rng(cfg.seed).permutation(len(sizes))
    wanted = left = min(round(n * cfg.val_share) or int(cfg.val_share > 0), max(0, n - 1))
    held_out = []
    for number in groups.tolist():
        if sizes[number] <= left:
            held_out.append(number)
            left -= sizes[number]
    if wanted and not held_out and len(groups) > 1:
        held_out = [groups[np.argmin(sizes[groups])]]
    return held_out


def keys_of(records, n):
    """The keys of the first n Records and the number of the record that each belongs to, as arrays
    (number, key)."""
    counts, keys = array("q"), bytearray()
    for found in islice(records.column("keys"), n):
        counts.append(len(found) // 8)
        keys += found
    return np.repeat(np.arange(n), counts), np.frombuffer(keys, np.int64)


def convert_chats(cfg):
    """Tokenize chats into a data folder, with their images resized where cfg is Images."""
    tokenizer, command, counts = tokenizers.load(cfg.tokenizer), "chat", {}
    if hasattr(cfg, "image_root"):
        command, counts["stored_images"] = "images", {"size": cfg.image_size, "fit": cfg.fit}
    sources, folder = sources_of(cfg), new_data_set(cfg.out, command)
    with folder as out, read_chats(cfg, folder.work, sources, tokenizer) as (records, notes):
        for split, (source, numbers) in splits_of(cfg, records, cfg.max_chats, "chat").items():
            # sorted, as sequential reading is faster; the loader shuffles
            chats = (source[i] for i in np.sort(numbers))
            found = write_split(out / split, chats, getattr(cfg, "shard_bytes", 0))
            print(f"{cfg.out}/{split}: {found['chats']} chats, {found['tokens']:,} tokens, "
                  f"{found['images']} images")
            counts[split] = found
        write_manifest(out, command, tokenizer, **counts, **notes)


def read_chats(cfg, work, sources, tokenizer):
    """read_all of chats: text-only ones are filtered by Magpie's columns, images are resized."""
    find, ratings = None, ratings_of(cfg)
    if hasattr(cfg, "image_root"):
        find = open_images(cfg.image_root, partial(unpacked, folder=work / "unpacked"))

    def make(row):
        chats, unused = chats_of(row, ratings)
        if find is None:
            if isinstance(row, dict):
                check_quality(row, cfg)
            if any(images for _, images in chats):
                raise ValueError("an image in a row; use prepare.py images")
        records, encoded = [], None
        for messages, images in chats:  # all with the same images
            encoded = encoded or [resized(source, find, cfg) for source in images]
            chat = tokenizers.render(tokenizer, messages, len(images))
            records.append(Record(np.array(chat.ids, np.uint16), chat.supervised, encoded, unused))
        return records

    # One thread for text: turns are so short that two, which share Python's lock, are 1.6x slower.
    workers, archives = (None, find.identity) if find else (1, ())
    return read_all(work, cfg, sources, tokenizer, make, cfg.max_chats, workers, archives)


def ratings_of(cfg):
    """The (name, lowest rating) pairs of --min_rating."""
    pairs = [pair.split(":") for pair in getattr(cfg, "min_rating", "").split(",") if pair]
    try:
        return [(name.strip(), float(lowest)) for name, lowest in pairs]
    except ValueError:
        raise UserError(f"--min_rating={cfg.min_rating}: expected names and numbers, like "
                        "relevance:4,formatting:3") from None


def resized(source, find, cfg):
    """An image, given by its name or bytes, as the JPEG that is stored."""
    content, name = (source, "an image") if isinstance(source, bytes) else (find(source), source)
    image = read_image(content, name, cfg.image_size, cfg.fit)
    file = io.BytesIO()
    fit(image, cfg.image_size, cfg.fit).save(file, "JPEG", quality=90)
    return file.getvalue()


def unpacked(paths, codec, folder):
    """The path of a plain tar in `folder` with the content of a compressed one, which has no random
    access. codec: zstd or gzip."""
    key = hashlib.sha256(repr(identity_of(paths)).encode()).hexdigest()[:16]
    done, new, source = folder / f"{key}.tar", folder / f"{key}.part", Joined(paths)
    if done.is_file():  # unpacked by an earlier start
        return done
    folder.mkdir(exist_ok=True)
    bar = tqdm(desc=f"unpacking {paths[0]}", total=source.size, unit="B", unit_scale=True,
               disable=None)
    try:
        with open(new, "wb") as file, bar:
            for block in blocks_of(source, codec, paths[0]):
                file.write(block)
                bar.update(source.at - bar.n)
                if file.tell() > RATIO * source.size + ROOM:
                    raise UserError(f"{paths[0]} unpacks to more than {RATIO} times its size, like "
                                    "a file that is made to fill the disk; do not use it")
            file.flush()
            os.fsync(file.fileno())
    except UserError:
        new.unlink()
        raise
    new.rename(done)
    return done


def blocks_of(source, codec, name):
    """Yield blocks of the decompressed content of the file `source`."""
    try:
        stream = decompressed(io.BufferedReader(source, BLOCK), codec)
        yield from iter(partial(stream.read, BLOCK), b"")
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{name} is incomplete or damaged ({error}); download it again") from None
