"""Every stage of a folder of configs on the GPU of simulated_gpu.py, Hopper (9.0) or Turing (7.5):
trains, evaluates, saves, resumes, decodes and serves. Prints what was counted as JSON.

    python experiments/simulated_steps.py configs/full 9.0 TOKENIZER OUT   # two folders
"""

# ruff: noqa: I001
import contextlib
import dataclasses
import gc
import json
import sys
import traceback
from pathlib import Path
from unittest import mock

from simulated_gpu import CAPTURED, WATCH, Kernels, simulate, torch  # first: it loads the device
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.training import (
    STAGES,
    Training,
    build_model,
    training_data,
    random_tokenizer,
    settings_of,
)
from common.device import precision_name
from evals.image_ablation import ImageAblation
from evals.zero_shot import features_of
from experiments.gpu_check import one_micro_batch, small_settings
from inference.conversation import Conversation, decoder_of, ready_to_chat
from inference.engine import Engine, Request
from inference.generate import Decoding, Sampler, Sampling, pick
from tokenizer import load
from train.loader import validation_loss
from train.optim import make_optimizer
from train.run import Run
from vision import describe

def one_step(folder, stage, tokenizer):
    """{name: figure} of the first step in the config's size, of one micro-batch (CLIP: two)."""
    cfg = one_micro_batch(settings_of(folder, stage))
    training = training_of(cfg, stage, folder, tokenizer)
    gc.collect()
    WATCH.restart()
    with WATCH.waiting(False):
        training.step(0)
    return dict(operations=WATCH.operations.total(), traffic_gb=WATCH.traffic / 1e9,
                peak_gb=WATCH.peak / 1e9, precision=precision_name(training.run.machine.dtype))


def training_of(cfg, stage, folder, tokenizer, settings=settings_of):
    cfg = dataclasses.replace(cfg, compile=False, device="cuda:0", **(
        dict(workers=0) if hasattr(cfg, "workers") else {}))
    return Training(cfg, stage, folder, tokenizer, settings)


def evaluate(training, cfg, stage):
    machine, model, data = training.run.machine, training.model, training.dataset
    if stage == "clip_pretrain":
        features_of(model, data, machine, 8)
    elif stage.startswith("vision"):
        ImageAblation(data.sources[0], 16, cfg.context, data.tokenizer,
                      model.image_spec).losses(machine, model, cfg.micro_rows)
    else:
        validation_loss(machine, data, cfg.micro_rows, model, cfg.micro_rows)


def save_and_resume(folder, stage, tokenizer, out):
    """A small run of the stage is evaluated and saved after its first step, and resumed."""
    training = training_of(small_settings(folder, stage), stage, folder, tokenizer, small_settings)
    training.run.folder = out / stage
    training.run.folder.mkdir()
    training.step(0)
    evaluate(training, training.run.cfg, stage)
    run = training.run
    run.info, run.metrics["seconds"] = {**describe(training.model), "lineage": []}, 1.0
    run.save(0)
    run.end_saving()
    again = Run(dataclasses.replace(run.cfg, resume=True, out=str(out / stage)), stage)
    model = build_model(again.cfg, stage, folder, tokenizer, small_settings).to(again.device)
    again.start(model, make_optimizer(model, again.cfg), tokenizer, describe(model))
    assert again.first_step == 1
    return model


def decode_step(folder, stage, tokenizer, rows=8):
    """{name: figure} of decoding one token for each of 8 rows, in the config's size."""
    model = build_model(settings_of(folder, stage), stage, folder, tokenizer).to("cuda:0")
    decoder = decoder_of(ready_to_chat(model))
    decoding = Decoding(decoder, rows)
    with torch.inference_mode():
        x = decoder.token_embedding(torch.zeros(rows, 12, dtype=torch.long, device="cuda:0"))
        logits = decoding.prefill(x, lengths=[12, 5] * (rows // 2))
        token = pick(logits, 1.0, 5, 0.9)
        assert decoding.prefill(x[:1], 1).shape == logits[:1].shape
        WATCH.restart()
        assert decoding.step(token).dtype == decoder.head.weight.dtype
    return dict(decoding_operations=WATCH.operations.total())


def serve(model, tokenizer):
    """Answers of the page's engine to two users, on the second GPU."""
    model = ready_to_chat(model.to("cuda:1"))
    CAPTURED.clear()
    with mock.patch("threading.Thread.start"):  # fake tensors belong to this thread
        serving, sent = Engine(model, rows=2), []
    (device,), (mode,) = map(set, zip(*CAPTURED, strict=True))
    n_prepared = len(CAPTURED)
    for temperature in (0.0, 1.0):
        conversation = Conversation(model, tokenizer)
        conversation.add_question("What is it?")
        ids = conversation.ids()
        sampler = Sampler(Sampling(temperature=temperature, top_k=5), serving.decoding.device)
        serving.waiting.put(Request(conversation, sampler, sent.append, ids, len(ids) + 4))
        serving._admit()
    while serving.active:
        serving._step()
    assert sent.count(None) == 2, sent
    return dict(device=device, mode=mode, slots=list(serving.decoding.graphs),
                later=len(CAPTURED) - n_prepared)


def main(folder, capability, vocabulary, out):
    simulate(tuple(map(int, capability.split("."))))
    training_data.__defaults__ = (1024,)  # chats: as many as fill the rows of a few steps
    found, tokenizer = {}, load(vocabulary)
    large = random_tokenizer()
    with FakeTensorMode(allow_non_fake_inputs=True), Kernels(), WATCH:
        for stage in STAGES:
            found[stage] = entry = {}
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    entry["figures"] = one_step(folder, stage, large)
                    model = save_and_resume(folder, stage, tokenizer, Path(out))
                    if stage != "clip_pretrain":
                        entry["served"] = serve(model, tokenizer)
                    if stage == "vision_sft":
                        entry["figures"] |= decode_step(folder, stage, large)
            except Exception:
                entry["error"] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
