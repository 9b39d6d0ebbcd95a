"""Rows of text or chats, with images or without, to a data folder."""

import hashlib
import io
import os
import warnings
from itertools import chain, islice

import numpy as np
from tqdm import tqdm

import tokenizer as tokenizers
from common import hub
from common.archives import BLOCK, Joined, identity_of, open_images
from common.config import UserError
from common.images import fit, read_image
from prep.resumable import Record, digest, read_all
from prep.schema import ask_shortly, check_quality, images_of, messages_of, text_of
from prep.sources import parsed, pieces, sources_of
from prep.splits import splits_of
from prep.writers import ChatWriter, Shards, check_size, new_data_set, write_manifest

VOCABULARY_TEXT = 200_000_000  # characters that a tokenizer is trained on, at most
RATIO, ROOM = 100, 1 << 30  # an archive that unpacks to more than RATIO times and ROOM is a bomb


# -------------------------------------------------------------------------------------------- text


def convert_text(cfg):
    """Tokenize documents, shuffled, into shards."""
    sources, folder = sources_of(cfg), new_data_set(cfg.out)
    with folder as out:
        tokenizer = text_tokenizer(cfg, folder, sources["rows"])
        check_size(tokenizer, cfg)

        def make(row):
            text, goes_on = text_of(row, cfg.field), getattr(row, "goes_on", False)
            parts = [[]] if goes_on else [[tokenizer.end_of_text]]
            parts += map(tokenizer.encode, pieces([text]))
            ids = np.concatenate([np.array(part, np.uint16) for part in parts])
            return Record(ids, goes_on=goes_on)

        records, refused = read_all(folder.work, cfg, sources, tokenizer, make,
                                    cfg.max_documents)
        if len(records["rows"]) == 0:
            raise UserError(f"{sources['rows'].name} holds no text")
        counts = {}
        for split, (n, documents) in documents_of(cfg, records, tokenizer).items():
            shards = Shards(out, split, cfg.shard_tokens)
            for ids in documents:
                shards.append(ids)
            shards.close()
            counts[f"{split}_tokens"] = shards.tokens
            print(f"{cfg.out}/{split}: {n} documents, {shards.tokens:,} tokens")
        write_manifest(out, tokenizer, **counts, left_out=refused.table())


def text_tokenizer(cfg, folder, source):
    """The tokenizer that the settings name, or one trained on the first texts of the source."""
    if not cfg.vocabulary:
        return tokenizers.load(cfg.tokenizer)
    settings = [cfg.vocabulary, cfg.field, source.identity]
    done, new = folder.work / f"vocabulary-{digest(settings)[:16]}", folder.work / "vocabulary"
    if not done.is_dir():  # else an earlier start trained it
        new.mkdir(exist_ok=True)
        texts = islice(texts_of(source, cfg.field), cfg.max_documents or None)
        tokenizers.train(texts, cfg.vocabulary).save(new)
        new.rename(done)
    return tokenizers.load(done)


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
    """{split: (number of documents, iterator of their ids)}."""
    rows = records["rows"]
    if len(records) == 1 and len(rows) == 1:  # one long text, whose end is held out
        n_ids = rows.n_ids
        n_held = max(1, round(n_ids * cfg.val_share)) if cfg.val_share else 0
        tail = chain([[tokenizer.end_of_text]], rows.blocks(n_ids - n_held, n_ids))
        return {"train": (1, rows.blocks(0, n_ids - n_held)),
                "val": (1, tail) if n_held else (0, [])}
    return {split: (len(numbers), map(source.ids, numbers)) for split, (source, numbers)
            in splits_of(cfg, records, cfg.max_documents).items()}


# ------------------------------------------------------------------------------------------- chats


def convert_text_chats(cfg):
    """Tokenize chats about text, without those of poor quality by their own columns."""

    def read(row):
        messages = messages_of(row)
        check_quality(row, cfg)
        return messages, []

    # One thread: turns are so short that two threads, which share Python's lock, are 1.6x slower.
    convert_chats(cfg, lambda work: (read, []), workers=1)


def convert_image_chats(cfg):
    """Tokenize chats about images, and store the images resized, or with --copy=False their names.
    """
    stored = {"size": cfg.image_size, "fit": cfg.fit, "copied": cfg.copy}
    if not cfg.copy:
        if not cfg.image_root:
            raise UserError("--copy=False needs --image_root, where the images stay")
        roots = [path.strip() for path in cfg.image_root.split(",")]
        stored["root"] = ",".join(path if path.startswith(hub.PREFIX) else os.path.abspath(path)
                                  for path in roots)

    with warnings.catch_warnings():  # here, because threads share the setting in read_image
        warnings.simplefilter("ignore")
        convert_chats(cfg, image_reader(cfg), cfg.shard_bytes, stored_images=stored)


def image_reader(cfg):
    """The `reader` of read_chats for chats about images."""
    def reader(work):
        def unpack(paths, codec):
            return unpacked(paths, codec, work / "unpacked")

        find = open_images(cfg.image_root, unpack if cfg.copy else None)

        def read(row):
            messages = messages_of(row)
            images = [prepared(source, find, cfg) for source in images_of(row, messages)]
            return ask_shortly(messages) if cfg.short_answers else messages, images

        return read, find.identity

    return reader


def prepared(source, find, cfg):
    """What is stored of an image given by its name or bytes: a JPEG, or the name that finds it."""
    inside = isinstance(source, bytes)
    if inside and not cfg.copy:
        raise UserError("--copy=False needs images in files, and these are inside the rows; use "
                        "--copy=True")
    content, name = (source, "an image") if inside else (find(source), source)
    image = read_image(content, name, cfg.image_size, cfg.fit)
    if not cfg.copy:
        return find.name_of(source).encode()
    file = io.BytesIO()
    fit(image, cfg.image_size, cfg.fit).save(file, "JPEG", quality=90)
    return file.getvalue()


def convert_chats(cfg, reader, shard_bytes=0, workers=None, **manifest):
    """Tokenize chats into a data folder. reader: see read_chats; manifest: further entries of its
    manifest.json."""
    tokenizer = tokenizers.load(cfg.tokenizer)
    check_size(tokenizer, cfg)
    sources, folder = sources_of(cfg), new_data_set(cfg.out)
    with folder as out:
        records, refused = read_chats(cfg, folder.work, sources, tokenizer, reader, workers)
        splits = splits_of(cfg, records, cfg.max_chats)
        if len(splits["train"][1]) == 0:
            raise UserError(f"{sources['rows'].name} holds no usable chat")
        if len(splits["val"][1]) == 0:
            raise UserError("no chat is left for validation (those about the same image stay "
                            "together); give --val_files or a larger --val_share")
        for split, (source, numbers) in splits.items():
            # sorted, as sequential reading is faster; the loader shuffles
            counts = write_split(out / split, source, np.sort(numbers), shard_bytes)
            print(f"{cfg.out}/{split}: {counts['chats']} chats, {counts['tokens']:,} tokens, "
                  f"{counts['images']} images")
            manifest[split] = counts
        write_manifest(out, tokenizer, **manifest, left_out=refused.table())


def read_chats(cfg, work, sources, tokenizer, reader, workers=None):
    """The Records of all sources, and the refused rows, see read_all.

    reader(work) returns a function from a row to (messages, encoded images), and the identity of
    the archives that the images come from.
    """
    read, archives = reader(work)

    def make(row):
        messages, images = read(row)
        chat = tokenizers.render(tokenizer, messages, len(images))
        return Record(np.array(chat.ids, np.uint16), chat.supervised, images)

    return read_all(work, cfg, sources, tokenizer, make, cfg.max_chats, workers, archives)


def write_split(folder, records, numbers, shard_bytes):
    """Write the records with these numbers as one split; returns its counts."""
    writer = ChatWriter(folder, shard_bytes=shard_bytes)
    for i in numbers:
        writer.append(records.ids(i), records.supervised(i), records.images(i))
    return writer.close()


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
            for block in decompressed(source, codec, paths[0]):
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


def decompressed(source, codec, name):
    """Yield blocks of the decompressed content of the file `source`."""
    import pyarrow  # supports zstd on every version of Python

    file = pyarrow.PythonFile(io.BufferedReader(source, BLOCK), "r")
    stream = pyarrow.CompressedInputStream(file, codec)
    while True:
        try:
            block = stream.read(BLOCK)
        except OSError as error:
            raise UserError(f"{name} is incomplete or damaged ({error}); download it again"
                            ) from None
        if not block:
            return
        yield block
