"""The demo's data sets: stories, chats, captioned images, and images with questions.

Samples are drawn in chunks on all cores. Each chunk has its own random generator, seeded by the
seed, the folder and the number of the chunk, so the bytes do not depend on the number of cores. The
test split has a seed that no other split shares: the recipe is tuned on validation data.
"""

import functools
import io
import itertools
import json
import random
import re
from concurrent.futures import ProcessPoolExecutor

from common.checkpoint import write_json
from common.device import cores
from prep import toy_images, toy_stories
from prep.writers import write_chats, write_manifest, write_text
from tokenizer import train

CHUNK = 250  # samples that one job draws
SPLITS = ("train", "val", "test")


class Workers(ProcessPoolExecutor):
    """Draws samples on all cores."""

    def __exit__(self, kind, *_):
        self.shutdown(cancel_futures=kind is not None)

    def draw(self, job, seed, n, *args, first=0):
        """An iterator over n results of job(rng, *args), in an order that the seed alone decides.

        All of them are queued at once, so that no core waits while this process writes others.
        """
        sizes = [min(CHUNK, n - start) for start in range(0, n, CHUNK)]
        seeds = [f"{seed} {first + number}" for number in range(len(sizes))]
        chunks = self.map(draw_chunk, seeds, sizes, *map(itertools.repeat, (job, *args)))
        return itertools.chain.from_iterable(chunks)

    def distinct(self, job, seed, n, taken):
        """n different results of job(rng), none of them in `taken`."""
        found, first = {}, 0
        while len(found) < n:
            missing = -(-(n - len(found)) // CHUNK) * CHUNK
            samples = self.draw(job, seed, missing, first=first)
            found |= dict.fromkeys(sample for sample in samples if sample not in taken)
            first += missing // CHUNK
        return list(itertools.islice(found, n))


def draw_chunk(seed, n, job, *args):
    rng = random.Random(seed)
    return [job(rng, *args) for _ in range(n)]


def text_chat(rng):
    """A text-only chat as JSON, which is hashable."""
    return json.dumps(toy_stories.text_chat(rng))


def words(rng):
    """Texts with every kind of word that is said about an image."""
    scene = toy_images.draw_scene(rng, "any")
    chat = toy_images.conversation(rng, scene, 5)
    return [toy_images.caption(rng, scene), *(message["content"] for message in chat)]


def captioned(rng, pairs, size):
    """(messages, [encoded image]): a request for a caption, and the caption."""
    scene = toy_images.draw_scene(rng, pairs)
    request = rng.choice(toy_images.WORDS["caption_requests"])
    return toy_images.turns((request, toy_images.caption(rng, scene))), [png(scene, size)]


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


def image_jobs(cfg):
    """{folder: (job, number of samples, arguments of the job)}"""
    n, size = cfg.held_out, cfg.image_size
    jobs = {"captions/train": (captioned, cfg.captions, "train", size),
            "scenes/train": (questioned, cfg.conversations, "train", size, cfg.questions)}
    for split in "val", "test":
        jobs |= {f"captions/{split}": (captioned, n, "train", size),
                 f"scenes/{split}": (asked, n, "train", size),
                 f"scenes/{split}_pairs": (asked, n, "held_out", size)}
    return jobs


def seed_of(cfg, folder):
    """The seed of a folder like "scenes/val_pairs"; that of the test split is its own."""
    seed = cfg.test_seed if "test" in folder else cfg.seed
    return f"{seed} {folder.replace('/', ' ')}"


def write_demo(out, cfg):
    """Draw all of the demo's data into the folder `out`; returns the number of training tokens."""
    print("drawing stories and chats", flush=True)
    with Workers(cores()) as workers:
        stories = distinct_texts(workers, cfg, toy_stories.story, "stories", cfg.stories)
        chats = distinct_texts(workers, cfg, text_chat, "chats", cfg.chats)
        chats = {split: list(map(json.loads, texts)) for split, texts in chats.items()}
        image_words = list(workers.draw(words, f"{cfg.seed} words", 4000))
        samples = {folder: workers.draw(job, seed_of(cfg, folder), n, *args)
                   for folder, (job, n, *args) in image_jobs(cfg).items()}

        contents = (message["content"] for chat in chats["train"][:4000] for message in chat)
        tokenizer = train(itertools.chain(stories["train"][:8000], contents, *image_words),
                          cfg.vocabulary)
        cache_words(tokenizer)
        for folder, items in samples.items():
            write_images(out / folder, tokenizer, items)
    for split, messages in chats.items():
        write_chats(out / "chats" / split, tokenizer, ((chat, ()) for chat in messages))
    (out / "text").mkdir()
    tokens = {f"{split}_tokens": write_text(out / "text", split, documents, tokenizer)
              for split, documents in stories.items()}
    write_manifest(out / "text", tokenizer, **tokens)
    for kind in "captions", "scenes", "chats":
        write_manifest(out / kind, tokenizer)
    (out / "images").mkdir()  # eight images with held-out pairs, to ask a model about
    rng = random.Random(f"{cfg.seed} images")
    for i in range(8):
        scene = toy_images.draw_scene(rng, "held_out")
        toy_images.paint(scene, 256).save(out / "images" / f"{i}.png")
    return tokens["train_tokens"]


def distinct_texts(workers, cfg, job, kind, n_train):
    """{split: texts}; no text is in two splits, or twice in one."""
    found, taken = {}, set()
    for split in SPLITS:
        n = n_train if split == "train" else cfg.held_out
        found[split] = workers.distinct(job, seed_of(cfg, f"{kind}/{split}"), n, taken)
        taken.update(found[split])
    return found


def cache_words(tokenizer):
    """Let the tokenizer encode every word once: there are few, and no token spans two of them."""
    encode = functools.cache(tokenizer.encode)
    tokenizer.encode = lambda text: [token for word in re.findall(" ?[^ ]+", text)
                                     for token in encode(word)]


def write_images(folder, tokenizer, samples):
    """A split folder from the results of a job; groups.json has the kind of each question."""
    print(f"drawing {folder}", flush=True)
    kinds = []

    def without_kind():
        for messages, images, *kind in samples:
            kinds.extend(kind)
            yield messages, images

    write_chats(folder, tokenizer, without_kind())
    if kinds:
        write_json(folder / "groups.json", kinds)
