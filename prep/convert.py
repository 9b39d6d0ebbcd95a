"""Chats from rows to a data folder, with pictures or without."""

import io
import os
import warnings

import numpy as np

import tokenizer as tokenizers
from common import hub
from common.archives import open_images
from common.config import UserError
from common.images import fit, read_image
from prep.resumable import Record, read_all
from prep.schema import ask_shortly, check_quality, images_of, messages_of
from prep.sources import sources_of
from prep.splits import splits_of
from prep.unpack import unpacked
from prep.writers import ChatWriter, check_size, new_data_set, write_manifest


def write_text_chats(cfg):
    """Tokenise chats, but those that their own columns call poor."""

    def read(row):
        messages = messages_of(row)
        check_quality(row, cfg)
        return messages, []

    # Turns are so short that threads would only wait for Python's lock: two take 1.6 times as long.
    write_conversations(cfg, lambda work: (read, []), workers=1)


def write_image_chats(cfg):
    """Tokenise chats about pictures, and fit the pictures, or where they are not copied look at
    each once."""
    said = {"size": cfg.image_size, "fit": cfg.fit, "copied": cfg.copy}
    if not cfg.copy:
        if not cfg.image_root:
            raise UserError("--copy=False leaves the pictures where they are: say --image_root")
        said["root"] = ",".join(absolute(part.strip()) for part in cfg.image_root.split(","))

    with warnings.catch_warnings():  # here, because threads share what read_image sets for itself
        warnings.simplefilter("ignore")
        write_conversations(cfg, image_reader(cfg), cfg.shard_bytes, stored_images=said)


def image_reader(cfg):
    """The `reader` of chats about images, see read_chats."""
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


def absolute(path):
    return path if path.startswith(hub.PREFIX) else os.path.abspath(path)


def prepared(source, find, cfg):
    """What is written down of a picture given by its name or bytes: a JPEG, or where to find it."""
    if isinstance(source, bytes) and not cfg.copy:
        raise UserError("there are pictures inside the rows, where training does not look: "
                        "--copy=False needs pictures in files; say --copy=True")
    content, name = (source, "a picture") if isinstance(source, bytes) else (find(source), source)
    image = read_image(content, name, cfg.image_size, cfg.fit)
    if not cfg.copy:
        return find.name_of(source).encode()
    file = io.BytesIO()
    fit(image, cfg.image_size, cfg.fit).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_conversations(cfg, reader, shard_bytes=0, workers=None, **manifest):
    """Tokenise chats. reader: see read_chats; manifest: what else manifest.json should say."""
    tokenizer = tokenizers.load(cfg.tokenizer)
    check_size(tokenizer, cfg)
    sources, folder = sources_of(cfg), new_data_set(cfg.out)

    with folder as out:
        journals, refused = read_chats(cfg, folder.work, sources, tokenizer, reader, workers)
        splits = splits_of(cfg, journals, cfg.max_chats)
        if len(splits["train"][1]) == 0:
            raise UserError(f"{sources['rows'].name} holds no chat that can be used")
        if len(splits["val"][1]) == 0:
            raise UserError("no chat is left for validation (those about one picture stay "
                            "together); say --val_files or a --val_share")
        for split, (journal, numbers) in splits.items():
            # the loader shuffles; here reading in order is quicker
            manifest[split] = write_split(out / split, journal, np.sort(numbers), shard_bytes)
        write_manifest(out, tokenizer, **manifest, left_out=refused.table())
    for split, count in ((split, manifest[split]) for split in splits):
        print(f"{cfg.out}/{split}: {count['chats']} chats, {count['tokens']:,} tokens, "
              f"{count['images']} pictures")


def read_chats(cfg, work, sources, tokenizer, reader, workers=None):
    """The Records of all sources, and which rows were refused, see read_all.

    reader(work) gives a function from a row to (messages, encoded images), and the identity of the
    archives that those come from.
    """
    read, archives = reader(work)

    def make(row):
        messages, images = read(row)
        chat = tokenizers.render(tokenizer, messages, len(images))
        return Record(np.array(chat.ids, np.uint16), chat.supervised, images)

    return read_all(work, cfg, sources, tokenizer, make, cfg.max_chats, workers, archives)


def write_split(folder, records, numbers, shard_bytes):
    """Write the records of these numbers as one split; returns its counts."""
    writer = ChatWriter(folder, shard_bytes=shard_bytes)
    for i in numbers:
        writer.append(records.ids(i), records.supervised(i), records.images(i))
    return writer.close()
