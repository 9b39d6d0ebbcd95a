"""How long training steps take on GPUs that were not at hand: computed, not measured.

    python experiments/gpu_time_model.py configs/full   # A100, H100, eight of each
    python experiments/gpu_time_model.py configs/t4     # T4

Runs a micro-batch and an update of every stage's config on the GPU of simulated_gpu.py, and counts
FLOP and bytes of each operation: it takes the longer of both at the rates below. What a compiled
block does beside products and attention is replaced by inductor's count (UNITS).
"""

import contextlib
import dataclasses
import io
import math
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

from simulated_gpu import (  # first: it loads the device
    FREE,
    WATCH,
    Kernels,
    on_gpu,
    simulate,
    torch,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

import clip
import model
from benchmarks import training as bench
from experiments.gpu_check import one_micro_batch
from train import optim

BANDWIDTH_REACHED, LINK_REACHED, HIDDEN = 0.8, 0.75, 0.9  # HIDDEN: of the gradients' all-reduce


@dataclasses.dataclass(frozen=True)
class GPU:
    """A GPU by its data sheet, and the shares of the peak that operations are assumed to reach."""

    peak: float  # dense bf16 or fp16 FLOP/s
    bandwidth: float  # bytes/s of its memory
    products: float  # share
    attention: float  # share, counting only what the causal mask leaves
    ranks: int = 1
    link: float = 0  # bytes/s of NVLink in one direction

    def seconds(self, flop, n_bytes, share=1.0):
        return max(flop / (self.peak * share), n_bytes / (self.bandwidth * BANDWIDTH_REACHED))


GPUS = {"full": {f"{ranks} x {name}": GPU(*figures, ranks, link)
                 for ranks in (1, 8) for name, figures, link in (
                     ("A100 40 GB", (312e12, 1.555e12, 0.7, 0.4), 300e9),
                     ("A100 80 GB", (312e12, 2.04e12, 0.7, 0.4), 300e9),
                     ("H100", (989e12, 3.35e12, 0.6, 0.3), 450e9))},
        "t4": {"T4": GPU(65e12, 0.32e12, 0.3, 0.2)}}  # of 70 W: its clock falls under load
# Of a compiled block without products and attention, counted by torch._inductor.metrics on a CPU
# in bf16 at two lengths: bytes of an element of its input, halved; of a weight (conversions).
UNITS = {(model.Block, "trained"): (54.2, 12), (model.Block, "frozen"): (49.2, 6),
         (clip.Layer, "trained"): (57.1, 14), (clip.Layer, "forward"): (17.0, 8)}
ROWS = ("index", "index_select", "embedding", "index_put_", "_index_put_impl_", "index_copy_")
PARTS = ("products", "attention", "blocks", "other", "head", "update", "links")


class Count(TorchDispatchMode):
    """Counts operations: (part, FLOP, bytes, matrices of a call of Muon or 0) -> number."""

    def __init__(self):
        super().__init__()
        self.tracker, self.attended, self.images = ModuleTracker(), 0, 0
        self.operations, self.blocks, self.within, self.matrices = Counter(), {}, None, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and func.namespace == "aten":
            with self:  # which leaves operations such as linear whole: count their parts
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        name, found = func._schema.name.split("::")[1], on_gpu(out)
        if found and not func.is_view and name not in FREE:
            flop, inside = self.flop(func, args, kwargs, out), str(self.tracker.parents)
            part = (("attention" if "att" in name else "products") if flop else
                    "blocks" if ".blocks." in inside or ".layers." in inside else "other")
            kwargs = {key: value for key, value in kwargs.items() if key != "out"}  # is not read
            read = on_gpu((args[name in ("copy_", "zero_", "fill_"):], kwargs))
            if name in ROWS:  # only these of the table are accessed
                read = found = found if name in ROWS[:3] else read[-1:]
            n_bytes = sum(t.numel() * t.element_size() for t in (*read, *found))
            self.operations[self.within or part, flop, n_bytes, self.matrices] += 1
        return out

    def flop(self, func, args, kwargs, out):
        """FLOP; causal attention needs half of all pairs."""
        if "varlen" in str(func):
            return (10 if "backward" in str(func) else 4) * args[0].numel() * self.attended / 2
        if func._overloadpacket not in flop_registry:
            return 0
        named = {a.name: arg for a, arg in zip(func._schema.arguments, args, strict=False)}
        causal = {**named, **kwargs}.get("is_causal", False)
        return flop_registry[func._overloadpacket](*args, **kwargs, out_val=out) / (1 + causal)

    def inside(self, function, part, of_muon=False):  # counts its operations as those of `part`
        def counted(*args):
            before = self.within, self.matrices
            self.within, self.matrices = part, len(args[0]) if of_muon else 0
            try:
                return function(*args)
            finally:
                self.within, self.matrices = before
        return counted

    def before_block(self, block, args):  # calls and input elements of each kind
        kind = ("forward" if not torch.is_grad_enabled() else
                "trained" if next(block.parameters()).requires_grad else "frozen")
        key = type(block), kind, args[0].size(-1)
        calls, elements = self.blocks.get(key, (0, 0))
        self.blocks[key] = calls + 1, elements + args[0].numel()

    def before_forward(self, batch):
        self.attended = (batch.attended or 0) / batch.ids.numel()  # pairs of a position
        self.images = 0 if batch.pixels is None else len(batch.pixels)


class Step:
    """What a step of a stage needs, from one micro-batch (CLIP: two) and an update."""

    def __init__(self, folder, stage):
        self.cfg, self.count = cfg, count = bench.settings_of(folder, stage), Count()
        bench.training_data.__defaults__ = (1024,)  # chats: as many as fill the rows
        small = dataclasses.replace(one_micro_batch(cfg), compile=False, device="cuda:0")
        small.workers = 0
        with (mock.patch("model.head_loss", count.inside(model.head_loss, "head")),
              mock.patch("train.optim.orthogonalise",
                         count.inside(optim.orthogonalise, "update", of_muon=True)),
              contextlib.redirect_stdout(io.StringIO())):
            training = bench.Training(small, stage, folder, bench.random_tokenizer())
            run, forward = training.run, training.run.forward
            run.optimizer_step = count.inside(run.optimizer_step, "update")
            run.forward = lambda batch: (count.before_forward(batch), forward(batch))[1]
            for block in training.model.modules():
                if hasattr(block, "repeated"):
                    block.register_forward_pre_hook(count.before_block)
            with count.tracker, count:
                training.step(0)
        self.counted, self.micro_batches = (  # the latter of all GPUs together
            (2, cfg.batch_pairs / cfg.micro_pairs) if stage == "clip_pretrain" else
            (1, cfg.batch_tokens / cfg.context / cfg.micro_rows))
        self.images = count.images * self.micro_batches
        self.model_flop = run.flop / self.counted * self.micro_batches
        self.trained = sum(p.numel() for p in run.trained)
        self.of_muon = sum(p.numel() for member in run.optimizer.members for p in member.state
                           if isinstance(member, optim.Muon))

    def seconds(self, gpu, compiled):
        """{part: seconds} of a step on gpu.ranks GPUs."""
        found, n = dict.fromkeys(PARTS, 0.0), self.micro_batches / gpu.ranks
        for (part, flop, n_bytes, matrices), number in self.count.operations.items():
            number *= n / self.counted if part != "update" else (  # Muon's are divided among GPUs
                math.ceil(matrices / gpu.ranks) / matrices if matrices else 1)
            share = gpu.attention if part == "attention" else gpu.products
            found[part] += number * gpu.seconds(flop, n_bytes, share)
        if compiled:
            found["blocks"] = gpu.seconds(0, n * self.compiled_bytes())
        added = math.ceil(n) - (gpu.ranks == 1)  # micro-batches whose gradients join others, fp32
        found["update"] += gpu.seconds(0, added * 12 * self.trained)
        if gpu.ranks > 1:
            exchanged = 2 * 4 * self.trained * (1 - HIDDEN) + 2 * self.of_muon  # ring; half types
            found["links"] = exchanged * (1 - 1 / gpu.ranks) / (gpu.link * LINK_REACHED)
        return found

    def compiled_bytes(self):  # of a micro-batch's blocks, without products and attention
        return sum(2 * UNITS[module, kind][0] * elements + UNITS[module, kind][1] * calls
                   * 12 * width**2 for (module, kind, width), (calls, elements)
                   in self.count.blocks.items()) / self.counted


def table(names, rows):
    print("\n| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        cells = (x if isinstance(x, str) else f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in row)
        print("| " + " | ".join(cells) + " |")


def report(stage, step, gpus):
    compiled, other = step.cfg.compile, "eager" if step.cfg.compile else "compiled"
    print(f"\n{stage}: {step.micro_batches:g} micro-batches a step, {step.cfg.max_steps} steps, "
          f"{step.images:.0f} images a step; blocks beside products and attention, if compiled: "
          f"{step.compiled_bytes() / 1e9:.3g} GB a micro-batch")
    totals = {part: [0.0, 0.0, 0] for part in PARTS[:-1]}
    for (part, flop, n_bytes, _), number in step.count.operations.items():
        for i, amount in enumerate((flop / 1e12, n_bytes / 1e9, 1)):
            totals[part][i] += number * amount / (1 if part == "update" else step.counted)
    table(("a micro-batch; an update", "TFLOP", "GB, eager", "operations"),
          [(part, *total) for part, total in totals.items()])
    rows = []
    for name, gpu in gpus.items():
        if gpu.ranks == 1 or not stage.startswith("vision"):  # meant for one GPU
            found = step.seconds(gpu, compiled)
            total, second = sum(found.values()), sum(step.seconds(gpu, not compiled).values())
            rows.append((name, *(1e3 * s for s in (*found.values(), total, second)),
                         (step.images or step.cfg.batch_tokens) / total,
                         f"{step.model_flop / total / gpu.ranks / gpu.peak:.0%}",
                         total * step.cfg.max_steps / 3600))
    table(("ms", *PARTS, "step", f"{other} step", "images/s" if step.images else "tokens/s", "MFU",
           "hours"), rows)


def main():
    folder = Path(sys.argv[1])
    simulate((7, 5) if folder.name == "t4" else (8, 0))
    with FakeTensorMode(allow_non_fake_inputs=True), Kernels(), WATCH:
        for stage in bench.STAGES:
            if (folder / f"{stage}.py").is_file():
                report(stage, Step(folder, stage), GPUS[folder.name])


if __name__ == "__main__":
    main()
