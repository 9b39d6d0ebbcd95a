"""Training steps of nanoGPT beside ours: in one process, in turn, on models and batches of the same
size. experiments/llava_speed.py compares with transformers' LLaVA in the same way.

    python experiments/nanogpt_speed.py nanoGPT/model.py

A "kind" is a function that builds a model and returns its training step, a function that waits for
the device.
"""

import contextlib
import functools
import gc
import importlib.util
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import pretrain
from bench import show
from benchmarks import REPEATS, WARM
from benchmarks.training import Training
from common import device as system
from common.config import UserError, run_main
from experiments.in_turn import in_turn
from tokenizer import gpt2


def compare(kinds, machine, unit, per_step, alone):
    """{name: figure}: rates of all kinds, peak memory of those in `alone`, and ours in relation to
    the others. per_step: how many `unit` a step handles."""
    peaks = {name: peak_gb(kinds[name], machine.device) for name in alone}
    seconds = in_turn({name: make() for name, make in kinds.items()}, REPEATS, WARM)
    return {"machine": machine.name, "precision": system.precision_name(machine.dtype),
            **{f"{name}_{unit}_per_s": per_step / median for name, median in seconds.items()},
            **{f"{name}_peak_gb": peak for name, peak in peaks.items()},
            **{f"times_{name}": median / seconds["ours"] for name, median in seconds.items()},
            **{f"memory_of_{name}": peaks["ours"] / peak for name, peak in peaks.items()}}


def peak_gb(make, device):
    """Peak memory of a model's second step with no other model in memory: the GPU's, or the
    process's on a CPU."""
    step = make()
    step()
    gc.collect()
    system.release_free_memory()
    reset_peak_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step()
    gpu, host = system.peak_memory_gb(device)
    del step
    gc.collect()
    return gpu if device.type == "cuda" else host


def reset_peak_memory():
    """Restart the host's count of peak memory, where the system allows it (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def our_step(training):
    """The next step of a training.Training. It includes preparing the data of the one after it, or
    the loader's thread would do that during the peer's step."""
    numbers = itertools.count()

    def step():
        training.take([next(numbers)])
        for batch in training.loader.ahead.values():
            batch.result()

    return step


def beside_nanogpt(path):
    """{name: figure} of our training step and that of nanoGPT's model.py at `path`, on the CPU.

    6 layers of width 256, 4 heads, 16 rows of 256 tokens, GPT-2's padded vocabulary, AdamW there
    and Muon here, gradients clipped. Ours runs in the processor's native precision; bf16 is
    measured only where it is native. Peak memory is measured with one model alone.
    """
    if not Path(path).is_file() or Path(path).suffix != ".py":
        raise UserError(f"{path or 'nothing'} is not a Python file; name nanoGPT's model.py")
    machine = system.setup("cpu")
    cfg = pretrain.Config(n_layer=6, n_head=4, n_embd=256, max_positions=256, context=256,
                          batch_tokens=16 * 256, micro_rows=16, device="cpu")
    nanogpt = functools.partial(nanogpt_step, path, torch.randint(50257, (16, 257)))
    kinds = {"ours": lambda: our_step(Training(cfg, "pretrain", Path(), gpt2())),
             "eager": nanogpt, "compiled": functools.partial(nanogpt, compiled=True)}
    if machine.dtype == torch.bfloat16:
        kinds["compiled_bf16"] = functools.partial(nanogpt, compiled=True, bf16=True)
    return compare(kinds, machine, "tok", cfg.batch_tokens, ("ours", "eager"))


def nanogpt_step(path, ids, compiled=False, bf16=False):
    """A step of nanoGPT's model on ids (B, T + 1)."""
    spec = importlib.util.spec_from_file_location("peer", path)
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    model = peer.GPT(peer.GPTConfig(block_size=256, vocab_size=50304, n_layer=6, n_head=4,
                                    n_embd=256, dropout=0.0, bias=False))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    net = torch.compile(model) if compiled else model
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = net(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    run_main(lambda: show(beside_nanogpt("".join(sys.argv[1:2]))))
