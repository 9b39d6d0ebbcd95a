"""A training step of a vision stage and that of transformers' LLaVA, in turn in one process.

    python experiments/llava_speed.py configs/small/vision_pretrain.py [--name=value ...]
"""

import itertools
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import read_config, show
from benchmarks import REPEATS, WARM
from benchmarks.training import STAGES, Training, build_model
from clip import normalise
from common.config import run_main
from experiments.nanogpt_speed import compare, our_step
from export.to_transformers import their_model


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


if __name__ == "__main__":
    run_main(lambda: show(beside_transformers(*read_config(sys.argv[1:], STAGES[3:]))))
