"""Models with initial weights and random data of the right shape for every stage.

The data go through the same code as real ones: packed into rows, images decoded.
"""

import importlib
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import tokenizer as tokenizers
from clip import CLIP
from common.config import parse
from common.images import read_image
from data import Batch, check_tokenizer
from model import GPT
from train.packing import Captions, Packed
from vision import VisionLanguageModel, image_spec


def settings_of(folder, stage):
    """The settings of a stage by its config in `folder`, or its defaults."""
    path = Path(folder) / f"{stage}.py"
    return parse(importlib.import_module(stage).Config, [str(path)] if path.is_file() else [])


def tokenizer_of(cfg):
    """The tokenizer of the config's data if they are prepared, else GPT-2's."""
    prepared = (Path(cfg.data) / "manifest.json").is_file()
    return check_tokenizer(cfg.data) if prepared else tokenizers.load("gpt2")


def build_model(cfg, stage, folder, tokenizer):
    """The model of a stage; the sizes of other stages' parts come from the configs in `folder`."""
    if stage == "clip_pretrain":
        return CLIP(cfg.clip(tokenizer))
    decoder = (cfg if stage == "pretrain" else settings_of(folder, "pretrain")).decoder(tokenizer)
    if not stage.startswith("vision"):
        return GPT(decoder)
    model = VisionLanguageModel(decoder, settings_of(folder, "clip_pretrain").clip(tokenizer))
    model.decoder.requires_grad_(stage == "vision_sft")
    return model


def random_data(cfg, stage, model, tokenizer):
    """A data set for a stage's loader."""
    if stage == "pretrain":
        return RandomText(tokenizer.n_vocab, cfg.context)
    if stage == "clip_pretrain":
        spec = image_spec(model.config)
        chats = RandomChats(tokenizer, cfg.batch_pairs, 30, spec.size)
        return Captions(chats, tokenizer, spec, cfg.context)
    spec = getattr(model, "image_spec", None)
    length = {"sft": cfg.context // 5, "vision_pretrain": 40, "vision_sft": 200}[stage]
    n = max(4096, 4 * cfg.batch_tokens // cfg.context)  # so many that rows fill up
    chats = RandomChats(tokenizer, n, length, spec.size if spec else 0)
    return Packed([chats], cfg.context, tokenizer, spec)


class RandomText:
    """Windows of random ids, like data.Text."""

    name = "random text"

    def __init__(self, n_vocab, T):
        self.ids, self.T = np.random.default_rng(0).integers(0, n_vocab, 10**6), T

    def __len__(self):
        return len(self.ids) - self.T

    def n_targets(self, rows):
        return len(rows) * self.T

    def batch(self, rows):
        tokens = torch.from_numpy(np.stack([self.ids[i : i + self.T + 1] for i in rows]))
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


class RandomChats:
    """Chats of random ids, half of them an answer; each has an image unless image_size is 0."""

    folder, has_images, manifest = "random chats", True, {}

    def __init__(self, tokenizer, n, length, image_size=0):
        self.tokenizer, self.n, self.length, self.image_size = tokenizer, n, length, image_size
        self.jpeg = jpeg(image_size or 8, image_size or 8)

    def __len__(self):
        return self.n

    def n_images(self, i):
        return 1 if self.image_size else 0

    def images(self, i, spec=None):
        return [read_image(self.jpeg)] if self.image_size else []

    def chat(self, i):
        rng, t = np.random.default_rng(i), self.tokenizer
        half = int(self.length * rng.uniform(0.4, 1.6)) // 2
        ids = rng.integers(0, t.end_of_text, 2 * half + 4)
        ids[[0, 1, half, half + 1, -1]] = t.end_of_text, t.user, t.end, t.assistant, t.end
        if self.image_size:
            ids[2] = t.image
        return ids, np.arange(len(ids)) > half + 1


def jpeg(width, height):
    """A JPEG file of quality 90 with about as much coarse and fine detail as a photo."""
    rng, photo = np.random.default_rng(0), np.zeros((height, width, 3), np.float32)
    for scale in (64, 16, 4, 1):
        shape = (-(-height // scale), -(-width // scale), 3)
        grain = Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8))
        photo += np.asarray(grain.resize((width, height), Image.BICUBIC)) * scale**0.5
    file = io.BytesIO()
    Image.fromarray((photo / 15).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()
