"""Checkpoints are written while training goes on, and none that is wanted goes away."""

import shutil
import threading
import time

import pytest
import torch
from conftest import newest
from test_stages import assert_same_weights

from common import checkpoint
from common.config import UserError
from train.async_save import Saver


def test_the_state_at_the_save_is_written_whatever_happens_later():
    saver, resumed, written = Saver(), threading.Event(), []
    state = {"a": torch.ones(3), "deep": [{"b": torch.arange(4), "n": 7}], "words": "unchanged"}

    def write(copy):
        resumed.wait()
        written.append({"a": copy["a"].clone(), "b": copy["deep"][0]["b"].clone(), "copy": copy})

    saver.start(write, saver.copy(state))
    state["a"].fill_(9)
    state["deep"][0]["b"].fill_(9)
    assert saver.ended() is None  # it is still writing
    resumed.set()
    assert saver.ended(wait=True) is None
    assert written[0]["a"].tolist() == [1, 1, 1] and written[0]["b"].tolist() == [0, 1, 2, 3]
    assert written[0]["copy"]["deep"][0]["n"] == 7 and written[0]["copy"]["words"] == "unchanged"
    memory = saver.copy(state)["a"].data_ptr()
    assert saver.copy(state)["a"].data_ptr() == memory  # it is allocated once
    state["a"] = torch.ones(5)
    assert saver.copy(state)["a"].tolist() == [1] * 5
    saver.start(int, "no number")
    assert isinstance(saver.ended(wait=True), ValueError)
    assert saver.ended(wait=True) is None  # an error is reported once


def test_training_continues_while_a_checkpoint_is_written(pipeline, tmp_path, monkeypatch):
    """Writing takes 0.5 seconds here; the next save and the end wait for it, the steps do not."""
    save, began = checkpoint.save, time.monotonic()
    spans = []

    def slow(*args, **kwargs):
        spans.append([time.monotonic() - began])
        time.sleep(0.5)
        found = save(*args, **kwargs)
        spans[-1].append(time.monotonic() - began)
        return found

    monkeypatch.setattr(checkpoint, "save", slow)
    said = pipeline.run_stage("pretrain", tmp_path / "run", "--save_every=3")
    assert len(spans) == 2 and spans[0][1] <= spans[1][0]  # one at a time
    assert "done: " in said
    assert_same_weights(tmp_path / "run", pipeline.folder / "pretrain")


def test_a_failed_save_does_not_end_the_run(
        pipeline, tmp_path, monkeypatch):
    fill, tries = checkpoint.fill, []

    def full_disk(folder, *content):
        tries.append(folder.name)
        if "00000002" in folder.name:
            raise OSError(28, "No space left on device")
        fill(folder, *content)

    monkeypatch.setattr(checkpoint, "fill", full_disk)
    said = pipeline.run_stage("pretrain", tmp_path / "run")
    assert "cannot write the checkpoint of step 2" in said and "No space left on device" in said
    assert sorted(checkpoint.steps_in(tmp_path / "run")) == [4, 6]
    assert not list((tmp_path / "run").glob(".writing*"))


def test_a_full_disk_removes_the_older_checkpoint(pipeline, tmp_path, monkeypatch):
    run, fill = shutil.copytree(pipeline.folder / "pretrain", tmp_path / "run"), checkpoint.fill
    info, weights, _ = checkpoint.read(run)
    steps = list(checkpoint.steps_in(run))
    assert len(steps) == 2

    def full(*_):
        raise OSError(28, "No space left on device")

    def nearly_full(*content):
        (full if len(checkpoint.steps_in(run)) > 1 else fill)(*content)

    class Nothing:
        def save(self, folder):
            pass

    monkeypatch.setattr(checkpoint, "fill", nearly_full)
    info["metrics"].pop("val_loss")
    for folder in checkpoint.steps_in(run).values():
        text = (folder / "config.json").read_text().replace('"val_loss"', '"other"')
        (folder / "config.json").write_text(text)
    checkpoint.save(run, 9, weights, info, Nothing(), {"step": 9})
    assert list(checkpoint.steps_in(run)) == [steps[-1], 9]
    with pytest.raises(UserError, match=r"cannot write the checkpoint of step 11 .*No space left "
                                        r".*the one before is complete"):
        monkeypatch.setattr(checkpoint, "fill", full)
        checkpoint.save(run, 11, weights, info, Nothing(), {"step": 11})
    assert newest(run).name == "step_00000009"


def test_every_nth_checkpoint_is_kept(pipeline, tmp_path):
    pipeline.run_stage("pretrain", tmp_path / "run", "--save_every=1", "--keep_every=3",
                       "--max_steps=9", "--eval_every=0")
    assert list(checkpoint.steps_in(tmp_path / "run")) == [3, 6, 8, 9]


def test_a_checkpoint_that_is_being_read_is_not_removed(pipeline, tmp_path):
    run = shutil.copytree(pipeline.folder / "pretrain", tmp_path / "run")
    first, second = checkpoint.steps_in(run).values()
    with checkpoint.locked(first):
        assert not checkpoint.remove(first) and first.is_dir()
        with checkpoint.locked(first):  # many may read
            pass
    assert checkpoint.remove(first) and not first.is_dir()
    assert list(run.glob(".removing*")) == [] and second.is_dir()


def test_resume_skips_a_damaged_checkpoint_and_removes_unfinished_ones(pipeline, tmp_path):
    run = shutil.copytree(pipeline.folder / "pretrain", tmp_path / "run")
    for name in (".writing-step_00000003", ".removing-step_00000001"):
        (run / name / "state").mkdir(parents=True)
    before, last = checkpoint.steps_in(run).values()
    weights = last / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    said = pipeline.run_stage("pretrain", run)
    assert f"{weights} is damaged" in said and str(before) in said
    assert_same_weights(run, pipeline.folder / "pretrain")
    assert not list(run.glob(".writing*")) + list(run.glob(".removing*"))
