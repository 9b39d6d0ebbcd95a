"""How fast: a training step of any stage, decoding, and nanoGPT beside us.

    python bench.py configs/full/pretrain.py                     # any stage's config and settings
    torchrun --standalone --nproc_per_node=8 bench.py configs/full/sft.py --micro_rows=16
    python bench.py configs/full/pretrain.py --decode=True       # tokens a second of generation
    python bench.py --peer=nanoGPT/model.py                      # its model.py and ours, in turn

The data are random but go the whole way: packed into rows, pictures decoded. One line for people,
one of JSON.
"""

import dataclasses
import gc
import importlib
import importlib.util
import io
import itertools
import json
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import tokenizer as tokenizers
from clip import CLIP, CLIPConfig, feature_pulls, normalise
from common import distributed as system
from common.config import TrainSettings, UserError, parse, run_main
from common.optim import make_optimizer
from common.run import Run
from data import Batch, Loader, check_tokenizer
from model import GPT, GPTConfig, KVCache, generate
from packing import Captions, Packed
from pictures import read_image
from vision import VisionLanguageModel

STAGES = ("pretrain", "sft", "vision_pretrain", "vision_sft", "clip_pretrain")
REPEATS = 5  # every figure is the median of so many


@dataclass
class Config:
    """What bench.py lets you set beside the stage's own settings."""

    steps: int = 4  # steps of a measurement; there are five, after two steps that do not count
    decode: bool = False  # measure generation instead of training
    peer: str = ""  # path of nanoGPT's model.py, to measure its training step beside ours


def main():
    own = [f"--{field.name}" for field in dataclasses.fields(Config)]
    mine = [flag for flag in sys.argv[1:] if flag.split("=")[0] in own or flag == "--help"]
    theirs = [flag for flag in sys.argv[1:] if flag not in mine]
    bench = parse(Config, mine)
    if bench.peer:
        return show(**beside(bench.peer))
    if not theirs or Path(theirs[0]).stem not in STAGES:
        raise UserError("say which config to time, like configs/full/pretrain.py; its name must be "
                        f"a stage's: {', '.join(STAGES)}")
    stage, folder = Path(theirs[0]).stem, Path(theirs[0]).parent
    cfg = parse(importlib.import_module(stage).Config, theirs)
    if bench.decode:
        return show(**decoding(cfg, folder))
    with tempfile.TemporaryDirectory() as out:
        cfg = dataclasses.replace(cfg, out=out, resume=False, tracker="none")
        run = Run(cfg, stage)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # there is nothing to save
        figures = training(run, stage, folder, bench.steps)
        if run.machine.is_main:
            show(**figures)
        run.machine.leave()


def show(**figures):
    """One line for people, one of JSON."""
    rounded = {name: float(f"{value:.4g}") if isinstance(value, float) else value
               for name, value in figures.items()}
    print(" | ".join(f"{name} {value:,}" if isinstance(value, (int, float)) else f"{name} {value}"
                     for name, value in rounded.items()))
    print(json.dumps(rounded))


# ----------------------------------------------------------------------------------- training step


def training(run, stage, folder, n_steps):
    """Figures of training steps of `stage`, its other parts as the configs in `folder` say."""
    cfg, tokenizer = run.cfg, tokenizer_of(run.cfg)
    make = clip_job if stage == "clip_pretrain" else text_job if stage == "pretrain" else chat_job
    model, dataset, rows, micro_rows, unit, per_step, flops = make(stage, folder, run, tokenizer)
    model.to(run.device).train()
    loader = Loader(dataset, rows, micro_rows, run, cfg.seed)
    net = run.start(model, make_optimizer(model, cfg), tokenizer, {}, unit, per_step, flops)

    def train(steps):
        for step in steps:
            batches, pulls = loader.step(step), itertools.repeat(None)
            if stage == "clip_pretrain":
                batches = list(batches)
                pulls = feature_pulls(model, batches, run.machine)
            for micro, (batch, pull) in enumerate(zip(batches, pulls, strict=False)):
                with run.forward(micro):
                    loss = loss_of(net, batch, pull)
                run.backward(loss / max(1, batch.n_targets))
            run.update(step)
        return run.loss.item()  # waits for the device

    train(range(2))  # compiles, allocates
    seconds = []
    for i in range(REPEATS):
        began = time.perf_counter()
        train(range(2 + i * n_steps, 2 + (i + 1) * n_steps))
        seconds.append((time.perf_counter() - began) / n_steps)
    median = statistics.median(seconds)
    gpu_gb, host_gb = system.peak_memory_gb(run.device)
    return {"stage": stage, "machine": f"{run.ranks} x {run.machine.name}",
            "precision": str(run.machine.dtype)[6:],
            "parameters_M": sum(p.numel() for p in model.parameters()) / 1e6,
            f"{unit}_per_step": per_step, "ms": median * 1e3, "slowest_ms": max(seconds) * 1e3,
            f"{unit}_per_s": per_step / median, "mfu": per_step * flops / median / run.peak,
            "filled": getattr(dataset, "filled", 1.0), "gpu_gb": gpu_gb, "host_gb": host_gb}


def loss_of(net, batch, pull=None):
    """The stage's loss: CLIP's of pairs, a vision model's of a batch, a decoder's of its parts."""
    if pull:
        return pull(net(normalise(batch.pixels), batch.ids)) * batch.n_targets
    if isinstance(getattr(net, "module", net), VisionLanguageModel):
        return net(batch)
    return net(batch.ids, batch.targets, batch.where, batch.positions, batch.segments)


def tokenizer_of(cfg):
    """That of the config's data where they are prepared, else GPT-2's."""
    known = (Path(cfg.data) / "manifest.json").is_file()
    return check_tokenizer(cfg.data) if known else tokenizers.load("gpt2")


def text_job(stage, folder, run, tokenizer):
    cfg, model = run.cfg, decoder_of(run.cfg, tokenizer)
    return (model, RandomText(tokenizer.n_vocab, cfg.context), run.rows(), cfg.micro_rows, "tok",
            cfg.batch_tokens, model.flops_per_token(cfg.context))


def chat_job(stage, folder, run, tokenizer):
    cfg = run.cfg
    decoder = decoder_of(sibling(folder, "pretrain"), tokenizer)
    flops, patches, model = decoder.flops_per_token(cfg.context), 0, decoder
    if stage != "sft":
        clip_config = clip_of(sibling(folder, "clip_pretrain"), tokenizer)
        model = VisionLanguageModel(decoder.config, clip_config)
        patches = clip_config.n_patches
    if stage == "vision_pretrain":
        model.decoder.requires_grad_(False)
        flops *= 2 / 3  # no weight gradients
    length = {"sft": cfg.context // 5, "vision_pretrain": 40, "vision_sft": 200}[stage]
    size = clip_config.image_size if patches else 0
    chats = RandomChats(tokenizer, 4 * run.rows(), length, size)
    packed = Packed([chats], cfg.context, tokenizer, patches, size)
    return model, packed, run.rows(), cfg.micro_rows, "tok", cfg.batch_tokens, flops


def clip_job(stage, folder, run, tokenizer):
    cfg, model = run.cfg, CLIP(clip_of(run.cfg, tokenizer))
    chats = RandomChats(tokenizer, cfg.batch_pairs, 30, cfg.image_size)
    captions = Captions(chats, tokenizer, cfg.image_size, cfg.context)
    micro_pairs = cfg.micro_pairs or cfg.batch_pairs // run.ranks
    return (model, captions, cfg.batch_pairs, micro_pairs, "img", cfg.batch_pairs,
            model.flops_per_pair())


def sibling(folder, stage):
    """The settings of another stage in the same folder of configs, or its defaults."""
    path = folder / f"{stage}.py"
    return parse(importlib.import_module(stage).Config, [str(path)] if path.is_file() else [])


def decoder_of(cfg, tokenizer):
    return GPT(GPTConfig(tokenizer.n_vocab, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.max_positions))


def clip_of(cfg, tokenizer):
    return CLIPConfig(
        cfg.image_size, cfg.patch_size, cfg.vision_width, cfg.vision_layers, cfg.vision_heads,
        cfg.text_width, cfg.text_layers, cfg.text_heads, cfg.context, tokenizer.n_vocab,
        tokenizer.end, cfg.embed_dim, cfg.activation)


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

    folder, has_images = "random chats", True

    def __init__(self, tokenizer, n, length, image_size=0):
        self.tokenizer, self.n, self.length, self.image_size = tokenizer, n, length, image_size
        shades = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
        file = io.BytesIO()
        side = image_size or 8
        Image.fromarray(shades).resize((side, side), Image.BICUBIC).save(file, "JPEG", quality=90)
        self.jpeg = file.getvalue()

    def __len__(self):
        return self.n

    def n_images(self, i):
        return 1 if self.image_size else 0

    def images(self, i, size=0, how="pad"):
        return [read_image(self.jpeg)] if self.image_size else []

    def chat(self, i):
        rng, t = np.random.default_rng(i), self.tokenizer
        half = int(self.length * rng.uniform(0.4, 1.6)) // 2
        ids = rng.integers(0, t.end_of_text, 2 * half + 4)
        ids[0], ids[1], ids[half], ids[half + 1], ids[-1] = (
            t.end_of_text, t.user, t.end, t.assistant, t.end)
        if self.image_size:
            ids[2] = t.image
        return ids, np.arange(len(ids)) > half + 1


# ---------------------------------------------------------------------------------------- decoding


def decoding(cfg, folder, n_tokens=200):
    """Tokens a second of one conversation, and what share of the memory's speed that is: every
    weight but the embedding table is read once a token, and the cache as far as it is filled."""
    machine = system.setup(cfg.device, cfg.precision)
    tokenizer = tokenizer_of(cfg)
    decoder = decoder_of(sibling(folder, "pretrain"), tokenizer)
    decoder.to(machine.device, machine.dtype).eval()
    prompt = torch.randint(tokenizer.end_of_text, (1, 64), device=machine.device)
    seconds = []
    for _ in range(REPEATS + 1):
        cache = KVCache(decoder)
        tokens = generate(decoder, decoder.token_embedding(prompt), cache, n_tokens, stop=-1)
        next(tokens)  # the prompt
        began = time.perf_counter()
        n = sum(1 for _ in itertools.islice(tokens, n_tokens - 1))
        seconds.append((time.perf_counter() - began) / n)
    median = statistics.median(seconds[1:])
    weights = (decoder.n_params() - decoder.token_embedding.weight.numel())
    filled = 2 * cache.keys[..., : 64 + n_tokens // 2, :].numel()
    moved = (weights + filled) * decoder.head.weight.element_size()
    return {"decoding": f"{decoder.n_params() / 1e6:.1f} M", "machine": machine.name,
            "precision": str(machine.dtype)[6:], "tok_per_s": 1 / median, "ms": median * 1e3,
            "share_of_bandwidth": moved / median / system.memory_bandwidth(machine)}


# ---------------------------------------------------------------------------------------- the peer


def beside(path):
    """Our training step and that of nanoGPT's model.py at `path`, in one process and in turn.

    6 layers of width 256, 4 heads, 16 rows of 256 tokens, GPT-2's padded vocabulary, AdamW there
    and Muon here, gradients clipped. Peak memory is measured with one model alone.
    """
    ids = torch.randint(50257, (16, 257))
    kinds = {"ours": lambda: our_step(ids)}
    for name, how in {"eager": (False, False), "compiled": (True, False),
                      "compiled_bf16": (True, True)}.items():
        kinds[name] = lambda how=how: peer_step(path, ids, *how)
    figures = {"machine": system.setup("cpu").name}
    for name in ("ours", "eager"):
        step = kinds[name]()
        step()
        gc.collect()
        system.release_free_memory()
        system.reset_peak_memory()
        step()
        figures[f"{name}_peak_gb"] = system.peak_memory_gb()[1]
        del step
    steps = {name: make() for name, make in kinds.items()}
    seconds = {name: [] for name in steps}
    for i in range(REPEATS + 2):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if i >= 2:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        figures[f"{name}_tok_per_s"] = 16 * 256 / median
    for name in ("eager", "compiled", "compiled_bf16"):
        figures[f"times_{name}"] = medians[name] / medians["ours"]
    figures["memory_of_eager"] = figures["ours_peak_gb"] / figures["eager_peak_gb"]
    return figures


def our_step(ids):
    model, cfg = GPT(GPTConfig(50304, 6, 4, 256, 256)), TrainSettings()
    machine, optimizer = system.setup("cpu"), make_optimizer(model, cfg)

    def step():
        with machine.autocast():
            loss = model(ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step(skip=~torch.isfinite(norm))
        optimizer.zero_grad()

    return step


def peer_step(path, ids, compiled, bf16):
    spec = importlib.util.spec_from_file_location("peer", path)
    if spec is None or not Path(path).is_file():
        raise UserError(f"--peer={path} is no Python file; it should be nanoGPT's model.py")
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    model = peer.GPT(peer.GPTConfig(block_size=256, vocab_size=50304, n_layer=6, n_head=4,
                                    n_embd=256, dropout=0.0, bias=False))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    net = torch.compile(model) if compiled else model
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            _, loss = net(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    run_main(main)
