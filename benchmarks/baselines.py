"""Training steps of nanoGPT and of transformers beside ours: in one process, in turn, on the same
numbers.

    python bench.py --peer=nanoGPT/model.py                                   # a decoder
    python bench.py configs/small/vision_pretrain.py --peer=transformers      # a vision model

A "kind" is a function that builds a model and returns `prepare(i)`, which returns step i as a
function; only that function, which waits for the device, is timed.
"""

import gc
import importlib.util
import statistics
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks import REPEATS, WARM, in_turn
from clip import normalise
from common import device as system
from common.config import TrainSettings, UserError
from data import Batch
from export.to_transformers import llava_config
from model import GPT, GPTConfig
from train.optim import make_optimizer


def measure(kinds, device, alone, warm):
    """({name: seconds of each repeat}, {name: peak memory in GB, of the names in `alone`})."""
    peaks = {name: peak_gb(kinds[name], device) for name in alone}
    return in_turn({name: make() for name, make in kinds.items()}, REPEATS, warm), peaks


def peak_gb(make, device):
    """Peak memory of a model's second step with no other model in memory: the GPU's, or the
    process's on a CPU."""
    prepare = make()
    prepare(0)()
    gc.collect()
    system.release_free_memory()
    system.reset_peak_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    prepare(1)()
    gpu, host = system.peak_memory_gb(device)
    del prepare
    gc.collect()
    return gpu if device.type == "cuda" else host


def compared(seconds, peaks, unit, amounts):
    """{name: figure}: rates and peak memory of all kinds, and ours in relation to the others.

    amounts: how many `unit` each repeat handles.
    """
    rates = {name: statistics.median(n / s for n, s in zip(amounts, times, strict=True))
             for name, times in seconds.items()}
    return {**{f"{name}_{unit}_per_s": rate for name, rate in rates.items()},
            **{f"{name}_peak_gb": peak for name, peak in peaks.items()},
            **{f"times_{name}": rates["ours"] / rate for name, rate in rates.items()},
            **{f"memory_of_{name}": peaks["ours"] / peak for name, peak in peaks.items()}}


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
    machine, ids = system.setup("cpu"), torch.randint(50257, (16, 257))
    kinds = {"ours": lambda: our_text_step(machine, ids),
             "eager": lambda: nanogpt_step(path, ids, compiled=False, bf16=False),
             "compiled": lambda: nanogpt_step(path, ids, compiled=True, bf16=False)}
    if machine.dtype == torch.bfloat16:
        kinds["compiled_bf16"] = lambda: nanogpt_step(path, ids, compiled=True, bf16=True)
    seconds, peaks = measure(kinds, machine.device, ("ours", "eager"), warm=1)
    return {"machine": machine.name, "precision": system.precision_name(machine.dtype),
            **compared(seconds, peaks, "tok", [16 * 256] * REPEATS)}


def our_text_step(machine, ids):
    model, batch = GPT(GPTConfig(50304, 6, 4, 256, 256)), Batch(ids[:, :-1], ids[:, 1:])
    optimizer = make_optimizer(model, TrainSettings())

    def loss():
        with machine.autocast():
            return model(batch) / batch.targets.numel()

    return text_step(model, loss, lambda: optimizer.step(torch.tensor(False)), optimizer.zero_grad)


def nanogpt_step(path, ids, compiled, bf16):
    spec = importlib.util.spec_from_file_location("peer", path)
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    model = peer.GPT(peer.GPTConfig(block_size=256, vocab_size=50304, n_layer=6, n_head=4,
                                    n_embd=256, dropout=0.0, bias=False))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    net = torch.compile(model) if compiled else model
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def loss():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            return net(x, y)[1]

    return text_step(model, loss, optimizer.step, optimizer.zero_grad)


def text_step(model, loss, update, zero_grad):
    def step():
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update()
        zero_grad()

    return lambda i: step


# ---- transformers -------------------------------------------------------------------------------


def beside_transformers(make_ours):
    """{name: figure} of our training step of a vision stage and that of transformers' LLaVA.

    make_ours() is a training.Training. In every step both models get the same chats and images in
    the same micro-batches and precision. Ours is packed, and its images are decoded during
    training; theirs are rows of one padded chat each, with pixel_values prepared before the clock
    starts: that is in their favour, and so is the fused AdamW.
    """
    load_transformers()  # before any memory is measured
    example = make_ours()
    cfg, machine, stage = example.run.cfg, example.run.machine, example.run.stage
    if machine.ranks > 1:
        raise UserError("--peer is measured in one process; start it without torchrun")
    configs = example.model.config, example.model.clip_config
    image_id = example.dataset.tokenizer.image
    steps = [[unpack(batch) for batch in example.loader.step(i)] for i in range(WARM + REPEATS)]
    ours_positions = example.per_step
    del example

    def make_theirs():
        model = llava_of(*configs, image_id, stage)
        return llava_step(model.to(machine.device).train(), cfg, machine, steps)

    kinds = {"ours": lambda: our_packed_step(make_ours()), "transformers": make_theirs}
    seconds, peaks = measure(kinds, machine.device, list(kinds), WARM)
    images = [sum(len(part["pixels"]) for part in parts) for parts in steps]
    positions = [sum(part["input_ids"].numel() for part in parts) for parts in steps]
    return {"stage": stage, "machine": machine.name,
            "precision": system.precision_name(machine.dtype),
            "img_per_step": statistics.mean(images), "ours_positions": ours_positions,
            "transformers_positions": statistics.mean(positions),
            **compared(seconds, peaks, "img", images[WARM:])}


def our_packed_step(training):
    """prepare(i) of a training.Training. A step includes preparing the next step's data, or the
    loader's thread would decode them during the peer's step."""

    def step(i):
        training.take([i])
        for batch in training.loader.ahead.values():
            batch.result()

    return lambda i: lambda: step(i)


def load_transformers():
    try:
        import transformers
    except ImportError:
        raise UserError("--peer=transformers needs that package: "
                        "pip install -r requirements-dev.txt") from None
    return transformers


def llava_of(decoder, clip, image_id, stage):
    """`LlavaForConditionalGeneration` with the sizes of our two configs and initial weights, of
    which `stage` trains the projector, in vision_sft also the decoder."""
    model = load_transformers().LlavaForConditionalGeneration._from_config(
        llava_config(decoder, clip, image_id), attn_implementation="sdpa")
    model.requires_grad_(stage == "vision_sft")
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model


def unpack(batch):
    """A packed data.Batch in the usual form: one chat per row, padded on the right.

    Returns input_ids, attention_mask and labels, all (chats, longest), and the uint8 pixels.
    """
    targets = torch.full_like(batch.ids, -100)
    targets.view(-1)[batch.where] = batch.targets
    chats, labels = [], []
    for ids, wanted, segments in zip(batch.ids, targets, batch.segments, strict=True):
        for number in range(1, int(segments.max()) + 1):
            here = segments == number
            chats.append(torch.cat((ids[here], wanted[here][-1:])))  # the last id is only a target
            labels.append(torch.cat((wanted.new_full((1,), -100), wanted[here])))
    masks = [torch.ones_like(chat) for chat in chats]
    return {"input_ids": pad_sequence(chats, batch_first=True),
            "attention_mask": pad_sequence(masks, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "pixels": batch.pixels}


def llava_step(model, cfg, machine, steps):
    """prepare(i) for the unpacked micro-batches in steps[i], with our settings where both models
    have them."""
    if cfg.compile:
        for layer in (*model.model.vision_tower.encoder.layers, *model.model.language_model.layers):
            layer.repeated = True  # compiled as ours are
        system.compile_blocks(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2),
                                  weight_decay=cfg.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)

    def prepare(i):
        ready = [{"pixel_values": normalise(part["pixels"]),
                  **{name: part[name] for name in ("input_ids", "attention_mask", "labels")}}
                 for part in steps[i]]
        n_targets = sum(int((part["labels"] != -100).sum()) for part in ready)

        def step():
            for part in ready:
                with machine.autocast():
                    loss = model(**part, num_items_in_batch=n_targets, use_cache=False).loss
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained, cfg.grad_clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()  # waits for the device

        return step

    return prepare
