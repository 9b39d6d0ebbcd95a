"""The claims of train/optim.py: Muon is Muon, bad steps change nothing, and who gets what."""

import itertools

import pytest
import torch
from torch import nn

from common.config import TrainSettings, UserError
from common.device import pick_dtype
from model import GPT, GPTConfig
from train.optim import Muon, lr_factor, make_optimizer, orthogonalise

SMALL = GPTConfig(vocab_size=64, n_layer=2, n_head=2, n_embd=32, max_positions=16)


def matrices(seed=0):
    """Three parameters: wide, tall, and three matrices one above the other."""
    generator = torch.Generator().manual_seed(seed)
    found = [nn.Parameter(torch.randn(shape, generator=generator))
             for shape in ((16, 48), (48, 16), (48, 16))]
    found[2].stacked = 3
    return found


def gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def test_muon_is_the_muon_of_pytorch():
    ours, theirs = matrices(), matrices()
    parts = [nn.Parameter(part.clone()) for part in theirs[2].data.chunk(3)]
    mine = Muon(ours, lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon([*theirs[:2], *parts], lr=0.02, weight_decay=0.1,
                                 adjust_lr_fn="original")
    for step in range(4):
        gradients(ours, step)
        gradients(theirs, step)
        for part, grad in zip(parts, theirs[2].grad.chunk(3), strict=True):
            part.grad = grad
        mine.step()
        reference.step()
    for start, a, b in zip(matrices(), ours, [*theirs[:2], torch.cat(parts)], strict=True):
        assert (a - b).norm() < 0.03 * (b - start).norm()  # that one multiplies in bf16


@pytest.mark.parametrize(("dtype", "most"), [
    (torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.003)], ids=str)
@pytest.mark.parametrize("shape", [(3, 48, 48), (2, 64, 16), (2, 16, 64)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])  # fp16 holds 65504 at most
def test_orthogonalise_brings_singular_values_near_one_in_every_type(dtype, most, shape, scale):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
    found = orthogonalise(matrices, dtype)
    assert found.dtype == dtype and found.shape == shape
    exact = orthogonalise(matrices.double(), torch.float64)
    assert (found - exact).norm() < most * exact.norm()
    largest = torch.linalg.svdvals(matrices / scale)
    values = torch.linalg.svdvals(found.double())
    assert (values[largest > 0.1 * largest.amax()] - 1).abs().max() < 0.35


def test_muon_multiplies_in_the_type_of_the_processor_or_that_it_is_given():
    optimizers = make_optimizer(GPT(SMALL), TrainSettings())
    assert optimizers.dtype == pick_dtype(torch.device("cpu"))
    optimizers.dtype = torch.float16
    assert optimizers.members[0].dtype == torch.float16
    assert make_optimizer(GPT(SMALL), TrainSettings(optimizer="adamw")).dtype == torch.float32


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_with_a_bad_gradient_leaves_no_trace(optimizer):
    def train(bad_at):
        torch.manual_seed(0)
        model = GPT(SMALL)
        optimizers = make_optimizer(model, TrainSettings(optimizer=optimizer))
        for step in range(5):
            if step == bad_at:
                for p in model.parameters():
                    p.grad = torch.full_like(p, float("nan"))
                optimizers.step(skip=torch.tensor(True))
            gradients(model.parameters(), step)
            optimizers.step(skip=torch.tensor(False))
        return model.state_dict()

    undisturbed, disturbed = train(None), train(2)
    assert all(torch.equal(undisturbed[name], disturbed[name]) for name in undisturbed)


def rows_of(state, start, end):
    """A state dict as the process would write it that keeps the rows from start to end."""
    return {"members": [
        {**member, "state": {i: {name: value[start:end] if value.ndim else value
                                 for name, value in entry.items()}
                             for i, entry in member["state"].items()}}
        for member in state["members"]]}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("cuts", [[0, None], [0, 7, None], [0, 40, 41, 100, None]])
def test_the_state_is_taken_from_however_many_shards(optimizer, cuts):
    """The later ones may have no row of a small weight."""
    def trained(steps, states=None):
        torch.manual_seed(0)
        model = GPT(SMALL)
        optimizers = make_optimizer(model, TrainSettings(optimizer=optimizer))
        if states:
            optimizers.load_state_dict(states)
        for step in range(steps):
            gradients(model.parameters(), step)
            optimizers.step(skip=torch.tensor(False))
        return optimizers.state_dict()

    state = trained(3)
    shards = [rows_of(state, *part) for part in itertools.pairwise(cuts)]
    found = trained(0, shards)
    for one, other in zip(state["members"], found["members"], strict=True):
        assert one["state"].keys() == other["state"].keys()
        for i, entry in one["state"].items():
            assert all(torch.equal(value, other["state"][i][n]) for n, value in entry.items())


def test_the_state_of_another_optimizer_is_refused_and_new_settings_hold():
    def optimizers(**settings):
        return make_optimizer(GPT(SMALL), TrainSettings(**settings))

    state = optimizers().state_dict()
    for other in ({"optimizer": "adamw"}, {"optimizer": "adamw", "decay": "all"}):
        with pytest.raises(UserError, match="--optimizer as it was"):
            optimizers(**other).load_state_dict([state])
    changed = optimizers(weight_decay=0.7, muon_lr=0.5)
    changed.load_state_dict([state])
    assert changed.members[0].param_groups[0]["weight_decay"] == 0.7
    assert changed.members[0].param_groups[0]["lr"] == 0.5


def shares(**settings):
    """{name of a parameter: (optimizer, weight decay)} for a decoder."""
    model = GPT(SMALL)
    names = {p: name for name, p in model.named_parameters()}
    optimizers = make_optimizer(model, TrainSettings(weight_decay=0.3, **settings))
    return {names[p]: (type(member).__name__, group["weight_decay"])
            for member in optimizers.members for group in member.param_groups
            for p in group["params"]}


def test_muon_has_the_blocks_matrices_and_adamw_the_rest():
    found = shares()
    assert found.keys() == dict(GPT(SMALL).named_parameters()).keys()
    for name, share in found.items():
        if name == "head.weight":
            assert share == ("AdamW", 0.3)
        elif name.startswith("blocks") and "norm" not in name and name.endswith("weight"):
            assert share == ("Muon", 0.3)
        else:
            assert share == ("AdamW", 0.0)


def test_the_reference_recipe_is_one_group():
    assert set(shares(optimizer="adamw", decay="all").values()) == {("AdamW", 0.3)}


def test_adamw_decays_matrices_alone():
    found = shares(optimizer="adamw")
    assert found["blocks.0.mlp.up.weight"] == found["head.weight"] == ("AdamW", 0.3)
    assert found["token_embedding.weight"] == found["final_norm.weight"] == ("AdamW", 0.0)


def test_the_learning_rate_rises_stays_and_comes_down():
    cfg = TrainSettings(max_steps=100, warmup=0.1, cooldown=0.4, final_lr=0.1)
    factors = [lr_factor(cfg, step) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10:61] == [1.0] * 51
    assert factors[80] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)
    assert sorted(factors[60:], reverse=True) == factors[60:]


def test_the_reference_schedule_is_nanogpts():
    """Linear warm-up over 1,000 of 35,000 steps, then a cosine to a tenth."""
    cfg = TrainSettings(max_steps=35_000, schedule="cosine", warmup=0.0285714, cooldown=0.9714286,
                        final_lr=0.1)
    assert lr_factor(cfg, 500) == pytest.approx(0.5, abs=1e-3)
    assert lr_factor(cfg, 1000) == pytest.approx(1.0, abs=1e-6)
    assert lr_factor(cfg, 18_000) == pytest.approx(0.55, abs=1e-3)
    assert lr_factor(cfg, 34_999) == pytest.approx(0.1, abs=1e-6)
