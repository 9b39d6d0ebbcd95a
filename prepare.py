"""Data sets on disk, in the form the stages read (data.py says which), each with a manifest.

    python prepare.py demo                                    # the picture world, into data/demo
    python prepare.py text --files='books/*.jsonl' --out=data/books
    python prepare.py chat --files=chats.jsonl --out=data/chats
    python prepare.py images --files=llava.json --image_root=images.zip --out=data/captions

A data set appears under its name only when it is whole. Rows that cannot be used are counted by
reason, the first ones named, and left out.
"""

import glob
import io
import json
import random
import shutil
import sys
import time
import zipfile
import zlib
from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import tales
import tokenizer as tokenizers
import world
from common.checkpoint import sums, write_json
from common.config import UserError, parse, run_main
from common.distributed import peak_memory_gb
from vision import fit, read_image


@dataclass
class Demo:
    """The picture world: stories, chats, captioned pictures and chats about pictures."""

    out: str = "data/demo"  # folder to make
    seed: int = 0  # of everything drawn
    stories: int = 40000  # documents of text
    chats: int = 12000  # chats about text
    captions: int = 16000  # captioned pictures
    conversations: int = 16000  # pictures with a chat
    questions: int = 7  # questions about each picture
    held_out: int = 1000  # validation items of each kind
    vocabulary: int = 1024  # tokens of the small BPE, specials included
    image_size: int = 96  # pixels


@dataclass
class Text:
    """Token shards from .txt, .jsonl (field `text`) or .parquet files."""

    files: str = ""  # paths or patterns, separated by commas
    out: str = "data/text"  # folder to make
    tokenizer: str = "gpt2"  # gpt2, or a folder with a tokenizer.json
    vocabulary: int = 0  # above 0: train a BPE of that many tokens on these files instead
    field: str = "text"  # the column that holds the text
    val_files: str = ""  # validation documents; without them val_share of `files` is held out
    val_share: float = 0.01  # share of the documents held out for validation
    shard_tokens: int = 100_000_000  # tokens in a shard
    seed: int = 0  # of the order of documents


@dataclass
class Chat:
    """Chats from JSONL, JSON or parquet: conversations, messages, or instruction and response."""

    files: str = ""  # paths or patterns, separated by commas
    out: str = "data/chat"  # folder to make
    tokenizer: str = "gpt2"  # gpt2, or a folder with a tokenizer.json
    val_files: str = ""  # validation chats; without them val_share of `files` is held out
    val_share: float = 0.02  # share of the chats held out for validation
    seed: int = 0  # of the choice


@dataclass
class Images(Chat):
    """Chats or captions about pictures, in LLaVA's form, resized and packed into one file."""

    out: str = "data/images"  # folder to make
    image_root: str = ""  # folder or .zip with the pictures; a path that is not there is sought by
    # its base name
    image_size: int = 224  # pixels of the square the pictures are fitted into


# ------------------------------------------------------------------------------------------ output


class NewFolder:
    """A folder that appears under its name when it is whole, replacing an older one."""

    def __init__(self, path):
        self.path = Path(path).absolute()
        self.writing = self.path.with_name(f".writing-{self.path.name}")
        if self.path.exists() and not (self.path / "manifest.json").is_file():
            raise UserError(f"{path} is there already and is no data set of prepare.py's, so it is "
                            "not replaced; choose another --out")

    def __enter__(self):
        shutil.rmtree(self.writing, ignore_errors=True)
        self.writing.mkdir(parents=True)
        return self.writing

    def __exit__(self, kind, *_):
        if kind is None:
            shutil.rmtree(self.path, ignore_errors=True)
            self.writing.rename(self.path)
        else:
            shutil.rmtree(self.writing, ignore_errors=True)


def write_manifest(folder, tokenizer, **counts):
    """manifest.json of a data folder, and the tokenizer beside it."""
    tokenizer.save(folder)
    write_json(folder / "manifest.json", {
        "tokenizer_name": tokenizer.name, "tokenizer": tokenizer.fingerprint,
        **counts, "sha256": sums(folder),
    })  # fmt: skip


class ChatWriter:
    """Collects chats and their pictures' encoded bytes, and writes the arrays data.Chats reads."""

    def __init__(self, folder, tokenizer):
        self.folder, self.tokenizer = folder, tokenizer
        self.ids, self.supervised, self.offsets = array("H"), array("b"), array("q", [0])
        self.first_image, self.image_offsets = array("q", [0]), array("q", [0])
        folder.mkdir(parents=True)
        self.images = open(folder / "images.bin", "wb")  # noqa: SIM115 (closed by close)

    def add(self, messages, images=()):
        chat = tokenizers.render(self.tokenizer, messages, len(images))
        self.ids.extend(chat.ids)
        self.supervised.extend(chat.supervised)
        self.offsets.append(len(self.ids))
        for image in images:
            self.images.write(image)
            self.image_offsets.append(self.images.tell())
        self.first_image.append(len(self.image_offsets) - 1)

    def close(self):
        """Write the arrays; returns counts for the manifest."""
        self.images.close()
        arrays = {"ids": (self.ids, np.uint16), "supervised": (self.supervised, np.bool_),
                  "offsets": (self.offsets, np.int64)}
        if len(self.image_offsets) > 1:
            arrays["first_image"] = (self.first_image, np.int64)
            arrays["image_offsets"] = (self.image_offsets, np.int64)
        else:
            (self.folder / "images.bin").unlink()
        for name, (values, dtype) in arrays.items():
            np.save(self.folder / f"{name}.npy", np.asarray(values).astype(dtype))
        return {"chats": len(self.offsets) - 1, "tokens": len(self.ids),
                "images": len(self.image_offsets) - 1}


def write_text(folder, split, documents, tokenizer, shard_tokens=100_000_000):
    """Shards of `documents` (strings), each behind <|endoftext|>; returns the number of tokens."""
    buffer, shard, total = array("H"), 0, 0
    for document in documents:
        buffer.append(tokenizer.end_of_text)
        buffer.extend(tokenizer.encode(document))
        while len(buffer) >= shard_tokens:
            np.save(folder / f"{split}_{shard:06d}.npy", np.array(buffer[:shard_tokens], np.uint16))
            buffer, shard, total = buffer[shard_tokens:], shard + 1, total + shard_tokens
    if buffer:
        np.save(folder / f"{split}_{shard:06d}.npy", np.array(buffer, np.uint16))
    return total + len(buffer)


# -------------------------------------------------------------------------------------------- demo


def demo(cfg):
    """Draw the picture world: text, chats, captions, scenes, and a folder of held-out pictures."""
    began = time.time()
    with NewFolder(cfg.out) as out:
        rng = random.Random(cfg.seed)
        stories = distinct(lambda: tales.story(rng), cfg.stories + cfg.held_out)
        chats = distinct(lambda: json.dumps(tales.text_chat(rng)), cfg.chats + cfg.held_out)
        chats = [json.loads(chat) for chat in chats]
        tokenizer = tokenizers.train(words_of(rng, stories[:8000], chats[:4000]), cfg.vocabulary)

        (out / "text").mkdir()
        n_val = write_text(out / "text", "val", stories[: cfg.held_out], tokenizer)
        n_train = write_text(out / "text", "train", stories[cfg.held_out :], tokenizer)
        write_manifest(out / "text", tokenizer, train_tokens=n_train, val_tokens=n_val)
        for split, part in ("val", chats[: cfg.held_out]), ("train", chats[cfg.held_out :]):
            write_chats(out / "chats" / split, tokenizer, ((chat, ()) for chat in part))
        write_manifest(out / "chats", tokenizer)

        kinds = {"captions": (cfg.captions, captioned), "scenes": (cfg.conversations, questioned)}
        for kind, (count, draw) in kinds.items():
            for split, n, pairs in (("train", count, "train"), ("val", cfg.held_out, "train"),
                                    ("val_pairs", cfg.held_out, "held_out")):
                items = [draw(rng, pairs, cfg, split) for _ in range(n)]
                write_chats(out / kind / split, tokenizer, (item[:2] for item in items))
                if len(items[0]) > 2:
                    write_json(out / kind / split / "groups.json", [item[2] for item in items])
            write_manifest(out / kind, tokenizer)
        (out / "pictures").mkdir()
        for i in range(8):
            world.paint(world.draw_scene(rng, "held_out"), 256).save(out / f"pictures/{i}.png")
        write_json(out / "manifest.json", {
            "seconds": time.time() - began, "peak_rss_gb": peak_memory_gb()[1]})
    print(f"{cfg.out}: {cfg.stories} stories ({n_train:,} tokens), {cfg.chats} chats, "
          f"{cfg.captions} captions, {cfg.conversations} picture chats, in "
          f"{time.time() - began:.0f} s")


def distinct(draw, n):
    """n different results of draw(), in the order drawn."""
    found = {}
    while len(found) < n:
        found.setdefault(draw())
    return list(found)


def words_of(rng, stories, chats):
    """Strings of every kind the vocabulary has to spell."""
    yield from stories
    for chat in chats:
        yield from (message["content"] for message in chat)
    for _ in range(4000):
        scene = world.draw_scene(rng, "any")
        yield world.caption(rng, scene)
        yield from (message["content"] for message in world.conversation(rng, scene, 5))


def captioned(rng, pairs, cfg, split):
    scene = world.draw_scene(rng, pairs)
    messages = [{"role": "user", "content": rng.choice(world.CAPTION_REQUESTS)},
                {"role": "assistant", "content": world.caption(rng, scene)}]
    return messages, [png(scene, cfg.image_size)]


def questioned(rng, pairs, cfg, split):
    """A picture with a chat; validation pictures have one question each, kinds in equal parts."""
    scene = world.draw_scene(rng, pairs)
    if split == "train":
        return world.conversation(rng, scene, cfg.questions), [png(scene, cfg.image_size)]
    kind = rng.choice(world.QUESTION_KINDS)
    question, answer = world.question(rng, scene, kind)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages, [png(scene, cfg.image_size)], kind


def png(scene, size):
    file = io.BytesIO()
    world.paint(scene, size).save(file, "PNG", compress_level=1)
    return file.getvalue()


def write_chats(folder, tokenizer, items):
    """A split folder from (messages, encoded images) pairs; returns its counts."""
    writer = ChatWriter(folder, tokenizer)
    for messages, images in items:
        writer.add(messages, images)
    return writer.close()


# ----------------------------------------------------------------------------------- files of rows


def paths_of(patterns):
    """The files that comma-separated patterns name, sorted; UserError if one names none."""
    if not patterns:
        raise UserError("say which files to read, like --files='books/*.jsonl'")
    paths = []
    for pattern in patterns.split(","):
        found = sorted(glob.glob(pattern.strip()))
        if not found:
            raise UserError(f"no file matches {pattern.strip()}")
        folders = [path for path in found if Path(path).is_dir()]
        if folders:
            raise UserError(f"{folders[0]} is a folder; name files, like {folders[0]}/*.jsonl")
        paths += map(Path, found)
    return paths


class Refused:
    """Counts rows left out, by reason, and remembers the first of each."""

    def __init__(self):
        self.counts, self.first = Counter(), defaultdict(list)

    def add(self, reason, where):
        self.counts[reason] += 1
        if len(self.first[reason]) < 5:
            self.first[reason].append(where)

    def show(self):
        for reason, n in self.counts.most_common():
            more = ", ..." if n > len(self.first[reason]) else ""
            print(f"left out {n} rows: {reason} ({', '.join(self.first[reason])}{more})")


def read_rows(path, refused):
    """Yield (where, row) of a .jsonl, .json or .parquet file; where names file and row."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(1024)
            yield from enumerate_rows(path, (row for batch in batches for row in batch.to_pylist()))
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"cannot read {path}: {error}") from None
    elif path.suffix == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
        if not isinstance(rows, list):
            raise UserError(f"{path} is not a JSON list of rows")
        yield from enumerate_rows(path, rows)
    else:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield f"{path.name}:{number}", json.loads(line)
                    except ValueError:  # includes text that is not UTF-8
                        refused.add("not a line of JSON", f"{path.name}:{number}")


def enumerate_rows(path, rows):
    for number, row in enumerate(rows, 1):
        yield f"{path.name}:{number}", row


def documents_of(paths, field, refused):
    """The texts of all files: a .txt file is one document, a row of the others one."""
    for path in paths:
        if path.suffix == ".txt":
            yield path.read_text(encoding="utf-8", errors="replace")
            continue
        for where, row in read_rows(path, refused):
            text = row.get(field) if isinstance(row, dict) else None
            if isinstance(text, str) and text.strip():
                yield text
            else:
                refused.add(f"no text in the field {field}", where)


def messages_of(row):
    """The turns of a chat row as role and content, whatever its form, or a ValueError."""
    if not isinstance(row, dict):
        raise ValueError("a row that is no object")
    turns = row.get("conversations") or row.get("messages")
    if turns:
        if not (isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)):
            raise ValueError("turns of another form")
        names = {"human": "user", "gpt": "assistant"}
        roles = [turn.get("from") or turn.get("role") for turn in turns]
        texts = [turn.get("value") or turn.get("content") for turn in turns]
        messages = [{"role": names.get(role, role), "content": text}
                    for role, text in zip(roles, texts, strict=True)]
    else:
        question = row.get("instruction") or row.get("prompt") or ""
        question += f"\n{row['input']}" if row.get("input") else ""
        answer = row.get("response") or row.get("output") or row.get("caption")
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if messages[-1]["role"] == "user" and len(messages) > 1:
        messages.pop()  # a question nobody answered
    body = messages[1:] if messages[0]["role"] == "system" else messages
    if [m["role"] for m in body] != ["user", "assistant"] * (len(body) // 2) or not body:
        raise ValueError("turns out of order")
    if not all(isinstance(m["content"], str) for m in messages):
        raise ValueError("a turn without text")
    if not all(m["content"].strip() for m in messages if m["role"] == "assistant"):
        raise ValueError("an empty answer")
    return messages


def split_rows(cfg, rows):
    """(train, val) of a list of rows, val_share of them drawn by the seed."""
    order = list(range(len(rows)))
    random.Random(cfg.seed).shuffle(order)
    n_held = round(len(rows) * cfg.val_share) or min(len(rows) - 1, cfg.val_share > 0)
    held = set(order[: max(0, n_held)])
    return [rows[i] for i in order if i not in held], [rows[i] for i in sorted(held)]


def check_size(tokenizer, cfg):
    if tokenizer.n_vocab > 65536:
        raise UserError(f"the tokenizer {cfg.tokenizer} has {tokenizer.n_vocab} ids, and data sets "
                        "hold 16-bit ids: at most 65536")


def text(cfg):
    """Tokenise documents, shuffled, into shards."""
    refused = Refused()
    documents = list(documents_of(paths_of(cfg.files), cfg.field, refused))
    if cfg.val_files:
        val = list(documents_of(paths_of(cfg.val_files), cfg.field, refused))
        train = documents
        random.Random(cfg.seed).shuffle(train)
    else:
        if len(documents) == 1:  # one long text: its end is held out
            (whole,) = documents
            cut = round(len(whole) * (1 - cfg.val_share))
            documents = [whole[:cut], whole[cut:]]
            train, val = documents[:1], documents[1:]
        else:
            train, val = split_rows(cfg, documents)
    if cfg.vocabulary:
        tokenizer = tokenizers.train(train, cfg.vocabulary)
    else:
        tokenizer = tokenizers.load(cfg.tokenizer)
    check_size(tokenizer, cfg)
    with NewFolder(cfg.out) as out:
        n_train = write_text(out, "train", train, tokenizer, cfg.shard_tokens)
        n_val = write_text(out, "val", val, tokenizer, cfg.shard_tokens)
        if n_train == 0:
            refused.show()
            raise UserError(f"{cfg.files} holds no text")
        write_manifest(out, tokenizer, train_tokens=n_train, val_tokens=n_val)
    refused.show()
    print(f"{cfg.out}: {len(train)} documents, {n_train:,} tokens to train on; "
          f"{len(val)} documents, {n_val:,} tokens for validation")


def chat(cfg, images_of=lambda row: []):
    """Tokenise chats, with the pictures that images_of(row) finds as encoded bytes."""
    refused, tokenizer = Refused(), tokenizers.load(cfg.tokenizer)
    check_size(tokenizer, cfg)

    def rows_in(patterns):
        return [row for path in paths_of(patterns) for row in read_rows(path, refused)]

    if cfg.val_files:
        train, val = rows_in(cfg.files), rows_in(cfg.val_files)
    else:
        train, val = split_rows(cfg, rows_in(cfg.files))
    counts = {}
    with NewFolder(cfg.out) as out:
        for split, rows in ("train", train), ("val", val):
            writer = ChatWriter(out / split, tokenizer)
            for where, row in rows:
                try:
                    writer.add(messages_of(row), images_of(row))
                except ValueError as error:
                    refused.add(str(error), where)
                except TypeError:
                    refused.add("a row of another form", where)
                except UserError:
                    refused.add("an unreadable picture", where)
            counts[split] = writer.close()
        if counts["train"]["chats"] == 0:
            refused.show()
            raise UserError(f"{cfg.files} holds no chat that can be used")
        if counts["val"]["chats"] == 0:
            raise UserError("no chat is left for validation; say --val_files or a --val_share")
        write_manifest(out, tokenizer, **counts)
    refused.show()
    for split, count in counts.items():
        print(f"{cfg.out}/{split}: {count['chats']} chats, {count['tokens']:,} tokens, "
              f"{count['images']} pictures")


def images(cfg):
    """Chats about pictures, the pictures decoded, fitted into a square and packed as JPEG."""
    find = picture_finder(cfg.image_root)

    def images_of(row):
        name = row.get("image") or row.get("image_path")
        if not name:
            return []
        if not isinstance(name, str):
            raise ValueError("not one picture's name")
        file = io.BytesIO()
        fit(read_image(find(name), name), cfg.image_size).save(file, "JPEG", quality=90)
        return [file.getvalue()]

    chat(cfg, images_of)


def picture_finder(root):
    """A function from a row's picture name to its bytes, in a folder or a zip."""
    if str(root).endswith(".zip"):
        try:
            archive = zipfile.ZipFile(root)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"cannot read the pictures in {root}: {error}") from None
        names = {**{Path(name).name: name for name in archive.namelist()},
                 **{name: name for name in archive.namelist()}}

        def from_zip(name):
            found = names.get(name) or names.get(Path(name).name)
            if found is None:
                raise ValueError("a missing picture")
            try:
                return archive.read(found)
            except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError,
                    NotImplementedError):
                raise ValueError("an unreadable picture") from None

        return from_zip
    if not Path(root or ".").is_dir():
        raise UserError(f"there is no folder of pictures {root}; say --image_root=FOLDER or a .zip")

    def from_folder(name):
        for path in (Path(root or ".") / name, Path(root or ".") / Path(name).name):
            try:
                return path.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError:
                raise ValueError("an unreadable picture") from None
        raise ValueError("a missing picture")

    return from_folder


COMMANDS = {"demo": (Demo, demo), "text": (Text, text), "chat": (Chat, chat),
            "images": (Images, images)}


def main():
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        for name, (config, _) in COMMANDS.items():
            print(f"python prepare.py {name} --help\n    {config.__doc__}")
        return
    if sys.argv[1] not in COMMANDS:
        raise UserError(f"prepare.py {sys.argv[1]}: expected one of {', '.join(COMMANDS)}")
    config, command = COMMANDS[sys.argv[1]]
    command(parse(config, sys.argv[2:]))


if __name__ == "__main__":
    run_main(main)
