"""Steps with a non-finite or outlier loss or gradient norm are skipped; divergence ends a run."""

import numpy as np
import pytest
import torch
from conftest import log_rows, logged, run

from train.anomaly import MAX_IN_A_ROW, MIN_STEPS, Guard
from train.run import Run

STEPS, BAD_STEP = 120, 50
LONG = (f"--max_steps={STEPS}", "--save_every=1000", "--eval_every=1000", "--log_every=10",
        "--batch_tokens=256")
NAN = float("nan")


def skipped(guard, losses, norms=None):
    """Which of the steps with these losses (and gradient norms) a Guard skips."""
    norms = norms or [1.0] * len(losses)
    found = [guard.anomalous(guard.n, torch.tensor(loss), torch.tensor(norm)).item()
             for loss, norm in zip(losses, norms, strict=True)]
    return np.flatnonzero(found).tolist()


def new_guard(grad_clip=0.0):
    return Guard(torch.device("cpu"), grad_clip)


def usual(n):
    return (3 + 0.1 * np.random.default_rng(0).standard_normal(n)).tolist()


def test_outliers_are_skipped_and_named():
    guard = new_guard()
    assert skipped(new_guard(), [1.0, 100.0] * (MIN_STEPS // 2)) == []  # it has no statistics yet
    assert skipped(guard, usual(200), usual(200)) == []
    losses = [9.0, 3.0, 3.0, NAN, 3.0, float("inf"), 2.0]  # a loss that falls is accepted
    assert skipped(guard, losses, [3.0, 50.0, *[3.0] * 5]) == [0, 1, 3, 5]
    lines = guard.messages(lambda step: f"rows of {step}")
    assert len(lines) == 4 and lines[0].startswith("step 200 skipped: loss 9 (mean 2.997)")
    assert lines[-1].endswith("rows of 205") and guard.messages(str) == []


def test_a_gradient_that_needs_no_clipping_is_accepted():
    losses, norms = usual(201), [0.2 + 0.01 * (loss - 3) for loss in usual(201)]
    norms[100], norms[200] = 0.9, 1.1  # both are outliers
    assert skipped(new_guard(1.0), losses, norms) == [200]
    assert skipped(new_guard(), losses, norms) == [100, 200]


def test_a_lasting_change_is_accepted_before_the_run_is_ended():
    guard = new_guard()
    found = skipped(guard, [*usual(200), *[6.0] * MAX_IN_A_ROW])
    assert found[0] == 200 and found[-1] < 199 + MAX_IN_A_ROW
    guard.check()


@pytest.mark.parametrize("value", [0.0, 1e-6, 3.0])
def test_a_window_of_constant_values_does_not_condemn_what_follows(value):
    guard = new_guard()
    assert skipped(guard, [value] * 200, [value] * 200) == []
    found = skipped(guard, usual(150), usual(150))
    assert found == sorted(set(found)) and max(found, default=0) < MAX_IN_A_ROW
    guard.check()


def make_bad(monkeypatch, fault, steps):
    """Noise in the tokens of some steps, or a loss of NaN."""
    forward, backward, optimizer_step = Run.forward, Run.backward, Run.optimizer_step
    now = [0]

    def counted(run, step):
        optimizer_step(run, step)
        now[0] = step + 1

    def noisy(run, batch):
        if fault == "noise" and now[0] in steps:
            shape, generator = batch.ids.shape, torch.Generator().manual_seed(0)
            batch.ids, batch.targets = torch.randint(512, (2, *shape), generator=generator)
        return forward(run, batch)

    monkeypatch.setattr(Run, "optimizer_step", counted)
    monkeypatch.setattr(Run, "forward", noisy)
    monkeypatch.setattr(Run, "backward", lambda run, loss: backward(
        run, loss * NAN if fault == "nan" and now[0] in steps else loss))


def test_a_bad_step_leaves_the_final_loss_within_the_spread_of_seeds(
        pipeline, tmp_path, monkeypatch):
    def trained(name, seed):
        """(what a run printed, its final loss)."""
        said = pipeline.run_stage("pretrain", tmp_path / name, *LONG, f"--seed={seed}")
        return said, max(logged(tmp_path / name, "val_loss").items())[1]

    clean = [trained(str(seed), seed) for seed in (1337, 1, 2)]
    assert not any("skipped: " in said for said, _ in clean)
    losses = [loss for _, loss in clean]
    for fault in ("noise", "nan"):
        with monkeypatch.context() as patch:
            make_bad(patch, fault, [BAD_STEP])
            said, loss = trained(fault, 1337)
        [line] = [line for line in said.splitlines() if "skipped: " in line]
        assert line.startswith(f"step {BAD_STEP} skipped: loss ")
        assert ("loss nan" in line) == (fault == "nan") and f" of {pipeline.data}/text" in line
        assert line in (tmp_path / fault / "report.md").read_text()
        assert abs(loss - losses[0]) < max(losses) - min(losses)
        assert all(np.isfinite(row["loss"]) for row in log_rows(tmp_path / fault) if "loss" in row)


def test_a_diverged_run_ends_and_its_checkpoint_is_intact(pipeline, tmp_path, monkeypatch):
    pipeline.run_stage("pretrain", tmp_path / "run", "--max_steps=2")
    make_bad(monkeypatch, "nan", range(3, 100))
    flags = [*pipeline.flags("pretrain"), f"--out={tmp_path}/run", "--max_steps=100"]
    result = run("pretrain.py", *flags)
    assert f"last {MAX_IN_A_ROW} steps were skipped" in result.refusal
    assert "lower the learning rates" in result.refusal and "diverged" in result.refusal
    assert "step 3 skipped: loss nan" in result.out
    assert [row["step"] for row in log_rows(tmp_path / "run")][-1] < 30
