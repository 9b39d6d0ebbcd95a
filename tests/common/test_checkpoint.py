"""The claims of common/checkpoint.py: complete or absent, checked on reading, never unpickled."""

import contextlib
import errno
import json
import pickle
import re
import shutil

import pytest
import torch
from faults.test_hostile import Trap

import tokenizer as tokenizers
from common import checkpoint
from common.atomic import take_lock
from common.config import UserError, seal
from model import GPT, GPTConfig
from vision import describe, open_model

FILES = ["config.json", "model.safetensors", "state/training.pt", "tokenizer.json"]
LINEAGE = [{"stage": "pretrain", "folder": "out/größe", "step": 9, "sha256": "ab" * 32,
            "metrics": {"val_loss": 2.5}}]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(["the cat sat on the mat"] * 3, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return GPT(GPTConfig(tokenizer.n_vocab, n_layer=1, n_head=2, n_embd=8, max_positions=16)).eval()


@pytest.fixture
def save(model, tokenizer, tmp_path):
    """Write a checkpoint of `model` into tmp_path / "run" as a stage would; returns its folder."""
    def write(step=1, val_loss=None):
        metrics = {} if val_loss is None else {"val_loss": val_loss}
        info = dict(stage="sft", **describe(model), lineage=LINEAGE, step=step,
                    settings={"lr": 0.1}, tokenizer=tokenizer.fingerprint,
                    tokenizer_name=tokenizer.name, metrics=metrics)
        state = {"step": step, "optimizer": {"members": [{"m": torch.arange(3.0)}]},
                 "rng": torch.get_rng_state()}
        return checkpoint.save(tmp_path / "run", step, model.state_dict(), info, tokenizer, state)
    return write


def test_a_saved_checkpoint_is_read_back(save, model, tokenizer):
    folder = save(step=12, val_loss=3.5)
    assert folder.name == "step_00000012" and sorted(checkpoint.sums(folder)) == FILES
    info, weights, state = checkpoint.read(folder, with_state=True)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())
    assert (info["stage"], info["kind"], info["step"]) == ("sft", "decoder", 12)
    assert info["lineage"] == LINEAGE and info["metrics"] == {"val_loss": 3.5}
    assert info["folder"] == str(folder) and re.fullmatch("[0-9a-f]{64}", info["sha256"])
    assert state["step"] == 12 and torch.equal(state["rng"], torch.get_rng_state())
    assert state["optimizer"]["members"][0]["m"].tolist() == [0, 1, 2]
    found, its_tokenizer, _ = open_model(folder)
    ids = torch.tensor([tokenizer.encode("the cat sat")])
    assert torch.equal(found.logits(ids), model.logits(ids)) and not found.training
    assert its_tokenizer.fingerprint == tokenizer.fingerprint


def test_a_missing_file_is_named(save, tmp_path):
    for file in FILES:
        (save() / file).unlink()
        with pytest.raises(UserError, match=f"lacks its file {re.escape(file)}"):
            checkpoint.read(tmp_path / "run", with_state=True)


def test_an_incomplete_folder_is_never_read(save, tmp_path):
    """One without a manifest, and one still being written, though both would be newer."""
    run, whole = tmp_path / "run", save(5)
    (shutil.copytree(whole, run / "step_00000009") / "manifest.json").unlink()
    shutil.copytree(whole, run / ".writing-step_00000010")
    save(3)
    assert list(checkpoint.steps_in(run)) == [3, 5]
    assert checkpoint.locate(run) == whole
    with pytest.raises(UserError, match=r"step_00000009 is not a checkpoint"):
        checkpoint.read(run / "step_00000009")


def test_a_failed_save_leaves_the_older_checkpoint_and_does_not_block_the_next(
        save, model, tokenizer, tmp_path):
    run, whole = tmp_path / "run", save(1)
    with pytest.raises(TypeError, match="not JSON serializable"):  # half-way
        checkpoint.save(run, 2, model.state_dict(), {"metrics": object()}, tokenizer, {})
    assert (run / ".writing-step_00000002" / "model.safetensors").is_file()
    assert list(checkpoint.steps_in(run)) == [1] and checkpoint.locate(run) == whole
    save(2)
    assert list(checkpoint.steps_in(run)) == [1, 2] and not list(run.glob(".writing-*"))


def test_a_name_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in "empty", "nowhere":
        with pytest.raises(UserError, match=rf"{name} holds no checkpoint|no checkpoint .*{name}"):
            checkpoint.locate(tmp_path / name)


def test_the_newest_two_and_the_best_are_kept(save, tmp_path):
    """And a step that is saved again is replaced. A damaged one must not stop the run."""
    (save(1, 9.0) / "config.json").write_text("{")
    kept = []
    for step, val_loss in enumerate([3.0, 2.0, 2.5, float("nan"), 2.2, 1.9, 2.1, None], 1):
        save(step, val_loss)
        kept.append(list(checkpoint.steps_in(tmp_path / "run")))
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6], [6, 7], [6, 7, 8]]


def test_a_disk_without_locks_can_be_used():
    def no_locks(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    take_lock(None, "", call=no_locks)


def test_the_wrong_kind_of_model_is_refused(save):
    folder = save()
    with pytest.raises(UserError, match=r"decoder .*made by sft\.py.* clip or vision checkpoint"):
        checkpoint.read(folder, kinds=("clip", "vision"))
    assert checkpoint.read(folder, kinds=("decoder",))[0]["kind"] == "decoder"


@pytest.mark.parametrize(("change", "complaint"), [
    (lambda w: w.pop("head.weight"), r"out/x lacks head\.weight$"),
    (lambda w: w.update(extra=torch.zeros(1)), "out/x has unknown extra$"),
    (lambda w: w.update({"head.weight": torch.zeros(3, 8)}), r"out/x has misshapen head\.weight$"),
    (lambda w: w.clear(), r"lacks token_embedding\.weight, .* and \d+ more$"),
])
def test_weights_that_do_not_fit_are_named_and_not_copied(model, change, complaint):
    torch.manual_seed(1)
    other = GPT(model.config)
    before = {name: w.clone() for name, w in other.state_dict().items()}
    weights = dict(model.state_dict())
    change(weights)
    with pytest.raises(UserError, match=complaint):
        checkpoint.load_weights(other, weights, "out/x")
    assert all(torch.equal(w, before[name]) for name, w in other.state_dict().items())


@pytest.mark.parametrize("pickled", [
    lambda trap, path: torch.save({"step": 1, "optimizer": trap}, path),
    lambda trap, path: torch.save(trap, path, _use_new_zipfile_serialization=False),
    lambda trap, path: path.write_bytes(pickle.dumps(trap, protocol=2)),
], ids=["zip", "old format", "pickle"])
def test_code_in_a_training_state_is_not_run(save, tmp_path, pickled):
    """Not even with the right sum in the manifest."""
    folder, bait = save(), tmp_path / "it_ran"
    path = folder / "state" / "training.pt"
    pickled(Trap(bait), path)
    manifest = seal({"sha256": checkpoint.sums(folder)})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError):
        checkpoint.read(folder, with_state=True)
    assert not bait.exists()
    with contextlib.suppress(RuntimeError):  # a bare pickle is run, then found not to be torch's
        torch.load(path, weights_only=False)
    assert bait.exists()  # so the trap does work
