"""The demo's data set, drawn: stories, chats, captioned images and images with questions.

Items are drawn in chunks on all cores. A chunk has a random generator of its own, seeded by the
seed, the kind of item and the number of the chunk, so the bytes do not depend on the number of
cores. The test split has a seed that no other split shares: the recipe is tuned on validation data.
"""

import io
import itertools
import json
import random
import time
from concurrent.futures import ProcessPoolExecutor

from common.checkpoint import write_json
from common.device import cores
from prep import toy_images, toy_stories
from prep.writers import Shards, write_chats, write_manifest
from tokenizer import train

CHUNK = 250  # items that one job draws
SAY_SECONDS = 3.0  # between two lines of progress
SPLITS = ("train", "val", "test")


class Artist:
    """Draws items on all cores and prints how far it is. total: items that will be drawn.

        with Artist(total) as artist:
            items = artist.draw(captioned, "0 captions val", 1000, "train", 48)
    """

    def __init__(self, total):
        self.total, self.done, self.said = total, 0, time.monotonic()
        self.pool = ProcessPoolExecutor(cores())

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.pool.shutdown(cancel_futures=kind is not None)

    def draw(self, job, seed, n, *args, first=0):
        """An iterator over n results of job(rng, *args), in an order that the seed alone decides.

        All of them are queued at once, so that no core waits while this process writes others."""
        sizes = [min(CHUNK, n - start) for start in range(0, n, CHUNK)]
        seeds = [f"{seed} {first + number}" for number in range(len(sizes))]
        columns = zip(*((job, *args),) * len(sizes), strict=True)
        return self.counted(self.pool.map(draw_chunk, seeds, sizes, *columns))

    def counted(self, chunks):
        for chunk in chunks:
            yield from chunk
            self.count(len(chunk))

    def distinct(self, job, seed, n, taken=()):
        """n different results of job(rng), none of them in `taken`."""
        found, first = {}, 0
        while len(found) < n:
            missing = -(-(n - len(found)) // CHUNK) * CHUNK
            before = self.done
            found |= dict.fromkeys(x for x in self.draw(job, seed, missing, first=first)
                                   if x not in taken)
            first, self.done = first + missing // CHUNK, before + min(len(found), n)
        return list(itertools.islice(found, n))

    def count(self, n):
        """Note that n more items are drawn; prints a line every few seconds."""
        self.done += n
        if time.monotonic() - self.said >= SAY_SECONDS:
            self.said = time.monotonic()
            print(f"drawing the demo's data: {min(1, self.done / self.total):.0%}", flush=True)


def draw_chunk(seed, n, job, *args):
    rng = random.Random(seed)
    return [job(rng, *args) for _ in range(n)]


def text_chat(rng):
    """A chat about text as JSON, which can be compared."""
    return json.dumps(toy_stories.text_chat(rng))


def words(rng):
    """Texts with every kind of word that is said about an image."""
    scene = toy_images.draw_scene(rng, "any")
    chat = toy_images.conversation(rng, scene, 5)
    return [toy_images.caption(rng, scene), *(message["content"] for message in chat)]


def captioned(rng, pairs, size):
    """(messages, [encoded image]): a request for a caption, and the caption."""
    scene = toy_images.draw_scene(rng, pairs)
    messages = [{"role": "user", "content": rng.choice(toy_images.CAPTION_REQUESTS)},
                {"role": "assistant", "content": toy_images.caption(rng, scene)}]
    return messages, [png(scene, size)]


def questioned(rng, pairs, size, questions):
    """(messages, [encoded image]): a chat of that many questions about an image."""
    scene = toy_images.draw_scene(rng, pairs)
    return toy_images.conversation(rng, scene, questions), [png(scene, size)]


def asked(rng, pairs, size):
    """(messages, [encoded image], kind): one question about an image, all kinds equally likely."""
    scene, kind = toy_images.draw_scene(rng, pairs), rng.choice(toy_images.QUESTION_KINDS)
    return toy_images.turns(toy_images.question(rng, scene, kind)), [png(scene, size)], kind


def png(scene, size):
    """The scene as the bytes of a PNG file."""
    file = io.BytesIO()
    toy_images.paint(scene, size).save(file, "PNG", compress_level=1)
    return file.getvalue()


def encode(tokenizer, documents):
    """The ids of documents, each after <|endoftext|>."""
    return [[tokenizer.end_of_text, *tokenizer.encode(document)] for document in documents]


def write_demo(out, cfg):
    """Draw all of the demo's data into the folder `out`; returns the number of training tokens."""
    n = {"train": 0, "val": cfg.held_out, "test": cfg.held_out}
    total = (cfg.stories + cfg.chats + cfg.captions + cfg.conversations
             + sum(n.values()) * 5)  # five sets of each held-out split
    with Artist(total) as artist:
        stories = texts_of(artist, cfg, toy_stories.story, "stories", {**n, "train": cfg.stories})
        chats = texts_of(artist, cfg, text_chat, "chats", {**n, "train": cfg.chats})
        chats = {split: list(map(json.loads, some)) for split, some in chats.items()}
        spelt = list(artist.draw(words, f"{cfg.seed} words", 4000))
        size, captions, scenes = cfg.image_size, {}, {}
        for split in SPLITS:
            seed = seed_of(cfg, split)
            captions[split] = artist.draw(captioned, f"{seed} captions {split}",
                                          n[split] or cfg.captions, "train", size)
            if split == "train":
                scenes[split] = artist.draw(questioned, f"{seed} scenes {split}",
                                            cfg.conversations, "train", size, cfg.questions)
                continue
            for folder, pairs in ((split, "train"), (f"{split}_pairs", "held_out")):
                scenes[folder] = artist.draw(asked, f"{seed} scenes {folder}", n[split], pairs,
                                             size)

        said = (message["content"] for chat in chats["train"][:4000] for message in chat)
        tokenizer = train(itertools.chain(stories["train"][:8000], said, *spelt), cfg.vocabulary)
        for split, items in captions.items():
            write_chats(out / "captions" / split, tokenizer, items)
        for split, items in scenes.items():
            kinds = []
            write_chats(out / "scenes" / split, tokenizer, noted(items, kinds))
            if kinds:
                write_json(out / "scenes" / split / "groups.json", kinds)
        for split, some in chats.items():
            write_chats(out / "chats" / split, tokenizer, ((chat, ()) for chat in some))
        (out / "text").mkdir()
        tokens = {}
        for split, documents in stories.items():
            shards = Shards(out / "text", split, 100_000_000)
            parts = [documents[i : i + 2000] for i in range(0, len(documents), 2000)]
            for ids in artist.pool.map(encode, itertools.repeat(tokenizer), parts):
                for document in ids:
                    shards.append(document)
            shards.close()
            tokens[f"{split}_tokens"] = shards.tokens
        write_manifest(out / "text", tokenizer, **tokens)
        for kind in "captions", "scenes", "chats":
            write_manifest(out / kind, tokenizer)
    rng = random.Random(f"{cfg.seed} images")
    (out / "images").mkdir()
    for i in range(8):
        scene = toy_images.draw_scene(rng, "held_out")
        toy_images.paint(scene, 256).save(out / f"images/{i}.png")
    return tokens["train_tokens"]


def noted(items, kinds):
    """The (messages, images) of items; the kinds of those that have one are added to a list."""
    for messages, images, *kind in items:
        kinds += kind
        yield messages, images


def texts_of(artist, cfg, job, kind, counts):
    """{split: texts}, as many as `counts` says, no text in two of them."""
    found, taken = {}, set()
    for split, count in counts.items():
        found[split] = artist.distinct(job, f"{seed_of(cfg, split)} {kind} {split}", count, taken)
        taken.update(found[split])
    return found


def seed_of(cfg, split):
    """The seed of a split: the test split has its own."""
    return cfg.test_seed if split == "test" else cfg.seed
