"""evals/image_ablation.py, and training on chats with any number of images: on several processes
and with workers that decode."""

import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, encoded, log_rows, logged
from faults.harness import start_together
from PIL import Image
from test_distributed import ADAMW
from test_stages import assert_close
from test_tokenizer import say

from common.config import UserError
from common.device import Machine
from data import Chats, ImageSpec
from evals.image_ablation import AblatedChats, ImageAblation, ignored_images_warning, nats_by_chat
from evals.metrics import ratio, score
from evals.validation import ANSWER_TOKENS, answer_scores, caption_choice, exact_answers
from prep.writers import write_chats, write_manifest
from tokenizer import load
from train.loader import Loader, validation_loss
from train.packing import Packed
from vision import open_model

PATCHES, SIZE = 4, 16
SPEC = ImageSpec(PATCHES, SIZE)
KINDS = ("mismatched", "text_only", "blank")


def grey_image(shade):
    return encoded(Image.new("RGB", (SIZE, SIZE), (shade, shade, shade)))


def write(folder, tokenizer, counts, split):
    """A split of chats; chat i has counts[i] images, all of different greys."""
    shades = iter(range(256))
    return write_chats(folder / split, tokenizer, [
        (say("user", f"what is it, number {i}?", "assistant", "grey " * (1 + i % 3)),
         [grey_image(next(shades)) for _ in range(n)]) for i, n in enumerate(counts)])


@pytest.fixture
def tokenizer(world_data):
    return load(world_data / "scenes")


@pytest.fixture
def mixed(tokenizer, tmp_path):
    """A data folder of chats with none, one, two and four images."""
    counts = {split: write(tmp_path / "mixed", tokenizer, [0, 1, 0, 2, 0, 4] * n, split)
              for split, n in (("train", 8), ("val", 2))}
    write_manifest(tmp_path / "mixed", "images", tokenizer, **counts)
    return tmp_path / "mixed"


MACHINE = Machine(torch.device("cpu"), torch.float32)


def test_each_kind_of_image_with_the_same_targets(mixed, tokenizer):
    ablation = ImageAblation(Chats(mixed, "val"), 12, 128, tokenizer, SPEC, others=KINDS)
    sources = {kind: packed.sources[0] for kind, packed in ablation.packed.items()}
    for i in range(12):
        shown = {kind: chats.images(i, SPEC) for kind, chats in sources.items()}
        n = sources["correct"].chats.n_images(i)
        assert [len(shown[kind]) for kind in ("correct", *KINDS)] == [n, n, 0, n]
        for correct, mismatched, blank in zip(
                shown["correct"], shown["mismatched"], shown["blank"], strict=True):
            assert correct.tobytes() != mismatched.tobytes()
            assert blank.size == (SIZE, SIZE) and len(blank.getcolors()) == 1
    targets, lengths = {}, {}
    for kind, packed in ablation.packed.items():
        batch, lengths[kind] = packed.batch([*range(len(packed))]), packed.chats["length"].sum()
        targets[kind] = sorted(batch.targets.tolist())
        assert targets[kind] == targets["correct"]
        assert (batch.pixels is None) == (kind == "text_only")
    assert lengths["text_only"] < lengths["correct"] == lengths["blank"]


@pytest.mark.parametrize("stage", ["vision_pretrain", "vision_sft"])
def test_vision_stages_log_all_losses(pipeline, stage):
    names = ["val_loss", "val_loss_mismatched_image", "val_loss_text_only"]
    names += ["val_text_loss"] if stage == "vision_sft" else []
    assert sorted(logged(pipeline.folder / stage, *names)) == sorted(
        (step, name) for step in (2, 5) for name in names)


def test_a_model_that_ignores_images_causes_a_warning(pipeline, tmp_path):
    said = pipeline.run_stage("vision_pretrain", tmp_path / "still", "--lr=1e-9", "--muon_lr=1e-9")
    assert "ignores images" in said
    good = {"val_loss": 1.0, "val_loss_mismatched_image": 1.2, "val_loss_text_only": 1.1}
    assert ignored_images_warning(good) == ""
    assert "-0.100" in ignored_images_warning({**good, "val_loss_text_only": 0.9})


@pytest.fixture
def model(pipeline):
    """The model of the last stage, after six steps almost untrained."""
    return open_model(pipeline.folder / "vision_sft")[0]


def nats_of(ablation, model, micro_rows):
    return {kind: nats_by_chat(MACHINE, model, packed, micro_rows)
            for kind, packed in ablation.packed.items()}


def test_the_nats_of_the_chats_sum_up_to_the_loss(model, tokenizer, mixed):
    ablation = ImageAblation(Chats(mixed, "val"), 12, 128, tokenizer, model.image_spec, KINDS)
    nats = nats_of(ablation, model, 3)
    for kind, packed in ablation.packed.items():
        assert len(nats[kind]) == len(packed.chats)
        loss = validation_loss(MACHINE, packed, 3, model, len(packed))
        assert score([*nats[kind].values()], ratio).value == pytest.approx(loss, rel=1e-5)
    for number, (_, tokens) in nats["correct"].items():
        assert tokens == nats["text_only"][number][1] == nats["blank"][number][1]
    alone = Packed([AblatedChats(Chats(mixed, "val"), 12, tokenizer, lengths={3: None})], 128,
                   tokenizer, model.image_spec)
    assert nats_by_chat(MACHINE, model, alone, 1)[3] == pytest.approx(nats["correct"][3],
                                                                          rel=1e-4)


def test_gains_by_hand(mixed, tokenizer, monkeypatch):
    """Mismatched images cost one nat per token more; chats without images do not count."""
    ablation = ImageAblation(Chats(mixed, "val"), 12, 128, tokenizer, SPEC)
    correct = {number: (2.0 * tokens, tokens) for number, tokens in enumerate(range(1, 13))}
    other = {number: (3.0 * tokens, tokens) for number, (_, tokens) in correct.items()}
    text = {number: pair for number, pair in other.items() if number % 2 == 0}
    gains = ablation.gains({"correct": correct, "mismatched": other, "blank": {**correct, **text}})
    assert gains["mismatched"] == pytest.approx((1.0, 0.0, 0.0), abs=1e-9)
    assert gains["blank"] == (0.0, 0.0, 0.0)  # chats 0, 2, 4 ... have no images
    assert score([(1, 1), (0, 1)], ratio).error == pytest.approx(0.5 / 2**0.5, rel=0.1)
    with monkeypatch.context() as patch:  # as if all chats showed one image
        patch.setattr(Chats, "cluster", lambda chats, i: 0)
        uneven = {number: (loss + number, n) for number, (loss, n) in other.items()}
        assert ablation.gains(dict.fromkeys(("correct", "blank"), correct)
                              | {"mismatched": uneven})["mismatched"].error < 1e-9
    few = {number: correct[number] for number in (0, 2, 4)}
    assert ablation.gains(dict.fromkeys(("correct", "mismatched", "blank"), few)) == {}


def test_untrained_models_gain_nothing_and_choose_captions_by_chance(model, tokenizer, world_data):
    """What a blank image does to all captions depends on the random weights: zero in the mean."""
    chats = Chats(world_data / "captions", "val")
    ablation = ImageAblation(chats, 64, 256, tokenizer, model.image_spec, others=KINDS)
    blank = []
    for seed in range(8):
        torch.manual_seed(seed)
        for name, p in model.named_parameters():
            torch.nn.init.normal_(p, float("norm" in name and "weight" in name), 0.1)
        gains = ablation.gains(nats_of(ablation, model.eval(), 8))
        gain, error, _ = gains["mismatched"]
        assert error > 0 and abs(gain) <= 3 * error
        blank.append(gains["blank"].value)
    assert abs(np.mean(blank)) <= 3 * np.std(blank, ddof=1) / len(blank) ** 0.5
    found = caption_choice(model, tokenizer, chats, 64)
    assert found.chance == 1 / 32
    assert abs(found.value - 1 / 32) <= 3 * (1 / 32 / 64) ** 0.5


def test_turns_of_a_chat_and_chats_about_an_image_are_one_sample(
        model, tokenizer, tmp_path, monkeypatch):
    """20 chats with 4 turns each, all right or all wrong; pairs of chats share their image."""
    for name, images in ("scenes", [[grey_image(i // 2)] for i in range(20)]), ("chats", [[]] * 20):
        write_chats(tmp_path / name / "val", tokenizer, [
            (say("user", "?", "assistant", "a"), some) for some in images])
    marks = [(number // 2 % 2 == 0, number) for number in range(20) for _ in range(4)]
    monkeypatch.setattr("evals.validation.exact_answers", lambda *args: {"": marks})
    found = {}
    for part in answer_scores(model, tokenizer, tmp_path, "vision_sft", 20, "val"):
        found |= part
    assert found["chat_exact"].error == pytest.approx(0.5 / 20**0.5, rel=0.08)
    assert found["vqa_exact"].error == pytest.approx(0.5 / 10**0.5, rel=0.08)


def test_the_same_turns_are_asked_with_and_without_images(model, tokenizer, tmp_path):
    """Only without its image would the longer question leave room for an answer."""
    P = model.image_spec.n_patches
    n = model.config.max_positions - ANSWER_TOKENS - 4  # 4: special tokens
    write_chats(tmp_path / "val", tokenizer, [
        (say("user", "." * (n - P + more), "assistant", "a"), [grey_image(9)]) for more in (0, 1)])
    for kind in ("correct", "mismatched", "text_only"):
        marks = exact_answers(model, tokenizer, Chats(tmp_path, "val"), 2, kind)[""]
        assert [number for _, number in marks] == [0]


def test_of_a_caption_that_is_too_long_for_another_prompt_the_beginning_counts(
        model, tokenizer, tmp_path):
    rows = []
    room = model.config.max_positions - model.image_spec.n_patches
    for i, (n_prompt, n_answer) in enumerate([(1, room - 6), (40, 9), (30, 9), (20, 9)]):
        asked, answer = "." * n_prompt, f"{i}" + "." * (n_answer - 1)
        assert [len(tokenizer.encode(text)) for text in (asked, answer)] == [n_prompt, n_answer]
        rows.append((say("user", asked, "assistant", answer), [grey_image(i)]))
    write_chats(tmp_path / "val", tokenizer, rows)
    found = caption_choice(model, tokenizer, Chats(tmp_path, "val"), 9)
    assert found.chance == 1 / 4 and found.value * 4 in range(5)


def test_two_processes_train_on_rows_with_and_without_images(pipeline, mixed, tokenizer, tmp_path):
    """Some micro-batches of one process have no images while those of the other have some."""
    packed = Packed([Chats(mixed, "train")], 128, tokenizer, SPEC)
    n_images = {0 if pixels is None else len(pixels) for pixels in (
        packed.batch([row]).pixels for row in range(len(packed)))}
    assert min(n_images) == 0 and max(n_images) >= 4
    common = [*ADAMW, f"--data={mixed}", "--context=128", "--batch_tokens=512", "--micro_rows=1",
              "--val_chats=12", "--max_steps=2"]
    settings = {"vision_pretrain": common, "vision_sft": [*common, "--text_data="]}
    for stage, flags in settings.items():
        jobs = start_together(2, f"{stage}.py", *pipeline.flags(stage), *flags,
                              f"--out={tmp_path}/two_{stage}")
        assert [job.wait() for job in jobs] == [0, 0], jobs[0].said
        pipeline.run_stage(stage, tmp_path / f"one_{stage}", *flags)
        assert_close(tmp_path / f"two_{stage}", tmp_path / f"one_{stage}")


def batches_of(loader, steps):
    return [batch for step in steps for batch in loader.step(step)]


def assert_equal_batches(some, others):
    for one, other in zip(some, others, strict=True):
        for name in ("ids", "targets", "where", "positions", "segments", "pixels"):
            a, b = getattr(one, name), getattr(other, name)
            assert (a is None) == (b is None) and (a is None or a.equal(b)), name
        assert one.n_targets == other.n_targets


def test_workers_and_a_thread_make_the_same_batches_from_any_step_on(mixed, tokenizer):
    packed = Packed([Chats(mixed, "train")], 64, tokenizer, SPEC)
    expected = batches_of(Loader(packed, 4, 2, MACHINE, seed=5), range(5))
    state = torch.get_rng_state()
    found = Loader(packed, 4, 2, MACHINE, 5, workers=2)
    assert_equal_batches(batches_of(found, range(5)), expected)
    later = Loader(packed, 4, 2, MACHINE, 5, workers=1)
    assert_equal_batches(batches_of(later, [3]), expected[6:8])
    assert_equal_batches(batches_of(later, [1]), expected[2:4])
    assert torch.get_rng_state().equal(state)


def test_a_run_with_workers_is_identical(pipeline, tmp_path):
    pipeline.run_stage("vision_pretrain", tmp_path / "workers", "--workers=2")
    assert log_rows(tmp_path / "workers")[-1]["val_loss"] == log_rows(
        pipeline.folder / "vision_pretrain")[-1]["val_loss"]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_and_truncated_images_are_refused(mixed, tokenizer, workers):
    packed = Packed([Chats(mixed, "train")], 64, tokenizer, SPEC)
    path = mixed / "train/images_000000.bin"
    with open(path, "r+b") as file:
        file.write(b"\0" * 20)
    loader = Loader(packed, len(packed), len(packed), MACHINE, 0, workers)
    with pytest.raises(UserError, match=r"^.*train is damaged; prepare it again: image 0 is .*$"):
        next(loader.step(0))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="prepare it again"):
        Chats(mixed, "train")


def test_padded_images_are_not_cropped(mixed, tokenizer):
    chats = Chats(mixed, "train")
    chats.manifest["stored_images"] = {"size": 16, "fit": "pad"}
    with pytest.raises(UserError, match="--fit=short"):
        Packed([chats], 64, tokenizer, ImageSpec(PATCHES, SIZE, "crop"))


@pytest.mark.slow
def test_a_signal_to_all_processes_saves_the_run(pipeline, tmp_path):
    """As torchrun, timeout and batch systems send it, workers included."""
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
    assert job.returncode == 75 and "saved" in said, said
