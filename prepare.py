"""Data sets on disk, in the form that data.py and train/packing.py read, each with a manifest.

    python prepare.py demo                                    # the picture world, into data/demo
    python prepare.py text --files='books/*.jsonl' --out=data/books
    python prepare.py text --dataset=HuggingFaceFW/fineweb-edu --subset=sample-10BT --out=data/edu
    python prepare.py chat --dataset=Magpie-Align/Magpie-Phi3-Pro-1M-v0.1 --out=data/magpie
    python prepare.py images --files=llava.json --image_root=images.zip --out=data/captions
    python prepare.py images --files=hf://liuhaotian/LLaVA-CC3M-Pretrain-595K/chat.json \
        --image_root=hf://liuhaotian/LLaVA-CC3M-Pretrain-595K/images.zip --out=data/captions
    python prepare.py fineweb --shards=10 --out=data/fineweb  # text that is tokenised already
    python prepare.py check llava.json --image_root=images.zip  # before paying for a GPU

A data set appears under its name only when it is whole. Killed or stopped, the same command goes on
from where it was. Rows that cannot be used are counted by reason, the first ones named, and left
out.
"""

import sys
import time
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal

import numpy as np

import tokenizer as tokenizers
from common.checkpoint import write_json
from common.config import UserError, parse, run_main, seal
from common.device import peak_memory_gb
from prep.check import Check, check, data_first
from prep.convert import write_image_chats, write_text_chats
from prep.fineweb import fetch_shards
from prep.resumable import Record, digest, read_all
from prep.schema import text_of, texts_of
from prep.sources import at_least, pieces, sources_of
from prep.splits import splits_of
from prep.toy_dataset import write_demo
from prep.writers import Shards, check_size, new_data_set, write_manifest

SMALLEST_VOCABULARY = 256 + len(tokenizers.SPECIALS)  # every byte, and the specials
VOCABULARY_TEXT = 200_000_000  # characters that a vocabulary is trained on, at most


@dataclass
class Demo:
    """The picture world: stories, chats, captioned pictures and chats about pictures."""

    # --- output
    out: str = "data/demo"  # folder to make
    vocabulary: int = 1024  # tokens of the small BPE, specials included
    image_size: int = 48  # pixels

    # --- size
    stories: int = 40000  # documents of text
    chats: int = 12000  # chats about text
    captions: int = 16000  # captioned pictures
    conversations: int = 16000  # pictures with a chat
    questions: int = 4  # questions about each picture
    held_out: int = 1000  # items of each kind for validation, and as many for the test

    # --- random seeds
    seed: int = 0  # of everything drawn but the test split
    test_seed: int = 1003  # of the test split, which is scored once and never tuned on


@dataclass
class Rows:
    """What text, chats and pictures have in common: where the rows are and which are held out."""

    # --- source
    files: str = ""  # paths or patterns, separated by commas; hf://OWNER/NAME/FILE for the hub's
    dataset: str = ""  # instead of files: a data set of the Hugging Face hub, or a folder of one
    subset: str = ""  # which configuration of the data set, where it has several
    split: str = "train"  # which split of the data set

    # --- validation
    val_files: str = ""  # rows for validation; without them val_share of the others is held out
    val_share: float = 0.02  # share held out for validation
    seed: int = 0  # of the choice

    # --- output
    tokenizer: str = "gpt2"  # gpt2, or a folder with a tokenizer.json


@dataclass
class Text(Rows):
    """Token shards from .txt, .jsonl, .json or .parquet files, or from a data set of the hub."""

    # --- source
    field: str = "text"  # the column that holds the text
    max_documents: int = 0  # documents to take at most, the first ones; 0 for all

    # --- validation
    val_share: float = 0.01  # share of the documents held out for validation
    seed: int = 0  # of the order of documents

    # --- output
    out: str = "data/text"  # folder to make
    vocabulary: int = 0  # above 0: train a BPE of that many tokens on these texts instead
    shard_tokens: int = 100_000_000  # tokens in a shard


@dataclass
class Chat(Rows):
    """Chats from JSONL, JSON or parquet: conversations, messages, or instruction and response.

    Of rows with the columns of Magpie, the poor ones are left out as in the sets that Magpie's
    authors filtered themselves (arXiv 2406.08464, table 5); others are not touched by that.
    """

    # --- source
    max_chats: int = 0  # chats to take at most, the first ones; 0 for all

    # --- filters, by the columns of Magpie
    # lowest input_quality to keep
    min_quality: Literal["very poor", "poor", "average", "good", "excellent"] = "average"
    min_reward: float = -10.0  # lowest instruct_reward to keep
    drop_duplicates: bool = True  # of near-copies keep only the one that min_similar_uuid names
    language: str = "EN"  # the only value of the column language to keep; empty for all
    safe_only: bool = True  # leave out what llama_guard_2 does not call safe

    # --- output
    out: str = "data/chat"  # folder to make


@dataclass
class Images(Rows):
    """Chats or captions about pictures, in LLaVA's form; up to 4 pictures in a row, or none.

    Rows that show the same picture are held out together, or not at all.
    """

    # --- source
    # folder, .zip, .tar, .tar.zst or .tar.gz with the pictures, or several: paths and patterns with
    # commas between them; a name that is not there is sought by its base name
    image_root: str = ""
    max_chats: int = 0  # chats to take at most, the first ones; 0 for all

    # --- output
    out: str = "data/images"  # folder to make
    image_size: int = 224  # pixels of the square that pictures are fitted into, or the short side
    # pad: padded to a square, as LLaVA does; short: all of the picture with its short side that
    # long, so that training can pad or crop it
    fit: Literal["pad", "short"] = "pad"
    copy: bool = True  # False: pictures stay where they are, and the data set has their names
    short_answers: bool = False  # where all answers have 3 words at most, ask for short ones
    shard_bytes: int = 1_000_000_000  # bytes of pictures in a file


@dataclass
class FineWeb:
    """Public shards of FineWeb-Edu that are GPT-2 tokens already, 100 million in each."""

    # --- source
    repository: str = "ShallowU/FineWeb-Edu-10B-Tokens-NPY"  # data set of the Hugging Face hub
    shards: int = 0  # training shards to fetch, the first ones; 0 for all; validation comes always

    # --- output
    out: str = "data/fineweb"  # folder to make


# -------------------------------------------------------------------------------------------- demo


def demo(cfg):
    """Draw the demo's data: text, chats, captions, scenes, and a folder of held-out pictures."""
    at_least(cfg, stories=1, chats=1, captions=1, conversations=1, questions=1, held_out=1,
             vocabulary=SMALLEST_VOCABULARY, image_size=8)
    began = time.time()
    with new_data_set(cfg.out) as out:
        n_train = write_demo(out, cfg)
        write_json(out / "manifest.json", seal({
            "seconds": time.time() - began, "peak_rss_gb": peak_memory_gb()[1],
            "test_seed": cfg.test_seed}))
    print(f"{cfg.out}: {cfg.stories} stories ({n_train:,} tokens), {cfg.chats} chats, "
          f"{cfg.captions} captions, {cfg.conversations} picture chats, in "
          f"{time.time() - began:.0f} s")


# ----------------------------------------------------------------------------- sensible values


def check_rows(cfg):
    """UserError for values that make no sense in what all kinds of rows have."""
    at_least(cfg, seed=0)
    if not 0 <= cfg.val_share < 1:
        raise UserError(f"--val_share={cfg.val_share} is no share: it must be from 0 to below 1")


# -------------------------------------------------------------------------------------------- text


def text(cfg):
    """Tokenise documents, shuffled, into shards."""
    check_rows(cfg)
    at_least(cfg, shard_tokens=1, max_documents=0)
    if cfg.vocabulary:
        at_least(cfg, vocabulary=SMALLEST_VOCABULARY)
    sources, folder = sources_of(cfg), new_data_set(cfg.out)
    with folder as out:
        tokenizer = text_tokenizer(cfg, folder, sources["rows"])
        check_size(tokenizer, cfg)
        journals, refused = read_all(folder.work, cfg, sources, tokenizer,
                                     document_maker(cfg, tokenizer), cfg.max_documents)
        if len(journals["rows"]) == 0:
            raise UserError(f"{sources['rows'].name} holds no text")
        counts = {}
        for split, (n, documents) in documents_of(cfg, journals, tokenizer).items():
            shards = Shards(out, split, cfg.shard_tokens)
            for ids in documents:
                shards.append(ids)
            shards.close()
            counts[split] = n, shards.tokens
        write_manifest(out, tokenizer, train_tokens=counts["train"][1],
                       val_tokens=counts["val"][1], left_out=refused.table())
    (n_train, train_tokens), (n_val, val_tokens) = counts["train"], counts["val"]
    print(f"{cfg.out}: {n_train} documents, {train_tokens:,} tokens to train on; "
          f"{n_val} documents, {val_tokens:,} tokens for validation")


def text_tokenizer(cfg, folder, source):
    """The tokenizer that the settings name, or one trained on the first texts of the source."""
    if not cfg.vocabulary:
        return tokenizers.load(cfg.tokenizer)
    wanted = [cfg.vocabulary, cfg.field, source.identity]
    done, half = folder.work / f"vocabulary-{digest(wanted)[:16]}", folder.work / "vocabulary"
    if not done.is_dir():  # where an earlier start did not train it
        texts = islice(texts_of(source, cfg.field, VOCABULARY_TEXT), cfg.max_documents or None)
        half.mkdir(exist_ok=True)
        tokenizers.train(texts, cfg.vocabulary).save(half)
        half.rename(done)
    return tokenizers.load(done)


def document_maker(cfg, tokenizer):
    """A function from a row to the Record of its text."""

    def make(row):
        text, goes_on = text_of(row, cfg.field), getattr(row, "goes_on", False)
        parts = [[] if goes_on else [tokenizer.end_of_text], *map(tokenizer.encode, pieces([text]))]
        return Record(np.concatenate([np.array(part, np.uint16) for part in parts]),
                      goes_on=goes_on)

    return make


def documents_of(cfg, journals, tokenizer):
    """{split: (how many documents, iterator of their ids)}."""
    if len(journals) == 1 and len(journals["rows"]) == 1:  # one long text: its end is held out
        rows, n_ids = journals["rows"], journals["rows"].n_ids
        n_held = max(1, round(n_ids * cfg.val_share)) if cfg.val_share else 0
        tail = chain([[tokenizer.end_of_text]], rows.blocks(n_ids - n_held, n_ids))
        return {"train": (1, rows.blocks(0, n_ids - n_held)),
                "val": (1, tail) if n_held else (0, [])}
    return {split: (len(numbers), map(journal.ids, numbers)) for split, (journal, numbers)
            in splits_of(cfg, journals, cfg.max_documents).items()}


# --------------------------------------------------------------- chats, pictures, ready-made tokens


def chat(cfg):
    """Chats about text, tokenised."""
    check_rows(cfg)
    at_least(cfg, max_chats=0)
    write_text_chats(cfg)


def images(cfg):
    """Chats about pictures, tokenised, with the pictures made small."""
    check_rows(cfg)
    at_least(cfg, max_chats=0, image_size=1, shard_bytes=1)
    write_image_chats(cfg)


def fineweb(cfg):
    """Fetch token shards that somebody else made, every file checked."""
    at_least(cfg, shards=0)
    fetch_shards(cfg)


COMMANDS = {"demo": (Demo, demo), "text": (Text, text), "chat": (Chat, chat),
            "images": (Images, images), "fineweb": (FineWeb, fineweb), "check": (Check, check)}


def main():
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        for name, (config, _) in COMMANDS.items():
            print(f"python prepare.py {name} --help\n    {config.__doc__}")
        return
    if sys.argv[1] not in COMMANDS:
        raise UserError(f"prepare.py {sys.argv[1]}: expected one of {', '.join(COMMANDS)}")
    config, command = COMMANDS[sys.argv[1]]
    argv = data_first(sys.argv[2:]) if command is check else sys.argv[2:]
    command(parse(config, argv, f"{sys.argv[1]} {'DATA' if command is check else '[CONFIG]'}"))


if __name__ == "__main__":
    run_main(main)
