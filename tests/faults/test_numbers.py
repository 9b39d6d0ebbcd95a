"""A batch that would do harm changes nothing, and a run that has come apart ends with advice."""

import shutil

import numpy as np
import pytest
import torch
from conftest import log_rows, logged, reseal, run

from common.config import UserError
from common.device import Machine
from data import Text
from train.anomaly import MAX_IN_A_ROW, MIN_STEPS, Guard
from train.loader import Loader
from train.run import Run

STEPS, POISONED = 120, 50
LONG = (f"--max_steps={STEPS}", "--save_every=1000", "--eval_every=1000", "--log_every=10",
        "--batch_tokens=256")


def judged(guard, losses, norms=None):
    """What a Guard says of steps with these losses (and gradient norms)."""
    norms = norms or [1.0] * len(losses)
    return [guard.anomalous(guard.n, torch.tensor(loss), torch.tensor(norm)).item()
            for loss, norm in zip(losses, norms, strict=True)]


def usual(n):
    return (3 + 0.1 * np.random.default_rng(0).standard_normal(n)).tolist()


def test_what_is_usual_is_not_skipped_and_what_is_far_out_is():
    guard = Guard(torch.device("cpu"))
    assert not any(judged(guard, usual(200)))
    assert judged(guard, [9.0, 3.0, 3.0], [1.0, 50.0, 1.0]) == [True, True, False]
    assert judged(guard, [float("nan"), 3.0, float("inf")]) == [True, False, True]
    assert judged(guard, [2.0]) == [False]  # a loss that falls is no fault
    lines = guard.messages(lambda step: f"rows of {step}")
    assert len(lines) == 4 and lines[0].startswith(
        "step 200 skipped: loss 9 (mean 2.997), gradient norm 1 (mean 1), rows")
    assert lines[-1].endswith(", rows of 205") and guard.messages(str) == []


def test_a_gradient_that_needs_no_clipping_is_no_harm():
    losses, norms = usual(201), [0.2 + 0.01 * (loss - 3) for loss in usual(201)]
    norms[100], norms[200] = 0.9, 1.1  # the first is far out as well
    assert np.flatnonzero(judged(Guard(torch.device("cpu"), 1.0), losses, norms)).tolist() == [200]
    assert np.flatnonzero(judged(Guard(torch.device("cpu")), losses, norms)).tolist() == [100, 200]


def test_nothing_but_what_is_not_finite_is_skipped_before_it_is_known_what_is_usual():
    guard = Guard(torch.device("cpu"))
    assert not any(judged(guard, [1.0, 100.0] * (MIN_STEPS // 2)))
    assert judged(Guard(torch.device("cpu")), [float("nan"), 3.0]) == [True, False]


def test_what_stays_different_becomes_usual_before_the_run_is_ended():
    guard = Guard(torch.device("cpu"))
    judged(guard, usual(200))
    found = judged(guard, [6.0] * MAX_IN_A_ROW)
    assert found[0] and not found[-1]
    guard.check()


def test_too_many_in_a_row_end_the_run_with_advice():
    guard = Guard(torch.device("cpu"))
    judged(guard, [float("nan")] * (MAX_IN_A_ROW - 1))
    guard.check()
    judged(guard, [float("nan")])
    with pytest.raises(UserError, match=r"last 20 steps were skipped.*lower the learning rates"):
        guard.check()


def test_it_goes_on_as_if_it_had_never_stopped():
    one, other = Guard(torch.device("cpu")), Guard(torch.device("cpu"))
    losses = [*usual(150), 9.0, *usual(20)]
    expected = judged(one, losses)
    first = judged(other, losses[:100])
    later = Guard(torch.device("cpu"))
    later.load_state_dict(other.state_dict())
    assert first + judged(later, losses[100:]) == expected


@pytest.fixture(scope="module")
def clean(pipeline, tmp_path_factory):
    """A run without a fault, and one of another seed: how much the final loss says by chance."""
    folder = tmp_path_factory.mktemp("clean")
    said = [pipeline.run_stage("pretrain", folder / str(seed), *LONG, f"--seed={seed}")
            for seed in (1337, 1, 2)]
    assert not any("skipped: " in text for text in said)
    return folder


def final_loss(folder):
    return max(logged(folder, "val_loss").items())[1]


@pytest.fixture
def poisoned(pipeline, tmp_path):
    """The data with noise in place of every window that step 50 reads, and no other step."""
    shutil.copytree(pipeline.data / "text", tmp_path / "text")
    text = Text(tmp_path / "text", "train", 64, 512)
    loader = Loader(text, 4, 4, Machine(torch.device("cpu"), torch.float32), 1337)
    rows = loader.rows_of(POISONED).tolist()
    others = {row for step in range(STEPS) if step != POISONED for row in loader.rows_of(step)}
    assert not others & set(rows)
    tokens = np.load(text.paths[0])
    for row in rows:
        noise = np.random.default_rng(row).integers(512, size=64)
        tokens[row * 64 : row * 64 + 64] = noise.astype(np.uint16)
    np.save(text.paths[0], tokens)
    reseal(tmp_path / "text")
    return tmp_path / "text", sorted(rows)


def test_a_poisoned_batch_leaves_the_final_loss_within_noise(pipeline, clean, poisoned, tmp_path):
    data, rows = poisoned
    said = pipeline.run_stage("pretrain", tmp_path / "run", *LONG, f"--data={data}")
    lines = [line for line in said.splitlines() if "skipped: " in line]
    assert len(lines) == 1 and lines[0].startswith(f"step {POISONED} skipped: loss ")
    assert f"rows {', '.join(map(str, rows))} of {data} (train)" in lines[0]
    assert lines[0] in (tmp_path / "run" / "report.md").read_text()
    losses = [final_loss(clean / str(seed)) for seed in (1337, 1, 2)]
    assert abs(final_loss(tmp_path / "run") - losses[0]) < max(losses) - min(losses)


@pytest.fixture
def spoilt(monkeypatch):
    """Make the gradient of some steps not a number."""
    def spoil(steps):
        backward, update = Run.backward, Run.optimizer_step
        now = [0]

        def counted(run, step):
            update(run, step)
            now[0] = step + 1

        monkeypatch.setattr(Run, "optimizer_step", counted)
        monkeypatch.setattr(Run, "backward", lambda run, loss: backward(
            run, loss * float("nan") if now[0] in steps else loss))
    return spoil


def test_a_loss_that_is_not_a_number_leaves_the_final_loss_within_noise(
        pipeline, clean, spoilt, tmp_path):
    spoilt([POISONED])
    said = pipeline.run_stage("pretrain", tmp_path / "run", *LONG)
    assert f"step {POISONED} skipped: loss nan (mean " in said
    losses = [final_loss(clean / str(seed)) for seed in (1337, 1, 2)]
    assert abs(final_loss(tmp_path / "run") - losses[0]) < max(losses) - min(losses)
    assert all(np.isfinite(row["loss"]) for row in log_rows(tmp_path / "run") if "loss" in row)


def test_a_run_that_has_come_apart_ends_and_its_checkpoint_is_good(pipeline, spoilt, tmp_path):
    pipeline.run_stage("pretrain", tmp_path / "run", "--max_steps=2")
    spoilt(range(3, 100))
    flags = [*pipeline.flags("pretrain"), f"--out={tmp_path}/run", "--max_steps=100"]
    result = run("pretrain.py", *flags)
    assert "the last 20 steps were skipped" in result.refusal
    assert "step 3 skipped: loss nan" in result.out
    assert [row["step"] for row in log_rows(tmp_path / "run")][-1] < 30
