"""The formulas of floating-point operations against PyTorch's counter."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import STAGES, TINY, newest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarks.training import build_model, settings_of, training_data
from clip import contrast, normalise
from data import Batch, Documents
from model import GPT, GPTConfig
from tokenizer import Tokenizer
from train.packing import Packed

aten = torch.ops.aten
SAME_COST = {  # operations that PyTorch 2.13 does not count: others with as many FLOP
    aten.addmm_: aten.addmm,
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        aten._scaled_dot_product_flash_attention_backward,
}


def counted(model, batch):
    """FLOP of a forward and backward pass; attention written out, which computes nothing twice."""
    for missing, known in SAME_COST.items():
        flop_registry.setdefault(missing, flop_registry[known])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(batch) if batch.keys is None else contrast(
            *model(normalise(batch.pixels), batch.ids), batch.keys)
        loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("stage", STAGES)
def test_the_flops_of_every_stage_are_those_that_run(stage, tmp_path):
    """Half the positions are supervised, and the head is the larger part of the decoder."""
    for name, flags in TINY.items():
        more = ["n_embd = 512", "n_layer = 1"] if name == "pretrain" else []
        (tmp_path / f"{name}.py").write_text("\n".join([flag[2:] for flag in flags] + more))
    tokenizer, cfg = Tokenizer("random", None, None, 8000, ""), settings_of(tmp_path, stage)
    cfg.out = tmp_path
    model = build_model(cfg, stage, tmp_path, tokenizer).train()
    batch = training_data(cfg, stage, model, tokenizer).batch(range(8))
    assert model.flops(batch) == pytest.approx(counted(model, batch), rel=0.02)


def test_attention_is_counted_within_documents(tmp_path):
    np.save(tmp_path / "train.npy", np.arange(16 * 40 + 1, dtype=np.uint16) % 60)
    tokenizer = Tokenizer("random", None, None, 60, "")
    model = GPT(GPTConfig(tokenizer.n_vocab, 1, 2, 32, 256))
    batch = Packed([Documents(tmp_path, "train", 16, tokenizer)], 256, tokenizer).batch([0])
    assert batch.attended == 16 * 16**2  # a fraction of 256^2, which is half of all the rest
    assert model.flops(batch) == pytest.approx(counted(model, batch), rel=0.02)


def test_a_checkpoint_says_what_the_run_computed(pipeline, tmp_path):
    info = json.loads((newest(pipeline.folder / "pretrain") / "config.json").read_text())
    tflop, steps, cfg = info["metrics"]["tflop"], info["step"], info["settings"]
    ids = torch.zeros(cfg["batch_tokens"] // cfg["context"] * steps, cfg["context"])
    formula = GPT(GPTConfig(**info["decoder"])).flops(Batch(ids, ids))
    assert tflop * 1e12 == pytest.approx(formula)
    shutil.copytree(pipeline.folder / "pretrain", tmp_path / "again")
    pipeline.run_stage("pretrain", tmp_path / "again", f"--max_steps={steps + 2}")
    again = json.loads((newest(tmp_path / "again") / "config.json").read_text())
    assert again["metrics"]["tflop"] == pytest.approx(tflop * (steps + 2) / steps)
