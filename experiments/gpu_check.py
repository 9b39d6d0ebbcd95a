"""The first minutes on a new GPU: are results right, which kernels work, how fast are the steps?

    bash runs/gpu_check.sh               # at most 12 minutes
    bash runs/gpu_check.sh --dry_run     # small shapes, also on a CPU

Each check has its own process, so a failure does not end the others. The output ends with a table
and what to set for each failed check; --out gets the figures as JSON.
"""

import itertools
import json
import statistics
import subprocess
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))
import benchmarks.training as bench
from benchmarks import REPEATS, WARM
from common.config import UserError, one_line, parse, run_main
from common.device import cudnn_attention, pick_device, pick_dtype, setup
from experiments.in_turn import in_turn
from inference.generate import Decoding
from inference.quantized_linear import for_decoding
from model import attend, takes_bounds

MINUTES, SECONDS = 12, 150  # limits of all checks and of one
LOSS, NORM, LARGEST = 0.02, 0.1, 0.05  # relative differences that are accepted
SMALL = dict(n_layer=2, n_head=2, n_embd=64, max_positions=256, context=128, batch_tokens=512,
             micro_rows=2, image_size=32, patch_size=8, vision_width=64, vision_layers=2,
             vision_heads=2, text_width=64, text_layers=2, text_heads=2, embed_dim=64,
             batch_pairs=8, micro_pairs=4)  # shapes that every device computes in seconds


@dataclass
class Config:
    # --- check
    dry_run: bool = False  # small shapes everywhere: tests this program, not the GPU
    configs: str = ""  # folder of the stages to time; empty: configs/full, before Ampere t4
    only: str = ""  # one check, in this process
    out: str = "out/gpu_check.json"  # figures of all checks

    def training(self, stage, small=False, **changes):
        read = small_settings if small or self.dry_run else bench.settings_of
        cfg = replace(one_micro_batch(read(self.configs, stage)), **changes)
        training = bench.Training(cfg, stage, self.configs, bench.random_tokenizer(), read)
        torch.manual_seed(0)
        for weight in training.model.parameters():
            if not weight.any():  # a new block is the identity
                torch.nn.init.normal_(weight, std=0.02)
        return training


def small_settings(folder, stage):
    """The settings of a stage by its config in `folder`, in the shapes of SMALL."""
    cfg = bench.settings_of(folder, stage)
    return replace(
        cfg, **{name: n for name, n in SMALL.items() if hasattr(cfg, name)})


def one_micro_batch(cfg):
    """The settings of a stage with one micro-batch in a step of one process; two for CLIP."""
    if hasattr(cfg, "micro_pairs"):
        return replace(cfg, batch_pairs=2 * (cfg.micro_pairs or cfg.batch_pairs // 2))
    return replace(cfg, batch_tokens=cfg.micro_rows * cfg.context)


# ---- checks: each returns {name: figure}, or raises what is wrong --------------------------------


def machine(check):
    found = setup()
    return {"name": found.name, "torch": torch.__version__, "gpus": torch.cuda.device_count(),
            "python_h": Path(sysconfig.get_path("include"), "Python.h").is_file(),
            **{f"varlen_attention_{D}": takes_bounds(found.device, found.dtype, D)
               for D in (64, 128, 36)}}  # 36 is no multiple of 8: a mask is used


def agrees(check, stage, changed, reference):
    """Mean loss and gradient norm of three small steps with one and with other settings."""
    found = []
    for changes in (changed, reference):
        training = check.training(stage, small=True, **{"compile": False, **changes})
        training.take(range(3))
        total, taken = training.run.losses.tolist()
        found.append((total / max(1, taken), training.run.grad_norm.item()))
        training.loader.close()
    (loss, norm), (loss_, norm_) = found
    if not (abs(loss / loss_ - 1) < LOSS and abs(norm / norm_ - 1) < NORM):
        raise UserError(f"loss {loss:.5f}, norm {norm:.4f}; expected {loss_:.5f}, {norm_:.4f}")
    return {"loss": loss, "expected": loss_}


def eager_and_compiled(check):
    """Tokens per second and memory of a pretraining step in the config's size, both ways."""
    return {f"{name}_{figure}": value for name in ("eager", "compiled") for figure, value in
            bench.step_speed(check.training("pretrain", compile=name == "compiled"), 1).items()
            if figure in ("tok_per_s", "gpu_gb")}


def kernel(check, backend, masked=False):
    """One of PyTorch's attention kernels against fp32."""
    device = pick_device("auto")
    q, k, v = torch.randn(3, 2, 4, 256, 64, device=device, dtype=pick_dtype(device))
    mask = torch.ones(256, 256, device=device, dtype=torch.bool).tril() if masked else None
    with sdpa_kernel(backend if device.type == "cuda" else SDPBackend.MATH):
        found = attend(q, k, v, mask, causal=not masked)
    return compared(found, attend(q.float(), k.float(), v.float(), mask, causal=not masked))


def new_shapes(check):
    """Milliseconds of attention in lengths not seen before, as inference has them, with the
    setting of the stages and with cuDNN allowed, which plans each length."""
    device, found, lengths = pick_device("auto"), {}, itertools.count(65, 2)
    for name, allowed in (("ms", False), ("ms_with_cudnn", True)):
        cudnn_attention(device, allowed)
        seconds = []
        for _ in range(20):
            q, k, v = torch.randn(3, 2, 4, next(lengths), 64, device=device,
                                  dtype=pick_dtype(device))
            began = time.perf_counter()
            attend(q, k, v, causal=True).sum().item()
            seconds.append(time.perf_counter() - began)
        found[name] = 1e3 * statistics.median(seconds)
    cudnn_attention(device, False)
    if found["ms"] > max(10, 2 * found["ms_with_cudnn"]):
        raise UserError(f"{found['ms']:.0f} ms for each new length")
    return found


def compared(found, expected):
    error = ((found.float() - expected.float()).abs().max() / expected.abs().max()).item()
    if not error < LARGEST:
        raise UserError(f"results differ by {error:.1%} of the largest")
    return {"largest_error": error}


def graphs_and_eager(decoder, rows=8):
    """({name: seconds} of a decoding step by CUDA graphs and without, both results); decoder from
    for_decoding. Without a GPU both are without."""
    device, V = decoder.token_embedding.weight.device, decoder.config.vocab_size
    ids = torch.randint(V, (rows, 32), device=device)
    graphs, plain = (Decoding(decoder, rows) for _ in range(2))
    for decoding in (graphs, plain):
        decoding.prefill(decoder.token_embedding(ids))

    @torch.inference_mode()
    def eager():
        return plain._step(ids[:, 0], plain.cache.rows(0, rows))

    results = graphs.step(ids[:, 0]).clone(), eager()
    return in_turn({"graphs": lambda: graphs.step(ids[:, 0]).sum().item(),
                    "eager": lambda: eager().sum().item()}, 4 * REPEATS, WARM), results


def decoding(check):
    model = check.training("pretrain", compile=False).model
    seconds, results = graphs_and_eager(for_decoding(model))
    return compared(*results) | {f"{name}_steps_per_s": 1 / s for name, s in seconds.items()}


def processes(check):
    """A step of pretraining in every GPU's process: nccl, or gloo in a dry run."""
    n = torch.cuda.device_count() or 2
    cfg = check.training("pretrain").run.cfg
    cfg = replace(cfg, out="out/gpu_check", batch_tokens=n * cfg.batch_tokens)
    done = subprocess.run([
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}",
        "bench.py", f"{check.configs}/pretrain.py", "--steps=1",
        *(f"--{name}={value}" for name, value in asdict(cfg).items())],
        capture_output=True, text=True)
    if done.returncode:
        raise UserError(done.stderr)
    return json.loads(done.stdout[done.stdout.rindex("\n{"):])


SMALLER = "half of --micro_rows (CLIP: --micro_pairs) if memory is full; else --compile=False"
OTHER = "nothing: another kernel is used, and is slower"
CHECKS = {  # name: (function, arguments, what to set if it fails)
    "machine": (machine, (), "what the error says: PyTorch finds no GPU"),
    **{f"{stage} in fp32": (agrees, (stage, {}, {"precision": "fp32"}), "--precision=fp32")
       for stage in bench.STAGES},
    "compiled": (agrees, ("pretrain", {"compile": True}, {}), "--compile=False"),
    "flash attention": (kernel, (SDPBackend.FLASH_ATTENTION,), OTHER),
    "masked attention": (kernel, (SDPBackend.EFFICIENT_ATTENTION, True), "--precision=fp32"),
    "cuDNN attention": (kernel, (SDPBackend.CUDNN_ATTENTION,), OTHER),
    "new lengths": (new_shapes, (), "nothing: answers are slower in lengths not seen before"),
    "decoding": (decoding, (), "--device=cpu for sample.py and app.py"),
    **{f"{stage} step": (
        lambda check, stage: bench.step_speed(check.training(stage), 1), (stage,), SMALLER)
       for stage in bench.STAGES},
    "eager and compiled step": (eager_and_compiled, (), "--compile=False"),
    "processes": (processes, (), "NCCL_P2P_DISABLE=1 in the environment; NCCL_DEBUG=INFO explains")}


def main():
    check = parse(Config, usage="")
    older = torch.cuda.is_available() and pick_dtype(pick_device("auto")) != torch.bfloat16
    check.configs = check.configs or ("configs/t4" if older else "configs/full")
    if check.only:
        function, arguments, _ = CHECKS[check.only]
        return print("\n" + json.dumps(function(check, *arguments)))
    end, found = time.monotonic() + 60 * MINUTES, {}
    for name in CHECKS:
        if name != "processes" or check.dry_run or torch.cuda.device_count() > 1:
            print(f"{name} ...", flush=True)
            found[name] = in_process(check, name, min(SECONDS, end - time.monotonic()))
    Path(check.out).parent.mkdir(parents=True, exist_ok=True)
    Path(check.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, entry in found.items():
        figures = ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                            for key, value in entry.items())
        state, advice = ("FAILED", f"; set {CHECKS[name][2]}") if "error" in entry else ("ok", "")
        print(f"{state:6s} {name:24s} {figures}{advice}")


def in_process(check, name, seconds):
    """{name: figure} of a check, or {"error": why there are none}, and its seconds."""
    began = time.monotonic()
    flags = [f"--{key}={value}" for key, value in asdict(replace(check, only=name)).items()]
    try:
        done = subprocess.run([sys.executable, __file__, *flags],
                              capture_output=True, text=True, timeout=max(1, seconds))
        errors = [line for line in done.stderr.splitlines() if "rror" in line] or [done.stderr]
        found = ({"error": one_line(errors[-1])} if done.returncode else
                 json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        found = {"error": f"not done after {seconds:.0f} seconds"}
    return {**found, "seconds": round(time.monotonic() - began, 1)}


if __name__ == "__main__":
    run_main(main)
