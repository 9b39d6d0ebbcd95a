"""experiments/contamination.py: texts and images of a benchmark that are in the training data."""

import json
import random
import types

import pytest
from conftest import encoded
from PIL import Image
from test_conversation import TOKENIZER, new_model
from test_tokenizer import say

from common.checkpoint import write_json
from evals.runner import TaskRunner
from experiments.contamination import overlaps, sentence
from prep.convert import resized
from prep.writers import write_chats, write_manifest, write_shards


def picture(color, kind="PNG"):
    return encoded(Image.new("RGB", (40, 30), color), kind)


def stored(content):
    """An image as prepare.py stores it."""
    return resized(content, None, types.SimpleNamespace(image_size=32, fit="pad"))


def letters(rng, n):
    """Random words."""
    return " ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(n))


def question(text="Is there a ring?", image="red.png"):
    return {"text": text, "label": "yes", "image": image}


def task_runner(name, folder, rows):
    (folder / "rows.json").write_text(json.dumps(rows))
    return TaskRunner(name, str(folder / "rows.json"), new_model(), TOKENIZER,
                      image_root=str(folder))


@pytest.fixture
def trained(tmp_path):
    """A model's info, with texts and chats about images that it and its parent were trained on."""
    rng, root = random.Random(6), tmp_path / "data"
    (root / "text").mkdir(parents=True)
    texts = [letters(rng, 70) for _ in range(30)]
    documents = ([TOKENIZER.end_of_text, *TOKENIZER.encode(text)] for text in texts)
    write_shards(root / "text", "train", documents, 3000)  # documents continue in the next
    write_manifest(root / "text", "text", TOKENIZER)
    said = [letters(rng, 30) for _ in range(4)]
    write_chats(root / "chats/train", TOKENIZER, [
        (say("user", text, "assistant", "Yes."), [stored(picture(color))])
        for text, color in zip(said, ("red", "blue", "green", "white"), strict=True)])
    stored_images = {"size": 32, "fit": "pad"}
    write_manifest(root / "chats", "images", TOKENIZER, stored_images=stored_images)
    (tmp_path / "before").mkdir()
    write_json(tmp_path / "before/config.json", {"settings": {"data": str(root / "text")}})
    info = {"settings": {"data": str(root / "chats"), "text_data": str(tmp_path / "gone")},
            "lineage": [{"folder": str(tmp_path / "before")}, {"folder": str(tmp_path / "no")}]}
    return types.SimpleNamespace(info=info, texts=texts, said=said, root=root)


def test_planted_texts_are_found_and_no_others(trained, tmp_path):
    """By 16 tokens anywhere in a document or a chat, without the instruction."""
    rng = random.Random(7)
    rows = [question(letters(rng, 20)) for _ in range(20)]
    planted = {3: trained.texts[0], 11: trained.texts[17][20:200], 12: trained.texts[-1],
               15: f"Hm: {trained.said[2]}?", 19: trained.said[0][:-40]}
    for number, text in planted.items():
        rows[number]["text"] = text
    runners = [task_runner("pope", tmp_path, some) for some in [*([row] for row in rows), rows]]
    *each, together = overlaps(runners, trained.info)
    assert {number for number, found in enumerate(each) if found["texts"]} == set(planted)
    assert together["texts"] == pytest.approx(5 / 20) and together["n_texts"] == 20
    assert together["searched"] == [str(trained.root / name) for name in ("chats", "text")]
    assert sentence(together) == "5 of 20 texts found in the training data"


def test_planted_images_are_found_and_no_others(trained, tmp_path):
    """As the files that were prepared, or as prepare.py stores them."""
    files = {"a.png": picture("blue"), "b.png": stored(picture("green")),
             "c.png": picture("yellow"), "d.png": picture("blue", "BMP"), "e.png": b"broken"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    rows = [question(image=name) for name in [*files, "gone.png", "a.png"]]
    found, = overlaps([task_runner("pope", tmp_path, rows)], trained.info)
    assert (found["images"], found["n_images"]) == (pytest.approx(3 / 5), 5)
