"""Changed bytes and truncated files are detected, and the error names the file."""

import json
import random
import shutil

import numpy as np
import pytest
import torch

import tokenizer as tokenizers
from common import checkpoint, checksums
from common.checkpoint import file_sum
from common.config import UserError
from data import check_tokenizer
from faults.conftest import scale
from faults.harness import start_together
from model import GPT, GPTConfig
from prep.writers import write_manifest
from vision import describe

FLIPS = scale(60, 200)  # over the files of each folder in turn


@pytest.fixture(scope="module")
def sharded_checkpoint(tmp_path_factory):
    """A checkpoint with every kind of file: a small vocabulary, and the state of two shards."""
    tokenizer = tokenizers.train(["the cat sat on the mat"] * 3, 300)
    model = GPT(GPTConfig(tokenizer.n_vocab, n_layer=1, n_head=2, n_embd=8, max_positions=16))
    info = dict(stage="sft", **describe(model), lineage=[], step=1, settings={"lr": 0.1},
                tokenizer=tokenizer.fingerprint, tokenizer_name=tokenizer.name, metrics={})
    run = tmp_path_factory.mktemp("run")
    checkpoint.begin(run, 1)
    for number in range(2):
        checkpoint.save_shard(run, 1, number, {"members": [{"m": torch.arange(50.0)}]})
    state = {"step": 1, "rng": torch.get_rng_state()}
    return checkpoint.save(run, 1, model.state_dict(), info, tokenizer, state, begun=True)


def parsed(content):
    try:
        return json.loads(content)
    except ValueError:
        return None


def faults(folder, seed):
    """Yield (file, content, damaged content), FLIPS times: a byte changed, or every third time the
    end cut off."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    generator = random.Random(seed)
    for number in range(FLIPS):
        path = files[number % len(files)]
        content = path.read_bytes()
        while True:
            position = generator.randrange(len(content))
            flip = bytes([content[position] ^ generator.randrange(1, 256)])
            changed = content[:position]
            if number % 3:
                changed += flip + content[position + 1 :]
            if path.name != "manifest.json" or parsed(changed) != parsed(content):
                break  # spaces in a manifest mean nothing
        yield path, content, changed


def check_faults(folder, read, seed):
    """Every fault is refused by the name of its file; returns the names of the files."""
    read(folder)  # without a fault there is no error
    for path, content, changed in faults(folder, seed):
        path.write_bytes(changed)
        with pytest.raises(UserError) as refusal:
            read(folder)
        assert path.name in str(refusal.value), refusal.value
        assert "\n" not in str(refusal.value), refusal.value
        path.write_bytes(content)
    read(folder)
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_every_fault_in_a_checkpoint_is_named(sharded_checkpoint):
    files = check_faults(sharded_checkpoint, lambda f: checkpoint.read(f, with_state=True), seed=1)
    assert files == {"config.json", "manifest.json", "model.safetensors", "tokenizer.json",
                     "state/training.pt", "state/shard_00000.pt", "state/shard_00001.pt"}


@pytest.mark.parametrize("kind", ["text", "chats", "captions", "scenes"])
def test_every_fault_in_a_data_set_is_named(kind, world_data, tmp_path):
    folder = shutil.copytree(world_data / kind, tmp_path / kind)
    files = check_faults(folder, check_tokenizer, seed=2)
    expected = {"text": {"train_000000.npy", "val_000000.npy", "test_000000.npy"},
                "chats": {"train/ids.npy", "test/ids.npy"},
                "captions": {"train/images_000000.bin", "val/image_offsets.npy"},
                "scenes": {"train/images_000000.bin", "val_pairs/image_offsets.npy"}}
    assert files >= {"manifest.json", "tokenizer.json", *expected[kind]}


def test_a_damaged_data_set_stops_all_processes_of_a_stage(world_data, pipeline, tmp_path):
    folder = shutil.copytree(world_data / "captions", tmp_path / "captions")
    path = folder / "train/images_000000.bin"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    jobs = start_together(2, "clip_pretrain.py", *pipeline.flags("clip_pretrain"),
                          f"--data={folder}", f"--out={tmp_path}/out")
    assert [job.wait() for job in jobs] == [1, 1]
    assert f"error: {folder} is damaged: train/images_000000.bin" in jobs[0].said
    assert f"error: {folder} is damaged: train/images_000000.bin" in jobs[1].said
    assert "Traceback" not in jobs[0].said + jobs[1].said


# ------------------------------------------------------------------------ which files are hashed


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A data set with a large file and a small one; and the names of the files that are hashed."""
    monkeypatch.setattr(checksums, "SMALL", 1000)
    hashed = []
    monkeypatch.setattr(checksums, "file_sum", lambda p: hashed.append(p.name) or file_sum(p))
    np.save(tmp_path / "a_train_0.npy", np.arange(4000, dtype=np.uint16))
    np.save(tmp_path / "a_val_0.npy", np.arange(100, dtype=np.uint16))
    write_manifest(tmp_path, tokenizers.load("gpt2"))
    return tmp_path, hashed


def test_large_files_are_hashed_once_and_small_ones_every_time(large):
    folder, hashed = large
    check_tokenizer(folder)
    check_tokenizer(folder)
    assert sorted(hashed) == ["a_train_0.npy", "a_val_0.npy", "a_val_0.npy"]
    path = folder / "a_train_0.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    for _ in range(2):
        with pytest.raises(UserError, match=r"damaged: a_train_0\.npy"):
            check_tokenizer(folder)


def test_notes_that_cannot_be_read_or_written_are_ignored(large):
    folder, hashed = large
    noted = folder / checksums.NOTED
    for notes in "{", "[]", '{"a_train_0.npy": 5}', '{"a_train_0.npy": ["x"]}':
        noted.write_text(notes)
        check_tokenizer(folder)
    noted.unlink()
    noted.mkdir()  # as in a folder without write permission
    check_tokenizer(folder)
    assert hashed.count("a_train_0.npy") == 5
