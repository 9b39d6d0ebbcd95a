"""What all stages of a folder of configs need, before anything is rented.

Parameters, FLOP and memory are computed: a micro-batch of tensors without content (FakeTensorMode)
passes through a stage's model, and what autograd keeps of it is counted. Time and dollars follow
from the table of GPUs, whose shares of the peak (MFU) and prices are assumptions.
"""

import contextlib
import dataclasses
import io
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import elapsed
from benchmarks.training import STAGES, Training, build_model, settings_of, training_data
from clip import normalise
from common.atomic import writing
from common.checkpoint import write_json
from common.config import UserError, read_json
from common.device import peak_memory_gb, pick_dtype
from common.report import table
from model import LOGITS_AT_ONCE
from train.log import duration, per_step
from train.optim import kind_of
from train.recipe import BY_RULE

GPU = ("gpus", "memory_gib", "tflops", "mfu", "dollars_per_hour")  # figures of the table
SLOW = 45 * 60  # seconds: about twice what two cores of most laptops need (docs/processors.md)
TOO_BIG = "does not fit"  # instead of a micro-batch; runs/common.sh looks for it
BUFFERS, FRAGMENTS = {"cuda": 2, "cpu": 1}, {"cuda": 1.0, "cpu": 1.1}  # of logits; of activations
DEPTHS = range(24, 3, -2)  # tried for a budget; a decoder of L layers has width 64 * L
DOWNLOADS = read_json(Path(__file__).with_name("downloads.json"))  # GB


@dataclass
class Config:
    # --- plan
    gpu: str = "8 x A100 80 GB"  # the entry of the table of GPUs that the flags are for
    gpus: str = str(Path(__file__).with_name("gpus.json"))  # table of GPUs, speeds and prices
    budget: str = ""  # dollars, or hours like 8h, on --gpu: plans the largest decoder for it
    vocabulary: int = 50304  # number of the tokenizer's ids
    out: str = ""  # folder for plan.md and plan.json; empty for none
    check: bool = False  # also time one step of each stage on this machine


class Stage:
    """What a stage needs; `settings` as for benchmarks.training.Training."""

    def __init__(self, folder, stage, tokenizer, settings):
        self.name, self.cfg, self.fits = stage, settings(folder, stage), {}
        self.is_clip = stage == "clip_pretrain"
        with FakeTensorMode():
            self.model = build_model(self.cfg, stage, folder, tokenizer, settings).train()
        with tempfile.TemporaryDirectory() as out:
            cfg = dataclasses.replace(self.cfg, out=out)
            data = training_data(cfg, stage, self.model, tokenizer, n=512)
            self.samples = [data.batch(range(n)) for n in (2, 4)]
        self.units = per_step(dataclasses.asdict(cfg)) * cfg.max_steps
        self.rows = cfg.batch_pairs if self.is_clip else cfg.batch_tokens // cfg.context
        self.micro = min(self.rows, getattr(cfg, "micro_rows", 0) or cfg.micro_pairs or self.rows)
        self.flop = self.model.flops(self.samples[1]) / 4 * self.rows * cfg.max_steps
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        muon = sum(p.numel() for name, p in trained if kind_of(name, p, cfg.optimizer) == "muon")
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.trained = sum(p.numel() for _, p in trained)
        # in fp32; the optimizer has one more number for each of Muon's weights, two for AdamW's
        self.checkpoint = 4 * self.parameters + 4 * muon + 8 * (self.trained - muon)

    def kept(self, batch, dtype):
        """The bytes that autograd keeps of a micro-batch, computed in `dtype`."""
        found = {p.untyped_storage()._cdata: 0 for p in self.model.parameters()}

        def keep(tensor):
            storage = tensor.untyped_storage()
            found.setdefault(storage._cdata, storage.nbytes())
            return tensor

        inputs = (normalise(batch.pixels), batch.ids) if self.is_clip else (batch,)
        with (FakeTensorMode(allow_non_fake_inputs=True),
              torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
              torch.autocast("cpu", dtype, dtype != torch.float32)):
            out = self.model(*inputs)
        del out  # until here no storage was freed, so that each has its own address
        return sum(found.values())

    def memory(self, micro_rows, dtype, kind):
        """The bytes that a training step needs at most, in micro-batches of so many rows."""
        if dtype not in self.fits:
            self.fits[dtype] = [self.kept(batch, dtype) for batch in self.samples]
        two, four = self.fits[dtype]
        kept = two + (micro_rows - 2) * (four - two) / 2
        logits = 0 if self.is_clip else min(LOGITS_AT_ONCE[kind], self.model.config.vocab_size
                                            * self.samples[1].targets.numel() * micro_rows / 4)
        return (4 * self.trained + self.checkpoint + FRAGMENTS[kind] * kept
                + BUFFERS[kind] * dtype.itemsize * logits)

    def seconds(self, gpu):
        return self.flop / (gpu["tflops"] * 1e12 * gpu["mfu"] * gpu["gpus"])

    def on(self, gpu):
        """The largest micro-batch, memory, time and price on one of the GPUs; {} if none fits."""
        for micro_rows in (self.rows // n for n in range(1, self.rows + 1) if self.rows % n == 0):
            needed = self.memory(micro_rows, torch.bfloat16, "cuda")
            if needed < 0.9 * gpu["memory_gib"] * 2**30:  # the rest is for the libraries
                return dict(micro_rows=micro_rows, gb=needed / 1e9, seconds=self.seconds(gpu),
                            dollars=self.seconds(gpu) / 3600 * gpu["dollars_per_hour"])
        return {}

    def flags(self, gpu, size):
        rows = {"micro_pairs" if self.is_clip else "micro_rows": self.on(gpu).get("micro_rows")}
        return " ".join(f"--{name}={value}" for name, value in (
            rows | size if self.name == "pretrain" else rows).items()) if self.on(gpu) else TOO_BIG

    def row(self, here):
        """A row of the first table; here: GB of a process before its first step."""
        cfg, dtype = self.cfg, pick_dtype(torch.device("cpu"))
        needed = [self.parameters / 1e6, self.trained / 1e6, self.units / 1e6, self.flop / 1e15,
                  3 * self.checkpoint / 1e9, here + self.memory(self.micro, dtype, "cpu") / 1e9]
        named = [getattr(cfg, name, "") for name in ("data", "text_data", "clip")]
        return [self.name, f"{cfg.max_steps:,}", *(f"{number:,.2f}" for number in needed),
                sum(DOWNLOADS.get(name, 0) for name in named)]


def plan(folder, cfg, tokenizer):
    """Print the plan of the configs in `folder`, and write plan.md and plan.json into cfg.out."""
    try:
        gpus = {gpu["name"]: {key: float(gpu[key]) for key in GPU} for gpu in read_json(cfg.gpus)}
        if any(min(gpu.values()) < 0 or 0 in list(gpu.values())[:-1] for gpu in gpus.values()):
            raise ValueError("a figure that is not above 0")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{cfg.gpus}: {error!r}; a GPU has a name, and {', '.join(GPU)}") from None
    here = peak_memory_gb()[1] + 0.3  # kernels, and what malloc keeps (docs/performance.md)
    if cfg.gpu not in gpus:
        raise UserError(f"--gpu={cfg.gpu!r} is not in {cfg.gpus}, which has {', '.join(gpus)}")
    names = [stage for stage in STAGES if (Path(folder) / f"{stage}.py").is_file()]
    if not names:
        raise UserError(f"{folder} has no config of a stage, like {folder}/pretrain.py")
    for size in map(sized, DEPTHS) if cfg.budget else [{}]:
        settings = partial(settings_with, size)
        stages = [Stage(folder, name, tokenizer, settings) for name in names]
        if not cfg.budget or within(cfg.budget, stages, gpus[cfg.gpu]):
            break
    else:
        raise UserError(f"--budget={cfg.budget} is too small for {cfg.gpu} (if free: hours, 8h)")
    found = {name: {stage.name: stage.on(gpu) for stage in stages} for name, gpu in gpus.items()}
    flags = {stage.name: stage.flags(gpus[cfg.gpu], size) for stage in stages}
    text = "\n\n".join((
        table(["computed", "steps", "M parameters", "M trained", "M tokens or pairs", "PFLOP",
               "GB of checkpoints", "GB on a CPU", "GB to download (assumed)"],
              [stage.row(here) for stage in stages]),
        table(["assumed speeds and prices", *names],
              [[name, *map(cell, places.values())] for name, places in found.items()]),
        f"Flags for {cfg.gpu}:", "\n".join(f"- {name}: `{line}`" for name, line in flags.items())))
    print(text, flush=True)
    if cfg.out:
        with writing(cfg.out, "--out="):
            Path(cfg.out).mkdir(parents=True, exist_ok=True)
            (Path(cfg.out) / "plan.md").write_text(text + "\n", encoding="utf-8")
            write_json(Path(cfg.out) / "plan.json", {"gpus": found, "flags": flags})
    if cfg.check:
        check(folder, stages, tokenizer, settings)


def sized(depth):
    """Settings of pretraining for a decoder of so many layers; the rest follows by rule."""
    by_rule = "max_steps", "batch_tokens", "muon_lr", "momentum", "lr", "embedding_lr"
    return dict(n_layer=depth, n_head=depth // 2, n_embd=64 * depth,
                **dict.fromkeys(by_rule, BY_RULE))


def settings_with(size, folder, stage):
    cfg = settings_of(folder, stage)
    return dataclasses.replace(cfg, **size) if stage == "pretrain" else cfg


def within(budget, stages, gpu):
    """Whether stages cost at most so many dollars or hours (8h), clip_pretrain only if used."""
    clips = {getattr(stage.cfg, "clip", "") for stage in stages}
    used = [stage for stage in stages if not stage.is_clip or stage.cfg.out in clips]
    per_hour = 1 if budget.endswith("h") else gpu["dollars_per_hour"]
    try:
        cost = sum(stage.seconds(gpu) for stage in used) / 3600 * per_hour
        return 0 < cost <= float(budget.removesuffix("h")) and all(stage.on(gpu) for stage in used)
    except ValueError:
        raise UserError(f"--budget={budget}: dollars like 10, or hours like 8h") from None


def cell(place):
    return ("{}, ${dollars:.2f}, {micro_rows} rows, {gb:.0f} GB".format(
        duration(place["seconds"]), **place) if place else TOO_BIG)


def check(folder, stages, tokenizer, settings):
    """Time one step of each stage on this machine, and print the time of the complete stages."""
    total = 0.0
    for stage in stages:
        with contextlib.redirect_stdout(io.StringIO()):
            training = Training(stage.cfg, stage.name, folder,
                                None if Path(stage.cfg.data).is_dir() else tokenizer, settings)
            training.take([0])
            seconds, n_steps = elapsed(training.take, [1]), stage.cfg.max_steps
            training.loader.close()
        total, run = total + seconds * n_steps, training.run
        mfu = stage.flop / n_steps / seconds / run.peak / run.ranks
        print(f"{stage.name:16s} {n_steps:6,} steps of {seconds * 1e3:5,.0f} ms (measured, mfu "
              f"{mfu:.0%}): {duration(seconds * n_steps)}", flush=True)
        if gb := peak_memory_gb(run.device)[0]:
            needed = stage.memory(stage.micro, run.machine.dtype, "cuda")
            print(f"{gb:.1f} GB of GPU memory at most until now; computed {needed / 1e9:.1f}")
    print(f"{'all stages':16s} about {duration(total)} on {run.machine.name}; evaluations "
          "add about a tenth", flush=True)
    if total > SLOW:
        print("This machine is slower than any in docs/processors.md. STEPS=0.2 make demo trains "
              f"the same stages to lower scores in about {duration(0.2 * total)}.")
