"""clip_pretrain.py: full-batch gradients in micro-batches, and zero-shot classification."""

import math
import shutil

import pytest
import torch
from conftest import logged, newest, run
from faults.harness import start_together
from PIL import Image
from test_clip import MACHINE, TINY, new_clip, random_images
from test_distributed import ADAMW
from test_stages import assert_close, assert_same_weights, weights

import tokenizer as tokenizers
from clip import caption_ids, contrast, feature_pulls, normalise
from clip_pretrain import Config
from common.config import UserError
from common.device import Machine
from common.images import to_pixels
from data import Batch, Chats, ImageSpec
from evals.zero_shot import Labelled, zero_shot
from train.packing import Captions

KEYS = torch.tensor([0, 1, 2, 3, 0, 4, 1, 1])  # equal captions in different micro-batches


def gradients(n, machine=MACHINE):
    """(loss, {name: gradient}) of 8 pairs in n micro-batches."""
    model, _ = new_clip(TINY)
    pixels = random_images(8, TINY.image_size)
    ids = torch.stack((KEYS + 1, KEYS + 11, torch.full((8,), TINY.end_id)), dim=1)
    batches = [Batch(i, pixels=p, keys=k) for i, p, k in
               zip(ids.chunk(n), pixels.chunk(n), KEYS.chunk(n), strict=True)]
    total = 0
    for batch, pull in zip(batches, feature_pulls(model, batches, machine), strict=True):
        with machine.autocast():
            share = pull(model(normalise(batch.pixels), batch.ids))
        share.backward()
        total += share.item()
    # Softmax does not depend on a bias of the keys, so its gradient is nothing but rounding.
    return total, {name: p.grad for name, p in model.named_parameters()
                   if "k_proj.bias" not in name}


@pytest.mark.parametrize(("n", "dtype", "tolerance"), [
    (2, torch.float32, 1e-5), (4, torch.float32, 1e-5), (8, torch.float32, 1e-5),
    (4, torch.bfloat16, 0.05)], ids=str)
def test_micro_batches_give_the_full_batch_gradient(n, dtype, tolerance):
    machine = Machine(torch.device("cpu"), dtype)
    (expected_loss, expected), (found_loss, found) = gradients(1, machine), gradients(n, machine)
    assert found_loss == pytest.approx(expected_loss, rel=tolerance)
    for name, gradient in expected.items():
        assert gradient.any(), name
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("name", ["patch_size", "vision_heads", "text_heads"])
def test_sizes_that_do_not_divide_are_named(name):
    with pytest.raises(UserError, match=f"--{name}=9 does not divide --"):
        Config(**{name: 9}).clip(tokenizers.load("gpt2"))


def test_the_loss_is_computed_in_fp32_under_autocast():
    """For a correct logit of 100 beside an incorrect one of 99.9."""
    images = torch.eye(2)
    texts = torch.tensor([[1.0, 0.0], [0.999, 0.001**0.5]])
    expected = contrast(images, texts, torch.tensor(100.0), torch.arange(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = contrast(images, texts, torch.tensor(100.0), torch.arange(2))
    assert found.equal(expected)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Five images of three classes, one of them unreadable, and a hidden file."""
    folder = tmp_path_factory.mktemp("labelled")
    colours = {"red_circle": ("red", "darkred"), "blue_square": ("blue",),
               "thing": ("green", "yellow")}
    for name, shades in colours.items():
        (folder / name).mkdir()
        for shade in shades:
            Image.new("RGB", (40, 30), shade).save(folder / name / f"{shade}.png")
    (folder / "thing/broken.jpg").write_bytes(b"nothing")
    (folder / "thing/.hidden").write_bytes(b"nothing")
    return folder


@pytest.fixture(scope="module")
def runs(pipeline, labelled, tmp_path_factory):
    """The folder of the same two steps in different micro-batches, by one process and by two."""
    folder = tmp_path_factory.mktemp("micro")
    flags = [*pipeline.flags("clip_pretrain"), *ADAMW, "--max_steps=2", "--eval_every=1",
             f"--zero_shot={labelled}"]
    pipeline.run_stage("clip_pretrain", folder / "one", *flags)
    pipeline.run_stage("clip_pretrain", folder / "one_in_four", *flags, "--micro_pairs=4")
    jobs = start_together(2, "clip_pretrain.py", *flags, f"--out={folder}/two_in_two",
                                   "--micro_pairs=4")
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].said + jobs[1].said
    return folder


@pytest.mark.parametrize("name", ["one_in_four", "two_in_two"])
def test_any_processes_and_micro_batches_take_the_same_steps(runs, name):
    assert_close(runs / name, runs / "one")
    assert len(logged(runs / "one", "loss")) == 2
    accuracies = logged(runs / "one", "zero_shot")
    assert len(accuracies) == 2 and logged(runs / name, "zero_shot") == accuracies


def test_the_training_and_the_validation_loss_are_one_quantity(pipeline, tmp_path):
    """Without training they are equal, up to the choice of pairs; in batches of 32 they are not."""
    pipeline.run_stage("clip_pretrain", tmp_path, "--lr=0", "--muon_lr=0", "--max_steps=1")
    loss, val_loss = logged(tmp_path, "loss", "val_loss").values()
    assert val_loss == pytest.approx(loss, abs=0.2)


def test_a_limited_scale_resumes_exactly(pipeline, tmp_path):
    flags = ("--lr=5", "--cooldown=0")
    pipeline.run_stage("clip_pretrain", tmp_path / "one", *flags)
    shutil.copytree(tmp_path / "one", tmp_path / "resumed")
    shutil.rmtree(newest(tmp_path / "resumed"))
    pipeline.run_stage("clip_pretrain", tmp_path / "resumed", *flags)
    assert_same_weights(tmp_path / "one", tmp_path / "resumed")
    assert 0 <= weights(tmp_path / "one")["logit_scale"] <= math.log(100) + 1e-6


def test_fp16_scales_the_gradients_of_micro_batches(pipeline, tmp_path):
    """The scale is halved from 65,536 until gradients fit: the first steps are skipped. With micro-
    batches that may be one step fewer; the learning rate is so small that this does not matter."""
    for name, micro_pairs in (("full", 0), ("micro", 4)):
        said = pipeline.run_stage("clip_pretrain", tmp_path / name, "--precision=fp16", *ADAMW,
                                  "--lr=1e-9", "--max_steps=6", f"--micro_pairs={micro_pairs}")
        assert "step 0 skipped: " in said
    micro, full = ({place: figure for place, figure in
                    logged(tmp_path / name, "loss", "grad_norm").items() if math.isfinite(figure)}
                   for name in ("micro", "full"))
    assert {(step, "grad_norm") for step in (4, 5)} <= full.keys() <= micro.keys()
    assert {place: micro[place] for place in full} == pytest.approx(full, rel=0.02)


class Colours(torch.nn.Module):
    """A CLIP whose image features are mean colours and whose text features are a table."""

    def __init__(self, tokenizer, features):
        super().__init__()
        self.config, self.tokenizer, self.features = TINY, tokenizer, features

    def image_features(self, pixels):
        return torch.nn.functional.normalize(pixels.mean((2, 3)), dim=-1)

    def text_features(self, ids):
        captions = [self.tokenizer.decode(row[1 : row.index(self.tokenizer.end)])
                    for row in ids.tolist()]
        return torch.tensor([self.features[caption] for caption in captions])


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(["a photo of a few words"], 300)


@pytest.fixture
def colours(tokenizer, monkeypatch):
    monkeypatch.setattr(TINY, "context", 77)
    return Colours(tokenizer, {"one red circle": [1.0, -0.5, -0.5], "one thing": [0.0, 1.0, -1.0],
                               "one blue square": [-0.5, -0.5, 1.0]})


@pytest.mark.parametrize("how", ["crop", "pad"])
def test_images_are_classified_by_the_names_of_their_folders(
        labelled, tokenizer, colours, tmp_path, capsys, monkeypatch, how):
    """And fitted as in training."""
    seen = []
    monkeypatch.setattr("evals.zero_shot.to_pixels", lambda images, size, how: (
        seen.append(how), to_pixels(images, size, how))[1])
    monkeypatch.setattr(TINY, "fit", how)
    images = Labelled(labelled, "one {}")
    assert zero_shot(colours, tokenizer, images, MACHINE, batch=2) == (5, 5)
    assert zero_shot(colours, tokenizer, images, MACHINE) == (5, 5)
    assert set(seen) == {how} and "broken.jpg" in capsys.readouterr().err
    shutil.copytree(labelled, tmp_path / "labelled")
    (tmp_path / "labelled/red_circle/red.png").rename(tmp_path / "labelled/blue_square/red.png")
    assert zero_shot(colours, tokenizer, Labelled(tmp_path / "labelled", "one {}"),
                     MACHINE) == (4, 5)


def test_class_names_are_tokenized_as_captions_in_training(pipeline):
    tokenizer = tokenizers.load(pipeline.data / "captions")
    captions = Captions(Chats(pipeline.data / "captions", "val"), tokenizer, ImageSpec(1, 32), 64)
    for i in range(8):
        text = tokenizer.decode(captions.caption(i)[1:-1])
        assert caption_ids(tokenizer, [text], 64).tolist() == [captions.caption(i)]
    longest, shortest = caption_ids(tokenizer, ["a circle " * 99, "a"], 64)
    assert len(longest) == 64 and longest[-1] == tokenizer.end
    assert shortest[0] == tokenizer.end_of_text and (shortest == tokenizer.end).sum() > 50


@pytest.mark.parametrize(("files", "prompt", "message"), [
    ((), "a {}", "0 classes"),
    (("cat/1.png",), "a {}", "1 classes"),
    (("cat/1.png", "dog/1.png"), "a cat", "{}"),
    (("thing/1.png", "red_circle/1.png"), "one {}", "readable"),
])
def test_folders_without_readable_classes_are_refused(tmp_path, tokenizer, colours, files, prompt,
                                                      message):
    for name in files:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=message):
        zero_shot(colours, tokenizer, Labelled(tmp_path, prompt), MACHINE)


def test_eval_scores_zero_shot_with_and_without_captions(pipeline, runs, labelled, tmp_path):
    checkpoint, flag = newest(runs / "one"), f"--zero_shot={labelled}"
    accuracies = []
    for data in (pipeline.data, tmp_path):
        result = run("eval.py", checkpoint, flag, f"--data={data}", "--device=cpu")
        assert result.status == 0 and "broken.jpg" in result.err
        assert ("clip_choice32" in result.out) == (data != tmp_path)
        accuracies += [float(line.split()[1]) for line in result.out.splitlines() if "zero" in line]
    logs = logged(runs / "one", "zero_shot")
    assert accuracies == [pytest.approx(logs[1, "zero_shot"], abs=1e-4)] * 2
    decoder = newest(pipeline.folder / "pretrain")
    assert "CLIP" in run("eval.py", decoder, flag, f"--data={pipeline.data}").refusal
