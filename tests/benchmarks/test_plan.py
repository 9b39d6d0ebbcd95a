"""bench.py plan foretells the minutes of every stage; a step's arithmetic is counted as it runs."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, newest, run

from benchmarks import plan
from data import Batch
from model import GPT, GPTConfig
from train.flops import flop_counter

SIZES = {"pretrain": "n_layer = 1\nn_head = 2\nn_embd = 16\n", "sft": ""}


@pytest.fixture
def configs(tmp_path):
    for stage, sizes in SIZES.items():
        (tmp_path / f"{stage}.py").write_text(
            f"{sizes}context = 32\nbatch_tokens = 64\nmax_steps = 50\ndevice = 'cpu'\n")
    return tmp_path


def test_a_plan_names_every_stage_and_their_sum(configs):
    result = run("bench.py", "plan", str(configs), "--vocabulary=512")
    assert result.status == 0, result.err
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines] == ["pretrain", "sft", "all"]
    assert all("50 steps of" in line for line in lines[:2])


def test_a_machine_that_would_need_hours_is_told_what_to_do(configs, monkeypatch):
    monkeypatch.setattr(plan, "SLOW", 0.0)
    result = run("bench.py", "plan", str(configs), "--vocabulary=512")
    assert "STEPS=0.2" in result.out.splitlines()[-1]


def test_a_folder_without_configs_is_refused(tmp_path):
    assert str(tmp_path) in run("bench.py", "plan", str(tmp_path)).refusal


def test_the_demo_plans_all_its_stages():
    assert {path.stem for path in (ROOT / "configs/demo").glob("*.py")} == set(plan.STAGES)


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
