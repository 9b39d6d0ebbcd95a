"""train/optim.py: Muon is PyTorch's Muon, skipped steps change nothing, which weight goes where."""

import copy

import pytest
import torch
from torch import nn

from common.config import TrainSettings, UserError
from model import GPT, GPTConfig
from train.optim import Muon, lr_factor, make_optimizer, orthogonalise

SMALL = GPTConfig(vocab_size=64, n_layer=2, n_head=2, n_embd=32, max_positions=16)
TAKE, SKIP = torch.tensor(False), torch.tensor(True)


def set_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def trained(optimizer, steps, state=None, bad_step=None):
    """(model, Optimizers) after some steps with random gradients, from a state if there is one."""
    torch.manual_seed(0)
    model = GPT(SMALL)
    optimizers = make_optimizer(model, TrainSettings(optimizer=optimizer))
    if state:
        optimizers.load_state_dict(state)
    for step in range(steps):
        if step == bad_step:
            for p in model.parameters():
                p.grad = torch.full_like(p, float("nan"))
            optimizers.step(skip=SKIP)
        set_gradients(model.parameters(), step)
        optimizers.step(skip=TAKE)
    return model, optimizers


def test_muon_equals_pytorchs():
    def matrices():
        generator = torch.Generator().manual_seed(0)
        return [nn.Parameter(torch.randn(shape, generator=generator))
                for shape in ((16, 48), (48, 16), (48, 16))]

    start, ours, theirs = matrices(), matrices(), matrices()
    ours[2].stacked = 3
    parts = [nn.Parameter(part.clone()) for part in theirs[2].data.chunk(3)]
    muon = Muon(ours, lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon([*theirs[:2], *parts], lr=0.02, weight_decay=0.1,
                                 adjust_lr_fn="original")
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        for part, grad in zip(parts, theirs[2].grad.chunk(3), strict=True):
            part.grad = grad
        muon.step()
        reference.step()
    for before, a, b in zip(start, ours, [*theirs[:2], torch.cat(parts)], strict=True):
        assert (a - b).norm() < 0.03 * (b - before).norm()  # PyTorch's multiplies in bf16


@pytest.mark.parametrize(("dtype", "tolerance"), [
    (torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.003)], ids=str)
@pytest.mark.parametrize("shape", [(3, 48, 48), (2, 64, 16), (2, 16, 64)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])  # fp16 holds 65504 at most
def test_orthogonalise_brings_singular_values_near_one(dtype, tolerance, shape, scale):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
    found = orthogonalise(matrices, dtype)
    assert found.dtype == dtype and found.shape == shape
    exact = orthogonalise(matrices.double(), torch.float64)
    assert (found - exact).norm() < tolerance * exact.norm()
    before = torch.linalg.svdvals(matrices / scale)
    values = torch.linalg.svdvals(found.double())
    assert (values[before > 0.1 * before.amax()] - 1).abs().max() < 0.35


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_skipped_steps_leave_no_trace_and_a_loaded_state_continues_exactly(optimizer):
    model, optimizers = trained(optimizer, 3)
    assert all(map(torch.equal, model.parameters(),
                   trained(optimizer, 3, bad_step=2)[0].parameters()))
    other, loaded = trained(optimizer, 0, copy.deepcopy(optimizers.state_dict()))
    other.load_state_dict(model.state_dict())
    for network, steps in ((model, optimizers), (other, loaded)):
        set_gradients(network.parameters(), 9)
        steps.step(skip=TAKE)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_state_of_another_optimizer_is_refused_and_new_settings_hold():
    def optimizers(**settings):
        return make_optimizer(GPT(SMALL), TrainSettings(**settings))

    state = optimizers().state_dict()
    for other in ({"optimizer": "adamw"}, {"optimizer": "adamw", "decay": "all"}):
        with pytest.raises(UserError, match="--optimizer"):
            optimizers(**other).load_state_dict(state)
    changed = optimizers(weight_decay=0.7, muon_lr=0.5)
    changed.load_state_dict(state)
    assert changed.members[0].param_groups[0]["weight_decay"] == 0.7
    assert changed.members[0].param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(("settings", "matrix", "head", "rest"), [
    ({}, ("Muon", 0.3), ("AdamW", 0.3), ("AdamW", 0.0)),
    ({"optimizer": "adamw"}, ("AdamW", 0.3), ("AdamW", 0.3), ("AdamW", 0.0)),
    ({"optimizer": "adamw", "decay": "all"}, *[("AdamW", 0.3)] * 3)])
def test_optimizer_and_weight_decay_of_every_weight(settings, matrix, head, rest):
    model = GPT(SMALL)
    names = {p: name for name, p in model.named_parameters()}
    optimizers = make_optimizer(model, TrainSettings(weight_decay=0.3, **settings))
    found = {names[p]: (type(member).__name__, group["weight_decay"])
             for member in optimizers.members for group in member.param_groups
             for p in group["params"]}
    assert found.keys() == set(names.values())
    for name, value in found.items():
        if name == "head.weight":
            assert value == head
        elif name.startswith("blocks") and "norm" not in name and name.endswith("weight"):
            assert value == matrix
        else:
            assert value == rest


def test_the_learning_rate_warms_up_stays_and_decays():
    cfg = TrainSettings(max_steps=100, warmup=0.1, cooldown=0.4, final_lr=0.1)
    factors = [lr_factor(cfg, step) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10:61] == [1.0] * 51
    assert factors[80] == pytest.approx(0.55) and factors[100] == pytest.approx(0.1)
    assert sorted(factors[60:], reverse=True) == factors[60:]
    cfg = TrainSettings(max_steps=35_000, schedule="cosine", warmup=0.0285714, cooldown=0.9714286,
                        final_lr=0.1)  # nanoGPT's
    expected = {500: 0.5, 1000: 1.0, 18_000: 0.55, 34_999: 0.1}
    assert {step: lr_factor(cfg, step) for step in expected} == pytest.approx(expected, abs=1e-3)
