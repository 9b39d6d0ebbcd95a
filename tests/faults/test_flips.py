"""A byte that changed on the disk, or an end that is missing, is caught by the name of its file."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import tokenizer as tokenizers
from common import checkpoint, checksums, hub
from common.checkpoint import file_sum, write_json
from common.config import UserError, read_sealed, seal
from data import check_tokenizer
from faults.conftest import scale
from model import GPT, GPTConfig
from prep.writers import write_manifest
from vision import describe

FLIPS = scale(60, 200)  # over the files of each folder, one file after the other
LISTS = ("manifest.json", "shards.json")  # JSON, in which a space more or less changes nothing


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


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory):
    """Shards of the hub with shards.json, as `stream` leaves them, and one that is to come."""
    folder = tmp_path_factory.mktemp("hub")
    remotes = []
    for name in ("a_val_000000.npy", "a_train_000001.npy", "a_train_000002.npy"):
        np.save(folder / name, np.arange(4000, dtype=np.uint16))
        size, digest = (folder / name).stat().st_size, file_sum(folder / name)
        remotes.append({"name": name, "size": size, "sha256": digest})
    write_json(folder / "shards.json",
               seal({"files": [*remotes, {**remotes[-1], "name": "a_train_000003.npy"}]}))
    return folder


@pytest.fixture(scope="module")
def ready_made(tmp_path_factory):
    """Shards with a manifest, as `prepare.py fineweb` leaves them."""
    folder = tmp_path_factory.mktemp("fineweb")
    for name in ("a_val_000000.npy", "a_train_000001.npy"):
        np.save(folder / name, np.arange(4000, dtype=np.uint16))
    write_manifest(folder, tokenizers.load("gpt2"), train_tokens=4000, val_tokens=4000)
    return folder


def read_data(folder):
    check_tokenizer(folder)


def read_downloaded(folder):
    """As a stage does at its start, with no network to mend anything: the names go to the log."""
    said = []
    hub.drop_damaged(hub.listed(folder), Path(folder), said.append)
    if said:
        raise UserError(" ".join(said))


def faults(folder, seed):
    """Yield (file, its content with a byte changed or its end cut off): FLIPS of them, seeded."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    generator = random.Random(seed)
    for number in range(FLIPS):
        path = files[number % len(files)]
        whole = path.read_bytes()
        while True:
            position = generator.randrange(len(whole))
            flip = bytes([whole[position] ^ generator.randrange(1, 256)])
            changed = whole[:position]
            if number % 3:  # every third is cut off instead
                changed += flip + whole[position + 1 :]
            if path.name not in LISTS or not says_the_same(changed, whole):
                break
        yield path, whole, changed


def says_the_same(changed, whole):
    try:
        return json.loads(changed) == json.loads(whole)
    except ValueError:
        return False


def caught(folder, read, seed):
    """How many faults in each file of `folder` were refused by its name; all have to be."""
    read(folder)  # nothing is said of a whole one
    found = {}
    for path, whole, changed in faults(folder, seed):
        path.write_bytes(changed)
        with pytest.raises(UserError) as refusal:
            read(folder)
        assert path.name in str(refusal.value), refusal.value
        assert "\n" not in str(refusal.value), refusal.value
        path.write_bytes(whole)
        name = str(path.relative_to(folder))
        found[name] = found.get(name, 0) + 1
    read(folder)
    return found


def test_every_fault_in_a_checkpoint_is_caught_by_name(sharded_checkpoint):
    found = caught(sharded_checkpoint, lambda f: checkpoint.read(f, with_state=True), seed=1)
    assert sum(found.values()) == FLIPS
    assert found.keys() == {"config.json", "manifest.json", "model.safetensors", "tokenizer.json",
                            "state/training.pt", "state/shard_00000.pt", "state/shard_00001.pt"}


@pytest.mark.parametrize("kind", ["text", "chats", "captions", "scenes"])
def test_every_fault_in_a_data_set_is_caught_by_name(kind, world_data, tmp_path):
    folder = shutil.copytree(world_data / kind, tmp_path / kind)
    found = caught(folder, read_data, seed=2)
    assert sum(found.values()) == FLIPS
    wanted = {"text": {"train_000000.npy", "val_000000.npy", "test_000000.npy"},
              "chats": {"train/ids.npy", "test/ids.npy"},
              "captions": {"train/images_000000.bin", "val/image_offsets.npy"},
              "scenes": {"train/images_000000.bin", "val_pairs/image_offsets.npy"}}
    assert found.keys() >= {"manifest.json", "tokenizer.json", *wanted[kind]}


def test_every_fault_in_shards_of_the_hub_is_caught_by_name(downloaded, ready_made):
    found = caught(downloaded, read_downloaded, seed=3)
    assert sum(found.values()) == FLIPS and len(found) == 4
    found = caught(ready_made, read_data, seed=4)
    assert sum(found.values()) == FLIPS and len(found) == 3


def test_a_damaged_data_set_stops_a_stage(world_data, pipeline, tmp_path):
    folder = shutil.copytree(world_data / "captions", tmp_path / "captions")
    path = folder / "train/images_000000.bin"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(AssertionError, match=r"train/images_000000\.bin is not what manifest"):
        pipeline.run_stage("clip_pretrain", tmp_path / "out", f"--data={folder}")


# ------------------------------------------------------------------- what was summed is remembered


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A data set whose shards count as large; and the names of the files that get summed."""
    monkeypatch.setattr(checksums, "SMALL", 1000)
    summed = []
    monkeypatch.setattr(checksums, "file_sum", lambda p: summed.append(p.name) or file_sum(p))
    np.save(tmp_path / "a_train_0.npy", np.arange(4000, dtype=np.uint16))
    np.save(tmp_path / "a_val_0.npy", np.arange(100, dtype=np.uint16))
    write_manifest(tmp_path, tokenizers.load("gpt2"))
    return tmp_path, summed


def test_large_files_are_summed_once_and_small_ones_every_time(large):
    folder, summed = large
    check_tokenizer(folder)
    check_tokenizer(folder)
    assert sorted(summed) == ["a_train_0.npy", "a_val_0.npy", "a_val_0.npy"]
    path = folder / "a_train_0.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"a_train_0\.npy is not what manifest\.json says"):
        check_tokenizer(folder)
    with pytest.raises(UserError, match=r"a_train_0\.npy is not what manifest\.json says"):
        check_tokenizer(folder)


@pytest.mark.parametrize("notes", ["{", "[]", '{"a_train_0.npy": 5}', '{"a_train_0.npy": ["x"]}'])
def test_notes_that_make_no_sense_are_not_believed(large, notes):
    folder, summed = large
    (folder / checksums.NOTED).write_text(notes)
    check_tokenizer(folder)
    assert "a_train_0.npy" in summed


def test_a_folder_that_nobody_may_write_is_checked_every_time(large, monkeypatch):
    folder, summed = large

    def refuse(path, value):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checksums, "write_json", refuse)
    check_tokenizer(folder)
    check_tokenizer(folder)
    assert summed.count("a_train_0.npy") == 2 and not (folder / checksums.NOTED).exists()


def test_only_the_first_process_of_a_machine_looks(large, monkeypatch):
    folder, summed = large
    monkeypatch.setenv("LOCAL_RANK", "1")
    check_tokenizer(folder)
    assert not summed


def test_every_process_ends_with_a_sentence_when_one_finds_damage(large):
    """And only the first of them has looked."""
    folder, _ = large
    (folder / "a_train_0.npy").write_bytes(b"damage")
    code = ("import sys, torch.distributed; torch.distributed.init_process_group('gloo'); "
            "from data import check_tokenizer; from common.config import run_main; "
            "run_main(lambda: check_tokenizer(sys.argv[1]))")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jobs = [subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=ROOT, text=True, env={
        **os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}, stderr=subprocess.PIPE)
        for rank in "01"]
    said = [job.communicate(timeout=300)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [1, 1], said
    assert f"error: {folder} is damaged: a_train_0.npy is not what manifest.json says" in said[0]
    assert f"error: {folder} is damaged; another process says which file\n" in said[1]
    assert "Traceback" not in "".join(said)


# ----------------------------------------------------------------------------------------- the seal


def test_a_list_of_sums_is_sealed_itself_to_its_last_bit(tmp_path):
    """One without a seal, of an earlier version, is still taken."""
    content = {"counts": {"chats": 3, "tokens": 4.5}, "sha256": {"größe.npy": "ab" * 32}}
    path = tmp_path / "manifest.json"
    write_json(path, content)
    assert read_sealed(path) == content
    write_json(path, seal(content))
    assert read_sealed(path) == seal(content) == seal(seal(content))
    whole = path.read_bytes()
    for position in range(0, len(whole), scale(5, 1)):
        for bit in range(8):
            changed = bytes([whole[position] ^ 1 << bit])
            path.write_bytes(whole[:position] + changed + whole[position + 1 :])
            with pytest.raises(UserError, match=r"manifest\.json"):
                read_sealed(path)
