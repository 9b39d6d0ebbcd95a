"""Data sets on disk for training, each with a manifest.

    python prepare.py demo                                    # the toy world, into data/demo
    python prepare.py text --files='books/*.jsonl' --out=data/books
    python prepare.py text --dataset=FineWeb-Edu=2,ClimbMix=1 --max_documents=100000
    python prepare.py chat --dataset=Magpie-Align/Magpie-Phi3-Pro-1M-v0.1 --out=data/public/chats
    python prepare.py images --files=llava.json --image_root=images.zip --out=data/captions
    python prepare.py check llava.json --image_root=images.zip  # before paying for a GPU

The output folder appears when it is complete. Interrupted or killed, the same command resumes. Rows
that cannot be used are left out and counted by reason. `prepare.py text --help` lists the settings.
"""

import sys
import time
from dataclasses import dataclass
from typing import Literal

import tokenizer as tokenizers
from common.config import UserError, parse, run_main
from common.device import peak_memory_gb
from prep.check import check
from prep.convert import convert_chats, convert_text
from prep.toy_dataset import write_demo
from prep.writers import new_data_set, write_manifest


@dataclass
class Demo:
    """The toy world: stories, chats, captioned images and chats about images."""

    # --- output
    out: str = "data/demo"  # output folder
    vocabulary: int = 1024  # size of the BPE vocabulary, special tokens included
    image_size: int = 48  # pixels

    # --- size
    stories: int = 40000  # number of text documents
    chats: int = 12000  # number of text-only chats
    captions: int = 16000  # number of captioned images
    conversations: int = 16000  # number of images with a chat
    questions: int = 4  # questions about each image
    held_out: int = 1000  # items of each kind in the validation split, and in the test split

    # --- random seeds
    seed: int = 0  # random seed of everything except the test split
    test_seed: int = 1003  # random seed of the test split, which is never used for tuning


@dataclass
class Rows:
    """Settings of everything that reads rows."""

    # --- source
    files: str = ""  # comma-separated paths or patterns; hf://OWNER/NAME/FILE for files of the hub
    # instead of files: NAME[@REVISION][:SUBSET] on the hub, FineWeb-Edu, ClimbMix, TinyStories or
    # a local folder; several in shares of bytes: NAME=WEIGHT,NAME=WEIGHT
    dataset: str = ""
    subset: str = ""  # configuration of the data set, where it has several
    split: str = "train"  # split of the data set
    encoding: str = ""  # of files that are not UTF-8 and have no byte-order mark, such as cp1252
    ignore_columns: str = ""  # comma-separated columns with text that is not needed

    # --- validation
    val_files: str = ""  # validation rows; if empty, val_share of the rows is held out
    val_share: float = 0.02  # fraction of the rows held out for validation
    seed: int = 0  # random seed of the validation split and of the order of documents

    # --- output
    tokenizer: str = "gpt2"  # gpt2, or a folder with a tokenizer.json


@dataclass
class Text(Rows):
    """Token shards from .txt, JSON, .csv or .parquet files, or from a data set of the hub."""

    # --- source
    field: str = "text"  # column that holds the text
    max_documents: int = 0  # use only the first documents; 0 for all

    # --- validation
    val_share: float = 0.01  # fraction of the documents held out for validation

    # --- output
    out: str = "data/text"  # output folder
    vocabulary: int = 0  # above 0: train a BPE of this size on these texts
    shard_tokens: int = 100_000_000  # tokens per shard


@dataclass
class Chat(Rows):
    """Chats in any form of docs/data.md: conversations, messages, instruction and response, ...

    Rows with Magpie's columns are filtered as its authors did (arXiv 2406.08464, table 5).
    """

    # --- source
    max_chats: int = 0  # use only the first chats; 0 for all

    # --- filters, by the columns of Magpie
    # lowest input_quality to keep
    min_quality: Literal["very poor", "poor", "average", "good", "excellent"] = "average"
    min_reward: float = -10.0  # lowest instruct_reward to keep
    drop_duplicates: bool = True  # of near-duplicates keep only what min_similar_uuid names
    language: str = "EN"  # keep only this value of the column language; empty for all
    safe_only: bool = True  # drop what llama_guard_2 does not call safe

    # --- output
    out: str = "data/chat"  # output folder


@dataclass
class Images(Rows):
    """Chats or captions about images in any form of docs/data.md; up to 4 images per row, or none.

    Equal rows and rows about the same image are held out together.
    """

    # --- source
    # folder, .zip, .tar or .tar.{zst,gz,bz2,xz} of images: comma-separated paths or patterns; a
    # name that is not found is searched by its base name, and refused if that fits several images
    image_root: str = ""
    max_chats: int = 0  # use only the first chats; 0 for all
    # lowest ratings to keep, like relevance:4,formatting:3, by the columns <name>_ratings that
    # FineVision has for each question and answer
    min_rating: str = ""

    # --- output
    out: str = "data/images"  # output folder
    image_size: int = 224  # pixels of the square that images are fitted into, or of the short side
    # pad: padded to a square, as in LLaVA; short: not padded, so that training can pad or crop
    fit: Literal["pad", "short"] = "pad"
    shard_bytes: int = 1_000_000_000  # bytes of images per file


@dataclass
class Check(Images):
    """Count what is in a data set, what is wrong with it, and what training makes of it.

    DATA is a folder that prepare.py made, or a .json, .jsonl or .parquet file or a pattern, which
    is converted as `prepare.py images` does it; its flags --out and --shard_bytes have no effect,
    and --val_files are not read.
    """

    # --- training
    context: int = 1024  # positions of a training row
    patches: int = 256  # positions of an image in it: 256 for ViT-L/14 at 224 pixels
    batch_tokens: int = 65_536  # positions of a training step

    # --- output
    sheet: str = "contact_sheet.png"  # image of 16 random chats; empty for none
    seed: int = 0  # random seed of the choice of chats
    show: int = 0  # above 0: print chat number N token by token, and nothing else


LOWEST = {"stories": 1, "chats": 1, "captions": 1, "conversations": 1, "questions": 1,
          "held_out": 1, "seed": 0, "max_documents": 0, "max_chats": 0,
          "shard_tokens": 1, "shard_bytes": 1, "image_size": 8, "context": 2, "patches": 1,
          "batch_tokens": 1, "show": 0,
          "vocabulary": 256 + len(tokenizers.SPECIALS)}  # every byte, and the special tokens


def demo(cfg):
    """Draw the demo's data: text, chats, captions, scenes, and a folder of held-out images."""
    began = time.time()
    with new_data_set(cfg.out, "demo") as out:
        n_train = write_demo(out, cfg)
        seconds = time.time() - began
        write_manifest(out, "demo", test_seed=cfg.test_seed, seconds=seconds,
                       peak_rss_gb=peak_memory_gb()[1])
    print(f"{cfg.out}: {cfg.stories} stories ({n_train:,} tokens), {cfg.chats} chats, "
          f"{cfg.captions} captions, {cfg.conversations} image chats, in {seconds:.0f} s")


COMMANDS = {"demo": (Demo, demo), "text": (Text, convert_text), "chat": (Chat, convert_chats),
            "images": (Images, convert_chats), "check": (Check, check)}


def main():
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        return print(__doc__)
    name, *argv = sys.argv[1:]
    if name not in COMMANDS:
        raise UserError(f"prepare.py {name}: expected one of {', '.join(COMMANDS)}")
    config, command = COMMANDS[name]
    if config is Check and argv and not argv[0].startswith("-"):
        argv[0] = f"--files={argv[0]}"
    cfg = parse(config, argv, f"{name} {'DATA' if config is Check else '[CONFIG]'}")
    for setting, low in LOWEST.items():
        value = getattr(cfg, setting, low)
        if value < low and value != getattr(config, setting):  # a default may mean "none"
            raise UserError(f"--{setting}={value} is too small: {low} at least")
    if not 0 <= getattr(cfg, "val_share", 0) < 1:
        raise UserError(f"--val_share={cfg.val_share} must be at least 0 and below 1")
    command(cfg)


if __name__ == "__main__":
    run_main(main)
