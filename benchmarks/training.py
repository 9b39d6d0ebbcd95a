"""How fast a training step of any stage is, on random data that go the whole way: packed into rows,
pictures decoded."""

import importlib
import itertools
import signal
import statistics
import time
import timeit
from pathlib import Path

import numpy as np
import torch

import tokenizer as tokenizers
from benchmarks.baselines import REPEATS, WARM
from benchmarks.decoding import jpeg
from clip import CLIP, feature_pulls
from common import device as system
from common.config import parse
from common.images import fit, read_image
from data import Batch, check_tokenizer
from model import GPT
from train.optim import make_optimizer
from train.packing import Captions, Packed
from train.run import Run
from vision import VisionLanguageModel, image_spec


class Training:
    """Training steps of `stage`, its other parts as the configs in `folder` say."""

    def __init__(self, cfg, stage, folder, tokenizer=None):
        self.run = run = Run(cfg, stage)
        self.loss = importlib.import_module(stage).loss
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # there is nothing to save
        make = {"clip_pretrain": clip_job, "pretrain": text_job}.get(stage, chat_job)
        tokenizer = tokenizer or tokenizer_of(cfg)
        (self.model, self.dataset, self.rows, micro_rows, self.unit, self.per_step,
         self.flops) = make(stage, folder, run, tokenizer)
        self.model.to(run.device).train()
        self.loader = run.loader(self.dataset, self.rows, micro_rows)
        self.net = run.start(self.model, make_optimizer(self.model, cfg), tokenizer, {}, self.unit,
                             self.per_step, self.flops)
        self.watched, self.waited, self.images = False, 0.0, 0  # see batches

    def take(self, steps):
        """Train for these steps, and wait for the device."""
        for step in steps:
            batches, pulls = self.batches(step), itertools.repeat(None)
            if self.run.stage == "clip_pretrain":
                batches = list(batches)
                pulls = feature_pulls(self.model, batches, self.run.machine)
            for batch, pull in zip(batches, pulls, strict=False):
                with self.run.forward(batch):
                    loss = self.loss(self.net, batch, *([pull] if pull else []))
                self.run.backward(loss)
            self.run.optimizer_step(step)
        return self.run.loss.item()

    def batches(self, step):
        """The loader's batches; while `watched`, the device has done all its work when one is asked
        for, `waited` sums the seconds until it came and `images` its pictures."""
        loader = self.loader.step(step)
        while True:
            if self.watched:
                self.run.loss.item()
            asked, batch = time.perf_counter(), next(loader, None)
            if batch is None:
                return
            if self.watched:
                self.waited += time.perf_counter() - asked
                self.images += 0 if batch.pixels is None else len(batch.pixels)
            yield batch


def timing(training, n_steps):
    """The figures of a training step: the median of five times n_steps."""
    run, dataset, unit, per_step = training.run, training.dataset, training.unit, training.per_step
    spec = getattr(dataset, "spec", None)
    more = decode_speed(*spec[1:]) if spec else {}  # while nothing else is at work
    training.take(range(WARM))  # compiles, allocates
    seconds = []
    for i in range(REPEATS + 1):
        training.watched = i == REPEATS  # the last time is for `waited`
        began = time.perf_counter()
        training.take(range(WARM + i * n_steps, WARM + (i + 1) * n_steps))
        seconds.append((time.perf_counter() - began) / n_steps)
    watched, median = seconds.pop(), statistics.median(seconds[:REPEATS])
    if spec:
        images = run.machine.sum(torch.tensor(training.images, device=run.device)).item()
        more.update(img_per_step=images / n_steps, img_per_s=images / n_steps / median)
    gpu_gb, host_gb = system.peak_memory_gb(run.device)
    return {"stage": run.stage, "machine": f"{run.ranks} x {run.machine.name}",
            "precision": str(run.machine.dtype)[6:],
            "parameters_M": sum(p.numel() for p in training.model.parameters()) / 1e6,
            f"{unit}_per_step": per_step, "ms": median * 1e3, "slowest_ms": max(seconds) * 1e3,
            f"{unit}_per_s": per_step / median, "rows_per_s": training.rows / median,
            "mfu": per_step * training.flops / median / run.peak,
            "filled": getattr(dataset, "filled", 1.0), **more,
            "waited": training.waited / n_steps / watched, "gpu_gb": gpu_gb, "host_gb": host_gb}


def decode_speed(size, how):
    """Pictures a second that a core makes ready: photos, and squares as prepare.py stores them."""
    figures = {}
    for name, shape in {"decode": (640, 480), "stored": (size, size)}.items():
        file = jpeg(*shape)
        seconds = timeit.repeat(lambda file=file: fit(read_image(file, "", size, how), size, how),
                                repeat=REPEATS, number=20)
        figures[f"{name}_img_per_s_per_core"] = 20 / statistics.median(seconds)
    return figures


def profile(training, n_steps):
    """Print the ten operations that take the most time of a step: the GPU's time, if any."""
    training.take(range(WARM))
    with torch.profiler.profile() as found:
        training.take(range(WARM, WARM + n_steps))
    kind = {"cuda": "device"}.get(training.run.device.type, "cpu")
    times = {event.key: getattr(event, f"self_{kind}_time_total") / 1e3 / n_steps
             for event in found.key_averages()
             if event.device_type == torch.autograd.DeviceType.CPU and not event.is_user_annotation}
    total = sum(times.values())
    lines = [f"{times[key]:10.2f}  {times[key] / total:5.1%}  {key}"
             for key in sorted(times, key=times.get, reverse=True)[:10]]
    print(" ms a step  share  operation", *lines, sep="\n")
    return {"stage": training.run.stage, "operations_ms": total}


def tokenizer_of(cfg):
    """That of the config's data where they are prepared, else GPT-2's."""
    known = (Path(cfg.data) / "manifest.json").is_file()
    return check_tokenizer(cfg.data) if known else tokenizers.load("gpt2")


def text_job(stage, folder, run, tokenizer):
    cfg, model = run.cfg, GPT(run.cfg.decoder(tokenizer))
    rows = run.rows(cfg.max_positions)
    return (model, RandomText(tokenizer.n_vocab, cfg.context), rows, cfg.micro_rows, "tok",
            cfg.batch_tokens, model.flops_per_token(cfg.context))


def chat_job(stage, folder, run, tokenizer):
    cfg, decoder = run.cfg, GPT(sibling(folder, "pretrain").decoder(tokenizer))
    flops, model, spec = decoder.flops_per_token(cfg.context), decoder, None
    if stage != "sft":
        clip_config = sibling(folder, "clip_pretrain").clip(tokenizer)
        model = VisionLanguageModel(decoder.config, clip_config)
        spec = model.image_spec
    if stage == "vision_pretrain":
        model.decoder.requires_grad_(False)
        flops *= 2 / 3  # no weight gradients
    length = {"sft": cfg.context // 5, "vision_pretrain": 40, "vision_sft": 200}[stage]
    rows = run.rows(decoder.config.max_positions)
    n_chats = max(4096, 4 * rows)  # enough to fill the rows
    chats = RandomChats(tokenizer, n_chats, length, spec.size if spec else 0)
    packed = Packed([chats], cfg.context, tokenizer, spec)
    return model, packed, rows, cfg.micro_rows, "tok", cfg.batch_tokens, flops


def clip_job(stage, folder, run, tokenizer):
    cfg, model = run.cfg, CLIP(run.cfg.clip(tokenizer))
    chats = RandomChats(tokenizer, cfg.batch_pairs, 30, cfg.image_size)
    captions = Captions(chats, tokenizer, image_spec(model.config), cfg.context)
    micro_pairs = cfg.micro_pairs or cfg.batch_pairs // run.ranks
    return (model, captions, cfg.batch_pairs, micro_pairs, "img", cfg.batch_pairs,
            model.flops_per_pair())


def sibling(folder, stage):
    """The settings of another stage in the same folder of configs, or its defaults."""
    path = folder / f"{stage}.py"
    return parse(importlib.import_module(stage).Config, [str(path)] if path.is_file() else [])


class RandomText:
    """Windows of random ids."""

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
    """Chats of random ids, half of them an answer, each with a picture where there is a size."""

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
