"""Rows of text or chats, with images or without, to a data folder."""

import io
import os
import warnings
from itertools import islice

import numpy as np

import tokenizer as tokenizers
from common import hub
from common.archives import open_images
from common.config import UserError
from common.images import fit, read_image
from prep.resumable import Record, digest, read_all
from prep.schema import ask_shortly, check_quality, images_of, messages_of, text_of
from prep.sources import parsed, sources_of
from prep.splits import splits_of
from prep.writers import ChatWriter, Shards, check_size, new_data_set, write_manifest

VOCABULARY_TEXT = 200_000_000  # characters that a tokenizer is trained on, at most


# -------------------------------------------------------------------------------------------- text


def convert_text(cfg):
    """Tokenize documents, shuffled, into shards."""
    sources, folder = sources_of(cfg), new_data_set(cfg.out)
    with folder as out:
        tokenizer = text_tokenizer(cfg, folder, sources["rows"])
        check_size(tokenizer, cfg)

        def make(row):
            ids = tokenizer.encode(text_of(row, cfg.field))
            return Record(np.array([tokenizer.end_of_text, *ids], np.uint16))

        records, refused = read_all(folder.work, cfg, sources, tokenizer, make,
                                    cfg.max_documents)
        splits = splits_of(cfg, records, cfg.max_documents)
        if len(splits["train"][1]) == 0:
            raise UserError(f"{sources['rows'].name} holds no text")
        if len(splits["val"][1]) == 0 and cfg.val_share:
            raise UserError(f"{sources['rows'].name} is one document and none is left for "
                            "validation; give --val_files, or --val_share=0")
        counts = {}
        for split, (source, numbers) in splits.items():
            shards = Shards(out, split, cfg.shard_tokens)
            for i in numbers:
                shards.append(source.ids(i))
            shards.close()
            counts[f"{split}_tokens"] = shards.tokens
            print(f"{cfg.out}/{split}: {len(numbers)} documents, {shards.tokens:,} tokens")
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


# ------------------------------------------------------------------------------------------- chats


def convert_text_chats(cfg):
    """Tokenize chats about text, without those of poor quality by their own columns."""

    def read(row):
        messages = messages_of(row)
        if cfg.filter:
            check_quality(row)
        return messages, []

    # One thread: turns are so short that two threads, which share Python's lock, are 1.6x slower.
    convert_chats(cfg, (read, ()), workers=1)


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
    """A function from a row about images to (messages, images as prepare.py stores them), and the
    identity of the archives that the images come from."""
    find = open_images(cfg.image_root)

    def read(row):
        messages = messages_of(row)
        images = [stored_image(source, find, cfg) for source in images_of(row, messages)]
        return ask_shortly(messages) if cfg.short_answers else messages, images

    return read, find.identity


def stored_image(source, find, cfg):
    """What is stored of an image given by its name or bytes: a JPEG, or the name that finds it."""
    is_content = isinstance(source, bytes)
    if is_content and not cfg.copy:
        raise UserError("--copy=False needs images in files, and these are inside the rows; use "
                        "--copy=True")
    content, name = (source, "an image") if is_content else (find(source), source)
    image = read_image(content, name, cfg.image_size, cfg.fit)
    if not cfg.copy:
        return find.name_of(source).encode()
    file = io.BytesIO()
    fit(image, cfg.image_size, cfg.fit).save(file, "JPEG", quality=90)
    return file.getvalue()


def convert_chats(cfg, reader, shard_bytes=0, workers=None, **manifest):
    """Tokenize chats into a data folder. reader: see image_reader; manifest: further entries of its
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
    """The Records of all sources, and the refused rows, see read_all. reader: see image_reader."""
    read, archives = reader

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
