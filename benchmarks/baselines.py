"""Training steps of nanoGPT and of transformers beside ours: in one process, in turn, on models and
batches of the same size.

A "kind" is a function that builds a model and returns its training step, a function that waits for
the device.
"""

import functools
import gc
import importlib.util
import itertools
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import pretrain
from benchmarks import REPEATS, WARM, in_turn
from benchmarks.training import Training, build_model
from clip import normalise
from common import device as system
from common.config import UserError
from export.to_transformers import their_model
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
    system.reset_peak_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step()
    gpu, host = system.peak_memory_gb(device)
    del step
    gc.collect()
    return gpu if device.type == "cuda" else host


def our_step(training):
    """The next step of a training.Training. It includes preparing the data of the one after it, or
    the loader's thread would do that during the peer's step."""
    numbers = itertools.count()

    def step():
        training.take([next(numbers)])
        for batch in training.loader.ahead.values():
            batch.result()

    return step


# ---- nanoGPT ------------------------------------------------------------------------------------


def beside_nanogpt(path):
    """{name: figure} of our training step and that of nanoGPT's model.py at `path`, on the CPU.

    6 layers of width 256, 4 heads, 16 rows of 256 tokens, GPT-2's padded vocabulary, AdamW there
    and Muon here, gradients clipped. Ours runs in the processor's native precision; bf16 is
    measured only where it is native. Peak memory is measured with one model alone.
    """
    if not Path(path).is_file() or Path(path).suffix != ".py":
        raise UserError(f"--peer={path} is not a Python file; it should be nanoGPT's model.py, or "
                        "the word transformers")
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


# ---- transformers -------------------------------------------------------------------------------


def beside_transformers(cfg, stage, folder):
    """{name: figure} of our training step of a vision stage and that of transformers' LLaVA.

    In every step both models get the same chats and images in the same micro-batches and precision.
    Ours is packed, and its images are decoded during training; theirs are rows of one padded chat
    each, whose images are decoded before the clock starts: that is in their favour, and so are the
    fused AdamW and, in fp16, a loss that is not scaled.
    """
    example = Training(cfg, stage, folder)
    machine, tokenizer = example.run.machine, example.dataset.tokenizer
    steps = [[unpack(batch) for batch in example.loader.step(i)] for i in range(WARM + REPEATS)]
    del example

    def theirs():
        model = their_model(build_model(cfg, stage, folder, tokenizer), tokenizer)
        return llava_step(model.to(machine.device), cfg, machine, stage, steps)

    # transformers comes first, or its modules would not count in our peak memory.
    kinds = {"transformers": theirs, "ours": lambda: our_step(Training(cfg, stage, folder))}
    images = statistics.mean(len(pixels) for parts in steps for pixels, _ in parts)
    return {"stage": stage, **compare(kinds, machine, "img", images * len(steps[0]), kinds)}


def unpack(batch):
    """A packed data.Batch in the usual form, one chat per row, padded on the right: the pixels, and
    a dict of input_ids, attention_mask and labels, all (chats, longest)."""
    targets = torch.full_like(batch.ids, -100)
    targets.view(-1)[batch.where] = batch.targets
    lengths = batch.bounds.diff().tolist()  # of chats and of padding
    parts = (x.flatten().split(lengths) for x in (batch.segments, batch.ids, targets))
    chats, labels = [], []
    for segments, ids, wanted in zip(*parts, strict=True):
        if segments[0] > 0:
            chats.append(torch.cat((ids, wanted[-1:])))  # the last id is only a target
            labels.append(F.pad(wanted, (1, 0), value=-100))
    masks = [torch.ones_like(chat) for chat in chats]
    return batch.pixels, {
        "input_ids": pad_sequence(chats, batch_first=True),
        "attention_mask": pad_sequence(masks, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100)}


def llava_step(model, cfg, machine, stage, steps):
    """A step of a LlavaForConditionalGeneration on the unpacked micro-batches of the next of
    `steps`; it trains the same parts as ours, with our settings where both have them."""
    parts = model.train().requires_grad_(stage == "vision_sft").model
    parts.vision_tower.requires_grad_(False)
    parts.multi_modal_projector.requires_grad_(True)
    if cfg.compile:  # as ours are
        for layer in (*parts.vision_tower.encoder.layers, *parts.language_model.layers):
            layer.compile()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2),
                                  weight_decay=cfg.weight_decay, fused=True)
    todo = itertools.cycle(steps)

    def step():
        batches = next(todo)
        n_targets = sum(int((inputs["labels"] != -100).sum()) for _, inputs in batches)
        for pixels, inputs in batches:
            with machine.autocast():
                loss = model(**inputs, pixel_values=normalise(pixels), use_cache=False,
                             num_items_in_batch=n_targets).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()  # waits for the device

    return step
