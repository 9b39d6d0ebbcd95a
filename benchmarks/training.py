"""The speed of a training step of any stage.

Models are untrained; chats and images are the config's own if they are prepared, else random.
"""

import dataclasses
import importlib
import io
import itertools
import signal
import statistics
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import vision_sft
from benchmarks import REPEATS, WARM, elapsed
from clip import CLIP, feature_pulls, normalise
from common.config import parse
from common.device import peak_memory_gb, precision_name
from common.images import read_image
from data import Chats, Text, check_kind, check_tokenizer
from model import GPT
from tokenizer import SPECIALS, Tokenizer, gpt2
from train.optim import make_optimizer
from train.packing import Captions, Packed
from train.run import Run
from vision import VisionLanguageModel, image_spec

STAGES = ("clip_pretrain", "pretrain", "sft", "vision_pretrain", "vision_sft")  # in working order


class Training:
    """Training steps of `stage`; the sizes of its other parts come from the configs in `folder`,
    read by settings(folder, stage). With a tokenizer the data are random."""

    def __init__(self, cfg, stage, folder, tokenizer=None, settings=None):
        self.out = tempfile.TemporaryDirectory()
        cfg = dataclasses.replace(cfg, out=self.out.name, resume=False, tracker="none")
        self.run = run = Run(cfg, stage)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # nothing needs saving
        folders = [getattr(cfg, name, "") for name in ("data", "text_data", "replay")]
        random = tokenizer or not all(Path(name).is_dir() for name in folders if name)
        tokenizer = tokenizer or tokenizer_of(cfg)
        model = build_model(cfg, stage, folder, tokenizer, settings or settings_of)
        self.model = model.to(run.device).train()
        self.dataset = training_data(cfg, stage, self.model, tokenizer, 8192 if random else 0)
        if stage == "clip_pretrain":
            rows, micro_rows = cfg.batch_pairs, cfg.micro_pairs or cfg.batch_pairs // run.ranks
        else:
            decoder = getattr(self.model, "decoder", self.model)
            rows, micro_rows = run.rows(decoder.config.max_positions), cfg.micro_rows
        self.loader = run.loader(self.dataset, rows, micro_rows)
        self.net = run.start(self.model, make_optimizer(self.model, cfg), tokenizer, {})

    def take(self, steps):
        """Train for these steps, and wait for the device."""
        for step in steps:
            self.step(step)
        return self.run.loss.item()

    def step(self, step):
        """One training step; the host does not wait for it."""
        batches, pulls = self.loader.step(step), itertools.repeat(None)
        if self.run.stage == "clip_pretrain":
            batches = list(batches)
            pulls = feature_pulls(self.model, batches, self.run.machine)
        for batch, pull in zip(batches, pulls, strict=False):
            with self.run.forward(batch):
                loss = (pull(self.net(normalise(batch.pixels), batch.ids)) if pull
                        else self.net(batch) / batch.n_targets)
            self.run.backward(loss)
        self.run.optimizer_step(step)


def step_speed(training, n_steps):
    """{name: figure} of a training step: the median of five times n_steps."""
    run, machine = training.run, training.run.machine
    training.take(range(WARM))  # compiles, allocates
    run.flop = 0
    seconds = [elapsed(training.take, range(first, first + n_steps)) / n_steps
               for first in range(WARM, WARM + REPEATS * n_steps, n_steps)]
    median, (gpu_gb, host_gb) = statistics.median(seconds), peak_memory_gb(run.device)
    rate, flop = run.per_step / median, run.flop / run.ranks / (REPEATS * n_steps)  # of one process
    return {"stage": run.stage, "machine": f"{run.ranks} x {machine.name}",
            "precision": precision_name(machine.dtype),
            "parameters_M": sum(p.numel() for p in training.model.parameters()) / 1e6,
            f"{run.unit}_per_step": run.per_step, f"{run.unit}_per_s": rate, "ms": median * 1e3,
            "slowest_ms": max(seconds) * 1e3, "mfu": flop / median / run.peak,
            "gpu_gb": gpu_gb, "host_gb": host_gb}


def settings_of(folder, stage):
    """The settings of a stage by its config in `folder`, or its defaults."""
    path = Path(folder) / f"{stage}.py"
    return parse(importlib.import_module(stage).Config, [str(path)] if path.is_file() else [])


def random_tokenizer(vocabulary=50304):
    """A tokenizer with so many ids, by default GPT-2's, that reads no text."""
    return Tokenizer("random", None, None, vocabulary - len(SPECIALS), "")


def tokenizer_of(cfg):
    """The tokenizer of the config's data if they are prepared, else GPT-2's."""
    return gpt2() if not Path(cfg.data).exists() else (
        check_kind(cfg.data, "text", "chats", "images") or check_tokenizer(cfg.data))


def build_model(cfg, stage, folder, tokenizer, settings=settings_of):
    """The model of a stage; the sizes of other stages' parts are those of settings(folder, ...)."""
    if stage == "clip_pretrain":
        return CLIP(cfg.clip(tokenizer))
    decoder = (cfg if stage == "pretrain" else settings(folder, "pretrain")).decoder(tokenizer)
    if not stage.startswith("vision"):
        return GPT(decoder)
    model = VisionLanguageModel(decoder, settings(folder, "clip_pretrain").clip(tokenizer))
    model.decoder.requires_grad_(stage == "vision_sft")
    return model


def training_data(cfg, stage, model, tokenizer, n=8192):
    """A data set for a stage's loader, of so many random chats; 0 for the config's own data."""
    if stage == "pretrain":
        ids = np.random.default_rng(0).integers(0, tokenizer.n_vocab, 10**6, dtype=np.uint16)
        np.save(Path(cfg.out) / "train.npy", ids)
        return Text(cfg.out, "train", cfg.context, tokenizer.n_vocab)
    length = {"clip_pretrain": 30, "sft": cfg.context // 5, "vision_pretrain": 40}.get(stage, 200)
    spec = (image_spec(model.config) if stage == "clip_pretrain"
            else getattr(model, "image_spec", None))
    sources = ([RandomChats(tokenizer, length, spec.size if spec else 0, n)] if n
               else vision_sft.sources_of(cfg, tokenizer) if stage == "vision_sft"
               else [Chats(cfg.data, "train")])
    if stage == "clip_pretrain":
        return Captions(sources[0], tokenizer, spec, cfg.context)
    return Packed(sources, cfg.context, tokenizer, spec)


class RandomChats:
    """Chats of random ids, half of them an answer; each has an image unless image_size is 0."""

    folder, has_images, manifest = "random chats", True, {}

    def __init__(self, tokenizer, length, image_size, n):
        self.tokenizer, self.length, self.n = tokenizer, length, n
        self.files = [jpeg(image_size, image_size)] if image_size else []

    def __len__(self):
        return self.n

    def n_images(self, i):
        return len(self.files)

    def images(self, i, spec=None):
        return [read_image(file) for file in self.files]

    def chat(self, i):
        rng, t = np.random.default_rng(i), self.tokenizer
        half = int(self.length * rng.uniform(0.4, 1.6)) // 2
        ids = rng.integers(0, t.end_of_text, 2 * half + 4)
        ids[[0, 1, half, half + 1, -1]] = t.end_of_text, t.user, t.end, t.assistant, t.end
        if self.files:
            ids[2] = t.image
        return ids, np.arange(len(ids)) > half + 1


def jpeg(width, height):
    """A JPEG file of quality 90 with about as much detail as a photo."""
    grain = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(grain).resize((width, height), Image.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()
