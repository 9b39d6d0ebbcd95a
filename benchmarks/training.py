"""The speed of a training step of any stage, on random data."""

import importlib
import itertools
import signal
import statistics

import torch

from benchmarks import REPEATS, WARM, elapsed
from benchmarks.random_data import build_model, random_data, tokenizer_of
from clip import feature_pulls
from common import device as system
from train.optim import make_optimizer
from train.run import Run


class Training:
    """Training steps of `stage`; the sizes of its other parts come from the configs in `folder`."""

    def __init__(self, cfg, stage, folder, tokenizer=None):
        self.run = run = Run(cfg, stage)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # nothing needs saving
        tokenizer = tokenizer or tokenizer_of(cfg)
        self.loss = importlib.import_module(stage).loss
        self.model = build_model(cfg, stage, folder, tokenizer).to(run.device).train()
        self.dataset = random_data(cfg, stage, self.model, tokenizer)
        if stage == "clip_pretrain":
            self.unit, self.per_step = "img", cfg.batch_pairs
            self.rows, micro_rows = cfg.batch_pairs, cfg.micro_pairs or cfg.batch_pairs // run.ranks
            self.flops = self.model.flops_per_pair()
        else:
            decoder = getattr(self.model, "decoder", self.model)
            self.unit, self.per_step = "tok", cfg.batch_tokens
            self.rows, micro_rows = run.rows(decoder.config.max_positions), cfg.micro_rows
            self.flops = decoder.flops_per_token(cfg.context)
            self.flops *= 2 / 3 if stage == "vision_pretrain" else 1  # no weight gradients
        self.loader = run.loader(self.dataset, self.rows, micro_rows)
        self.net = run.start(self.model, make_optimizer(self.model, cfg), tokenizer, {}, self.unit,
                             self.per_step, self.flops)
        self.images = 0  # how many were trained on, in this process

    def take(self, steps):
        """Train for these steps, and wait for the device."""
        for step in steps:
            batches, pulls = self.loader.step(step), itertools.repeat(())
            if self.run.stage == "clip_pretrain":
                batches = list(batches)
                pulls = [[pull] for pull in feature_pulls(self.model, batches, self.run.machine)]
            for batch, pull in zip(batches, pulls, strict=False):
                with self.run.forward(batch):
                    loss = self.loss(self.net, batch, *pull)
                self.run.backward(loss)
                self.images += 0 if batch.pixels is None else len(batch.pixels)
            self.run.optimizer_step(step)
        return self.run.loss.item()

def step_speed(training, n_steps):
    """{name: figure} of a training step: the median of five times n_steps."""
    run, unit, per_step = training.run, training.unit, training.per_step
    training.take(range(WARM))  # compiles, allocates
    training.images = 0
    seconds = [elapsed(training.take, range(first, first + n_steps)) / n_steps
               for first in range(WARM, WARM + REPEATS * n_steps, n_steps)]
    median = statistics.median(seconds)
    images = run.machine.sum(torch.tensor(float(training.images), device=run.device)).item()
    images /= REPEATS * n_steps
    image_figures = {"img_per_step": images, "img_per_s": images / median} if images else {}
    gpu_gb, host_gb = system.peak_memory_gb(run.device)
    return {"stage": run.stage, "machine": f"{run.ranks} x {run.machine.name}",
            "precision": str(run.machine.dtype)[6:],
            "parameters_M": sum(p.numel() for p in training.model.parameters()) / 1e6,
            f"{unit}_per_step": per_step, "ms": median * 1e3, "slowest_ms": max(seconds) * 1e3,
            f"{unit}_per_s": per_step / median, "rows_per_s": training.rows / median,
            "mfu": per_step * training.flops / median / run.peak,
            "filled": getattr(training.dataset, "filled", 1.0), **image_figures,
            "gpu_gb": gpu_gb, "host_gb": host_gb}


def profile(training, n_steps):
    """Print the ten operations that take the most time, on the GPU if there is one."""
    training.take(range(WARM))
    with torch.profiler.profile() as found:
        training.take(range(WARM, WARM + n_steps))
    key = "self_device_time_total" if training.run.device.type == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=key, row_limit=10))
    return {"stage": training.run.stage, "steps": n_steps}
