"""The demo's data sets: stories, chats, captioned images, and images with questions.

Samples are drawn in chunks on all cores. Each chunk has its own random generator, seeded by the
seed, the folder and the number of the chunk, so the bytes do not depend on the number of cores. The
test split has a seed that no other split shares: the recipe is tuned on validation data.
"""

import functools
import io
import itertools
import multiprocessing
import os
import random
import re
import threading
from concurrent.futures import ProcessPoolExecutor

from common.checkpoint import write_json
from common.device import cores
from prep import toy_images, toy_stories
from prep.writers import write_chats, write_manifest, write_shards
from tokenizer import train

CHUNK = 250  # samples that one job draws


class Workers(ProcessPoolExecutor):
    """Draws samples on all cores."""

    def __exit__(self, kind, *_):
        self.shutdown(cancel_futures=kind is not None)

    def draw(self, cfg, folder, job, n, *args, first=0):
        """An iterator over n results of job(rng, *args), in an order that the seed alone decides.

        All of them are queued at once, so that no core waits while this process writes others.
        first: number of the first chunk.
        """
        seed = f"{cfg.test_seed if 'test' in folder else cfg.seed} {folder.replace('/', ' ')}"
        sizes = [min(CHUNK, n - start) for start in range(0, n, CHUNK)]
        seeds = [f"{seed} {first + number}" for number in range(len(sizes))]
        chunks = self.map(draw_chunk, seeds, sizes, *map(itertools.repeat, (job, *args)))
        return itertools.chain.from_iterable(chunks)


def end_with_parent():
    """End this worker when its parent has ended, which a killed parent cannot do itself."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def draw_chunk(seed, n, job, *args):
    rng = random.Random(seed)
    return [job(rng, *args) for _ in range(n)]


def words(rng):
    """Texts with every kind of word that is said about an image."""
    scene = toy_images.draw_scene(rng, "any")
    chat = toy_images.conversation(rng, scene, 5)
    return [toy_images.caption(rng, scene), *(message["content"] for message in chat)]


def pictured(rng, form, pairs, size, questions=0):
    """(messages, [encoded image], kind): a caption, a chat of several questions, or one question,
    whose kind, all equally likely, is given too."""
    scene, file, kind = toy_images.draw_scene(rng, pairs), io.BytesIO(), ""
    toy_images.paint(scene, size).save(file, "PNG", compress_level=1)
    if form == "caption":
        request = rng.choice(toy_images.WORDS["caption_requests"])
        messages = toy_images.turns((request, toy_images.caption(rng, scene)))
    elif form == "chat":
        messages = toy_images.conversation(rng, scene, questions)
    else:
        kind = rng.choice(list(toy_images.FREQUENCIES))
        messages = toy_images.turns(toy_images.question(rng, scene, kind))
    return messages, [file.getvalue()], kind


def image_folders(cfg):
    """{folder: (number of samples, arguments of pictured)}"""
    n, size = cfg.held_out, cfg.image_size
    folders = {"captions/train": (cfg.captions, "caption", "train", size),
               "scenes/train": (cfg.conversations, "chat", "train", size, cfg.questions)}
    for split in "val", "test":
        folders |= {f"captions/{split}": (n, "caption", "train", size),
                    f"scenes/{split}": (n, "question", "train", size),
                    f"scenes/{split}_pairs": (n, "question", "held_out", size)}
    return folders


def write_demo(out, cfg):
    """Draw all of the demo's data into the folder `out`; returns the number of training tokens."""
    print("drawing stories and chats", flush=True)
    with Workers(cores(), initializer=end_with_parent) as workers:
        stories = distinct(workers, cfg, toy_stories.story, "stories", cfg.stories)
        chats = distinct(workers, cfg, toy_stories.text_chat, "chats", cfg.chats)
        image_words = list(workers.draw(cfg, "words", words, 4000))
        samples = {folder: workers.draw(cfg, folder, pictured, *args)
                   for folder, args in image_folders(cfg).items()}

        contents = (message["content"] for chat in chats["train"][:4000] for message in chat)
        tokenizer = train(itertools.chain(stories["train"][:8000], contents, *image_words),
                          cfg.vocabulary)
        encode = functools.cache(tokenizer.encode)  # words are few, and no token spans two
        tokenizer.encode = lambda text: [token for word in re.findall(" ?[^ ]+", text)
                                         for token in encode(word)]
        for folder, items in samples.items():
            print(f"drawing {out / folder}", flush=True)
            messages, images, kinds = zip(*items, strict=True)
            write_chats(out / folder, tokenizer, zip(messages, images, strict=True))
            if any(kinds):
                write_json(out / folder / "groups.json", kinds)
    for split, messages in chats.items():
        write_chats(out / "chats" / split, tokenizer, ((chat, ()) for chat in messages))
    (out / "text").mkdir()
    tokens = {}
    for split, documents in stories.items():
        ids = ([tokenizer.end_of_text, *tokenizer.encode(text)] for text in documents)
        tokens[f"{split}_tokens"] = write_shards(out / "text", split, ids)
    write_manifest(out / "text", "demo", tokenizer, **tokens)
    for kind in "captions", "scenes", "chats":
        write_manifest(out / kind, "demo", tokenizer)
    (out / "images").mkdir()  # eight images with held-out pairs, to ask a model about
    rng = random.Random(f"{cfg.seed} images")
    for i in range(8):
        scene = toy_images.draw_scene(rng, "held_out")
        toy_images.paint(scene, 256).save(out / "images" / f"{i}.png")
    return tokens["train_tokens"]


def distinct(workers, cfg, job, kind, n_train):
    """{split: results of job(rng)}; no result is in two splits, or twice in one."""
    splits, taken = {}, set()
    for split in "train", "val", "test":
        found, first, n = {}, 0, n_train if split == "train" else cfg.held_out
        while len(found) < n:
            missing = -(-(n - len(found)) // CHUNK)  # chunks
            items = workers.draw(cfg, f"{kind}/{split}", job, missing * CHUNK, first=first)
            found |= {text: item for item in items if (text := repr(item)) not in taken}
            first += missing
        found = dict(itertools.islice(found.items(), n))
        splits[split] = list(found.values())
        taken.update(found)
    return splits
