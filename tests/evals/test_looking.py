"""The claims about looking: three held-out losses, rows of every kind on several processes, workers
that decode, and pictures that go missing."""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, log_rows, logged
from PIL import Image
from test_distributed import ADAMW, finish, start
from test_stages import assert_close

from common.config import UserError
from common.device import Machine
from data import Chats, ImageSpec
from evals.image_ablation import Gains, Held, Looking, a_token, blind, nats_by_chat
from evals.validation import caption_choice
from prep.writers import write_chats, write_manifest
from tokenizer import load
from train.loader import Loader, validation_loss
from train.packing import Packed
from vision import open_model

PATCHES, SIZE = 4, 16
SPEC = ImageSpec(PATCHES, SIZE)


def painted(shade, size=SIZE):
    """The bytes of a picture all of one grey."""
    file = io.BytesIO()
    Image.new("RGB", (size, size), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def write(folder, tokenizer, counts, split="train"):
    """A split of chats; chat i has counts[i] pictures, each of a grey of its own."""
    items, shade = [], 0
    for i, n in enumerate(counts):
        images = [painted((shade + k) % 256) for k in range(n)]
        shade += n
        items.append(([{"role": "user", "content": f"what is it, number {i}?"},
                       {"role": "assistant", "content": "grey " * (1 + i % 3)}], images))
    return write_chats(folder / split, tokenizer, items)


@pytest.fixture
def mixed(world_data, tmp_path):
    """A data folder of chats with none, one, two and four pictures, and its tokenizer."""
    tokenizer = load(world_data / "scenes")
    counts = {split: write(tmp_path / "mixed", tokenizer, [0, 1, 0, 2, 0, 4] * n, split)
              for split, n in (("train", 8), ("val", 2))}
    write_manifest(tmp_path / "mixed", tokenizer, **counts)
    return tmp_path / "mixed", tokenizer


MACHINE = Machine(torch.device("cpu"), torch.float32)


# ------------------------------------------------------------------------------- the three losses


def test_another_picture_is_never_ones_own_and_as_many_as_ones_own(mixed):
    folder, tokenizer = mixed
    chats = Chats(folder, "train")
    own, other = Held(chats, 48, tokenizer), Held(chats, 48, tokenizer, "other")
    for i in range(len(own)):
        mine, theirs = own.images(i), other.images(i)
        assert len(mine) == len(theirs) == chats.n_images(i)
        assert not mine or np.array(mine[0]).tolist() != np.array(theirs[0]).tolist()


def test_without_pictures_the_same_words_are_to_be_said(mixed):
    folder, tokenizer = mixed
    looking = Looking(Chats(folder, "val"), 12, 128, tokenizer, SPEC)
    said = {kind: sorted(packed.batch([*range(len(packed))]).targets.tolist())
            for kind, packed in looking.packed.items()}
    assert said["own"] == said["other"] == said["none"]
    none = looking.packed["none"]
    assert none.batch([*range(len(none))]).pixels is None
    assert none.chats["length"].sum() < looking.packed["own"].chats["length"].sum()


@pytest.mark.parametrize("stage", ["vision_pretrain", "vision_sft"])
def test_the_vision_stages_log_all_three(pipeline, stage):
    names = ["val_loss", "val_other_picture", "val_no_picture"]
    names += ["val_text_loss"] if stage == "vision_sft" else []
    assert sorted(logged(pipeline.folder / stage, *names)) == sorted(
        (step, name) for step in (2, 5) for name in names)


def test_a_model_that_does_not_look_is_told_of(pipeline, tmp_path):
    said = pipeline.run_stage("vision_pretrain", tmp_path / "still", "--lr=1e-9", "--muon_lr=1e-9")
    assert "the model is not looking" in said
    good = {"val_loss": 1.0, "val_other_picture": 1.2, "val_no_picture": 1.1}
    assert blind(good) == "" and "0.200" not in blind(good)
    assert "-0.100 against" in blind({**good, "val_no_picture": 0.9})


# --------------------------------------------------------------------------------------- the gains


@pytest.fixture
def seeing(pipeline):
    """(model, tokenizer) of the last stage: its six steps taught it next to nothing."""
    return open_model(pipeline.folder / "vision_sft")[:2]


def test_what_the_chats_cost_is_what_all_cost_together(seeing, mixed):
    folder, tokenizer = mixed
    model = seeing[0]
    looking = Gains(Chats(folder, "val"), 12, 128, tokenizer, model.image_spec)
    nats = looking.nats(MACHINE, model, 3)
    for kind, packed in looking.packed.items():
        assert len(nats[kind]) == len(packed.chats)
        together = validation_loss(MACHINE, packed, 3, model, len(packed))
        assert a_token(list(nats[kind].values()))[0] == pytest.approx(together, rel=1e-5)
    for number, (_, tokens) in nats["own"].items():
        assert tokens == nats["none"][number][1] == nats["blank"][number][1]
    alone = Packed([Held(Chats(folder, "val"), 12, tokenizer, "own", {3: None})], 128, tokenizer,
                   model.image_spec)
    assert nats_by_chat(MACHINE, model, alone, 1)[3] == pytest.approx(nats["own"][3], rel=1e-4)


def test_a_blank_picture_is_grey_and_of_the_right_size(mixed):
    folder, tokenizer = mixed
    held = Held(Chats(folder, "val"), 12, tokenizer, "blank")
    assert [len(held.images(i, SPEC)) for i in range(6)] == [0, 1, 0, 2, 0, 4]
    assert held.images(1, SPEC)[0].size == (SIZE, SIZE)
    assert len(held.images(1, SPEC)[0].getcolors()) == 1


def test_the_gain_is_what_is_saved_on_chats_with_pictures(mixed):
    """By hand: other pictures cost one nat a token more in every chat that has another's."""
    folder, tokenizer = mixed
    looking = Gains(Chats(folder, "val"), 12, 128, tokenizer, SPEC)
    own = {number: (2.0 * tokens, tokens) for number, tokens in enumerate(range(1, 13))}
    other = {number: (3.0 * tokens, tokens) for number, (_, tokens) in own.items()}
    text = {number: pair for number, pair in other.items() if number % 2 == 0}
    gains = looking.gains({"own": own, "other": other, "blank": {**own, **text}})
    assert gains["other"] == pytest.approx((1.0, 0.0), abs=1e-9)  # without error: all alike
    assert gains["blank"] == (0.0, 0.0)  # chats without pictures, numbers 0, 2, 4, do not count
    assert a_token([(1, 1), (0, 1)])[1] == pytest.approx(0.5 / 2**0.5, rel=0.1)
    few = {number: own[number] for number in (0, 2, 4)}
    assert looking.gains({"own": few, "other": few, "blank": few}) == {}


def untrained(model, seed):
    """The model with all weights random, so that it hears and sees something."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, float("norm" in name and "weight" in name), 0.1)
    return model.eval()


def test_models_that_learnt_nothing_gain_nothing_and_choose_by_chance(seeing, world_data):
    """What a grey picture does to all captions alike depends on the weights that were drawn, and is
    nothing in the mean over draws only."""
    (model, tokenizer), chats = seeing, Chats(world_data / "captions", "val")
    looking, grey = Gains(chats, 64, 256, tokenizer, seeing[0].image_spec), []
    for seed in range(8):
        nats = looking.nats(MACHINE, untrained(model, seed), 8)
        gains = looking.gains(nats)
        gain, error = gains["other"]
        assert error > 0 and abs(gain) <= 3 * error  # it does see, and is none the better for it
        grey.append(gains["blank"][0])
    assert abs(np.mean(grey)) <= 3 * np.std(grey, ddof=1) / len(grey) ** 0.5
    found = caption_choice(model, tokenizer, chats, 64)
    assert found.chance == 1 / 32
    assert abs(found.value - 1 / 32) <= 3 * (1 / 32 / 64) ** 0.5


# --------------------------------------------------------------------- rows of every kind, together


def test_rows_with_none_to_four_pictures_train_together_on_two_processes(pipeline, mixed, tmp_path):
    """Some micro-batches of one process have no picture at all while the other has some."""
    folder, _ = mixed
    common = [*ADAMW, f"--data={folder}", "--context=128", "--batch_tokens=512", "--micro_rows=1",
              "--val_chats=12"]
    settings = {"vision_pretrain": common, "vision_sft": [*common, "--text_data="]}
    commands = [[f"{stage}.py", *pipeline.flags(stage), *flags, f"--out={tmp_path}/two_{stage}"]
                for stage, flags in settings.items()]
    for said, status in finish(start(2, ROOT / "tests" / "several.py", json.dumps(commands))):
        assert status == 0, said
    for stage, flags in settings.items():
        pipeline.run_stage(stage, tmp_path / f"one_{stage}", *flags)
        assert_close(tmp_path / f"two_{stage}", tmp_path / f"one_{stage}")


def test_some_of_those_batches_have_no_picture(mixed):
    folder, tokenizer = mixed
    packed = Packed([Chats(folder, "train")], 48, tokenizer, SPEC)
    found = [packed.batch([row]).pixels for row in range(len(packed))]
    assert any(pixels is None for pixels in found)
    assert max(len(pixels) for pixels in found if pixels is not None) >= 4


# ------------------------------------------------------------------------------------------ workers


def batches_of(loader, steps):
    return [batch for step in steps for batch in loader.step(step)]


def assert_equal_batches(some, others):
    for one, other in zip(some, others, strict=True):
        for name in ("ids", "targets", "where", "positions", "segments", "pixels"):
            a, b = getattr(one, name), getattr(other, name)
            assert (a is None) == (b is None) and (a is None or a.equal(b)), name
        assert one.n_targets == other.n_targets


def test_workers_make_the_batches_that_a_thread_makes_from_any_step_on(mixed):
    folder, tokenizer = mixed
    packed = Packed([Chats(folder, "train")], 64, tokenizer, SPEC)
    expected = batches_of(Loader(packed, 4, 2, MACHINE, seed=5), range(5))
    state = torch.get_rng_state()
    found = Loader(packed, 4, 2, MACHINE, 5, workers=2)
    assert_equal_batches(batches_of(found, range(5)), expected)
    later = Loader(packed, 4, 2, MACHINE, 5, workers=1)
    assert_equal_batches(batches_of(later, [3]), expected[6:8])
    assert_equal_batches(batches_of(later, [1]), expected[2:4])
    assert torch.get_rng_state().equal(state)


def test_a_run_with_workers_takes_the_same_steps(pipeline, tmp_path):
    pipeline.run_stage("vision_pretrain", tmp_path / "workers", "--workers=2")
    assert log_rows(tmp_path / "workers")[-1]["val_loss"] == log_rows(
        pipeline.folder / "vision_pretrain")[-1]["val_loss"]
    assert not multiprocessing.active_children()


# ------------------------------------------------------------------------------- pictures that went


def test_a_picture_that_has_gone_costs_its_chat_and_no_other(mixed):
    folder, tokenizer = mixed
    chats = Chats(folder, "train")
    whole = Packed([chats], 64, tokenizer, SPEC)
    expected = whole.batch([0])
    victim = next(c for c in whole.rows[0] if chats.n_images(whole.chats["number"][c]))
    at = int(chats.image_offsets[chats.first_image[whole.chats["number"][victim]]])
    with open(folder / "train/images_000000.bin", "r+b") as file:
        file.seek(at)
        file.write(b"\0" * 20)
    found = next(Loader(Only(whole, 0), 1, 1, MACHINE, seed=0).step(0))
    assert len(found.lost) == 1 and "is not a readable picture" in found.lost[0]
    assert len(found.targets) == len(expected.targets) - whole.chats["n_targets"][victim]
    assert found.ids.equal(expected.ids) and found.pixels.shape == expected.pixels.shape


class Only:
    """One row of a data set."""

    name = "one row"

    def __init__(self, dataset, row):
        self.batch, self.n_targets = lambda rows: dataset.batch([row]), lambda rows: 1

    def __len__(self):
        return 1


def test_a_data_set_whose_pictures_were_cut_short_is_refused(mixed):
    folder, _ = mixed
    path = folder / "train/images_000000.bin"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="prepare it again"):
        Chats(folder, "train")


def test_padded_pictures_are_not_cropped_behind_ones_back(mixed):
    folder, tokenizer = mixed
    chats = Chats(folder, "train")
    chats.manifest["stored_images"] = {"size": 16, "fit": "pad", "copied": True}
    with pytest.raises(UserError, match="--fit=short"):
        Packed([chats], 64, tokenizer, ImageSpec(PATCHES, SIZE, "crop"))


def test_a_wish_to_stop_to_all_processes_leaves_the_workers_at_work(pipeline, tmp_path):
    """As torchrun, timeout and batch systems send it: the run saves and can go on."""
    out = tmp_path / "stopped"
    job = subprocess.Popen([sys.executable, ROOT / "vision_pretrain.py",
                            *pipeline.flags("vision_pretrain"), f"--out={out}", "--workers=2",
                            "--max_steps=100000", "--eval_every=0", "--save_every=0"],
                           stdout=subprocess.PIPE, text=True, start_new_session=True)
    for line in job.stdout:
        if line.startswith("step     3"):
            break
    os.killpg(job.pid, signal.SIGTERM)
    said = job.communicate(timeout=60)[0]
    assert job.returncode == 75 and "and saved; the same command resumes" in said, said
