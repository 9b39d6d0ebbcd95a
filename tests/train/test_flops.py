"""The floating-point operations of a step are counted while it runs."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import newest

from data import Batch
from model import GPT, GPTConfig
from train.flops import flop_counter


def test_products_are_counted_forward_and_backward():
    x = torch.randn(8, 16, requires_grad=True)
    weight = torch.randn(32, 16, requires_grad=True)
    with flop_counter() as counter:
        F.linear(x, weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 8 * 16 * 32
    with flop_counter() as counter:
        torch.zeros(8, 32).addmm_(x.detach(), weight.detach().T)
    assert counter.get_total_flops() == 2 * 8 * 16 * 32


@pytest.mark.parametrize("grad", [False, True])
def test_fused_attention_on_a_cpu_is_counted(grad):
    q = torch.randn(2, 4, 300, 16, requires_grad=grad)  # B, H, T, D
    with flop_counter() as counter:
        y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        if grad:
            y.sum().backward()
    product = 2 * 2 * 4 * 300 * 300 * 16
    assert counter.get_total_flops() == (2 + 5 * grad) * product  # backward makes the scores again


def test_the_loss_counts_only_supervised_positions():
    model = GPT(GPTConfig(64, 1, 2, 16, 32))
    ids = torch.randint(64, (2, 32))
    counts = []
    for where in torch.arange(4), torch.arange(64):
        with flop_counter() as counter:
            model(Batch(ids, ids.flatten()[where], where)).backward()
        counts.append(counter.get_total_flops())
    head = 3 * 2 * 60 * 16 * 64  # of the 60 positions more: logits and both gradients
    sums = 2 * 60 * 64  # of their probabilities
    assert counts[1] - counts[0] == pytest.approx(head, abs=sums)


def test_a_checkpoint_says_what_the_run_computed(pipeline, tmp_path):
    info = json.loads((newest(pipeline.folder / "pretrain") / "config.json").read_text())
    tflop, steps = info["metrics"]["tflop"], info["step"]
    tokens = info["settings"]["batch_tokens"] * steps
    formula = GPT(GPTConfig(**info["decoder"])).flops_per_token(info["settings"]["context"])
    assert tflop * 1e12 == pytest.approx(tokens * formula, rel=0.4)  # and the optimizer's products
    shutil.copytree(pipeline.folder / "pretrain", tmp_path / "again")
    pipeline.run_stage("pretrain", tmp_path / "again", f"--max_steps={steps + 2}")
    again = json.loads((newest(tmp_path / "again") / "config.json").read_text())
    assert again["metrics"]["tflop"] == pytest.approx(tflop * (steps + 2) / steps)
