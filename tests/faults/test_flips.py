"""Changed bytes and truncated files are detected, and the error names the file."""

import random
import shutil
from functools import partial

import numpy as np
import pytest
from conftest import STEPS, log_rows, newest, run
from test_stages import assert_same_weights

import tokenizer as tokenizers
from common import checkpoint, checksums
from common.checkpoint import file_sum
from common.config import UserError
from data import check_tokenizer
from faults.harness import scale, start_together
from prep.writers import write_manifest
from train.log import Log, speeds

FLIPS = scale(60, 200)  # over the files of each folder in turn


def flip(path):
    """Change a byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def faults(folder, seed):
    """Yield (file, content, damaged content), FLIPS times: a byte changed, or every third time the
    end cut off."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    generator = random.Random(seed)
    for number in range(FLIPS):
        path = files[number % len(files)]
        content = changed = path.read_bytes()
        while changed.split() == content.split():  # white space in a manifest means nothing
            position = generator.randrange(len(content))
            flip = bytes([content[position] ^ generator.randrange(1, 256)])
            changed = content[:position] + (flip + content[position + 1 :]) * (number % 3 > 0)
        yield path, content, changed


FOLDERS = {  # kind: some files whose damage is named, besides manifest.json and tokenizer.json
    "checkpoint": {"config.json", "model.safetensors", "state/training.pt"},
    "text": {"train_000000.npy", "val_000000.npy", "test_000000.npy"},
    "chats": {"train/ids.npy", "test/ids.npy"},
    "captions": {"train/images_000000.bin", "val/image_offsets.npy"},
    "scenes": {"train/images_000000.bin", "val_pairs/image_offsets.npy"},
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_fault_is_refused_by_the_name_of_its_file(kind, pipeline, tmp_path):
    source, read = pipeline.data / kind, check_tokenizer
    if kind == "checkpoint":
        source, read = newest(pipeline.folder / "sft"), partial(checkpoint.read, with_state=True)
    folder = shutil.copytree(source, tmp_path / kind)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files >= {"manifest.json", "tokenizer.json", *FOLDERS[kind]}
    read(folder)
    for path, content, changed in faults(folder, seed=kind):
        path.write_bytes(changed)
        with pytest.raises(UserError) as refusal:
            read(folder)
        assert path.name in str(refusal.value) and "\n" not in str(refusal.value), refusal.value
        path.write_bytes(content)
    read(folder)


def test_a_fault_in_a_log_costs_only_the_rows_after_it(pipeline, tmp_path):
    rows, log = log_rows(pipeline.folder / "sft"), Log(tmp_path)
    shutil.copy(pipeline.folder / "sft/log.jsonl", tmp_path)
    for path, content, changed in faults(tmp_path, seed=0):
        path.write_bytes(changed)
        log.resume(STEPS)
        place = next((i for i, byte in enumerate(changed) if byte != content[i]), len(changed))
        before = content[:place].count(b"\n")
        assert log.rows[:before] == rows[:before] and len(speeds(log.rows, "tok")) in (0, 2)
        path.write_bytes(content)


@pytest.mark.parametrize("file", ["model.safetensors", "state/training.pt"])
def test_a_run_resumes_before_a_damaged_checkpoint_and_sampling_refuses_it(
        file, pipeline, tmp_path):
    out = shutil.copytree(pipeline.folder / "sft", tmp_path / "sft")
    before, last = checkpoint.steps_in(out).values()
    flip(last / file)
    if file == "model.safetensors":
        assert f"{last / file} is damaged" in run("sample.py", out, "--prompt=hi").refusal
    said = pipeline.run_stage("sft", out)
    assert f"{last / file} is damaged" in said and f"resuming from {before}" in said
    assert_same_weights(out, pipeline.folder / "sft")


def test_a_damaged_data_set_stops_all_processes_of_a_stage(world_data, pipeline, tmp_path):
    folder = shutil.copytree(world_data / "captions", tmp_path / "captions")
    flip(folder / "train/images_000000.bin")
    jobs = start_together(2, "clip_pretrain.py", *pipeline.flags("clip_pretrain"),
                          f"--data={folder}", f"--out={tmp_path}/out")
    assert [job.wait() for job in jobs] == [1, 1]
    for job in jobs:
        assert f"error: {folder} is damaged: train/images_000000.bin" in job.said
        assert "Traceback" not in job.said


def test_large_files_are_hashed_once_and_small_ones_every_time(tmp_path, monkeypatch):
    """Unless the file or the notes of what was hashed change."""
    monkeypatch.setattr(checksums, "SMALL", 1000)
    hashed, (large, small) = [], (tmp_path / f"a_{split}_0.npy" for split in ("train", "val"))
    monkeypatch.setattr(checksums, "file_sum", lambda p: hashed.append(p) or file_sum(p))
    np.save(large, np.arange(4000, dtype=np.uint16))
    np.save(small, np.arange(100, dtype=np.uint16))
    write_manifest(tmp_path, "text", tokenizers.load("gpt2"))
    for _ in range(2):
        check_tokenizer(tmp_path)
    assert sorted(hashed) == [large, small, small]
    for notes in "{", "[]", '{"a_train_0.npy": 5}', '{"a_train_0.npy": ["x"]}':
        (tmp_path / checksums.NOTED).write_text(notes)
        check_tokenizer(tmp_path)
    (tmp_path / checksums.NOTED).unlink()
    (tmp_path / checksums.NOTED).mkdir()  # as in a folder without write permission
    check_tokenizer(tmp_path)
    assert hashed.count(large) == 6
    large.write_bytes(large.read_bytes()[:-1] + b"x")
    for _ in range(2):
        with pytest.raises(UserError, match=r"damaged: a_train_0\.npy"):
            check_tokenizer(tmp_path)
