"""The claims of clip_pretrain.py: the batch in pieces or whole, and classes told apart by name."""

import math
import shutil

import pytest
import torch
from conftest import logged, newest, run
from faults.harness import server
from PIL import Image
from test_clip import MACHINE, TINY, new_clip, random_images
from test_distributed import ADAMW
from test_stages import assert_close

import tokenizer as tokenizers
from clip import contrast, feature_pulls, normalise
from common.config import UserError
from common.device import Machine
from common.images import to_pixels
from data import Batch, Chats, ImageSpec
from evals.zero_shot import Labelled, caption_ids, zero_shot
from train.packing import Captions

# ------------------------------------------------------------------------------ batches in pieces

KEYS = torch.tensor([0, 1, 2, 3, 0, 4, 1, 1])  # the same captions in different micro-batches


def gradients(n, machine=MACHINE):
    """(loss, {name: gradient}) of 8 pairs in n micro-batches."""
    model, _ = new_clip(TINY)
    pixels = random_images(8, TINY.image_size)
    ids = torch.stack((KEYS + 1, KEYS + 11, torch.full((8,), TINY.end_id)), dim=1)
    batches = [Batch(i, pixels=p, keys=k) for i, p, k in
               zip(ids.chunk(n), pixels.chunk(n), KEYS.chunk(n), strict=True)]
    loss = 0
    for batch, pull in zip(batches, feature_pulls(model, batches, machine), strict=True):
        with machine.autocast():
            share = pull(model(normalise(batch.pixels), batch.ids))
        share.backward()
        loss += share.item()
    # Softmax does not see a bias of the keys, so its gradient is nothing but rounding.
    return loss, {name: p.grad for name, p in model.named_parameters() if "k_proj.bias" not in name}


@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_batch_in_pieces_has_the_loss_and_the_gradient_of_the_whole(n):
    (loss, whole), (same_loss, pieces) = gradients(1), gradients(n)
    assert same_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in whole.items():
        assert gradient.any(), name
        assert (pieces[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_a_batch_in_pieces_has_the_same_gradient_in_bf16():
    """But for its rounding, of three digits."""
    machine = Machine(torch.device("cpu"), torch.bfloat16)
    (loss, whole), (same_loss, pieces) = gradients(1, machine), gradients(4, machine)
    assert same_loss == pytest.approx(loss, rel=1e-2)
    for name, gradient in whole.items():
        assert (pieces[name] - gradient).norm() <= 0.05 * gradient.norm(), name


def test_the_loss_is_made_in_fp32_even_where_the_towers_are_not():
    """A right answer with a logit of 100 beside a wrong one of 99.9."""
    images = torch.eye(2)
    texts = torch.tensor([[1.0, 0.0], [0.999, 0.001**0.5]])
    expected = contrast(images, texts, torch.tensor(100.0), torch.arange(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = contrast(images, texts, torch.tensor(100.0), torch.arange(2))
    assert found.equal(expected)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Five pictures of three classes, one of them not a picture, and a hidden file."""
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
    """The folder of the same two steps in different pieces, by one process and by two."""
    folder = tmp_path_factory.mktemp("pieces")
    flags = [*pipeline.flags("clip_pretrain"), *ADAMW, "--max_steps=2", "--eval_every=1",
             f"--zero_shot={labelled}"]
    pipeline.run_stage("clip_pretrain", folder / "one", *flags)
    pipeline.run_stage("clip_pretrain", folder / "one_in_four", *flags, "--micro_pairs=4")
    for n in 1, 2:
        jobs = server().start_together(2, "clip_pretrain.py", *flags, f"--out={folder}/two_in_{n}",
                                       f"--micro_pairs={8 // n}")
        assert [job.wait() for job in jobs] == [0, 0], jobs[0].said + jobs[1].said
    return folder


@pytest.mark.parametrize("pieces", ["one_in_four", "two_in_1", "two_in_2"])
def test_any_number_of_processes_and_micro_batches_takes_the_same_steps(runs, pieces):
    assert_close(runs / pieces, runs / "one")
    assert len(logged(runs / "one", "loss")) == 2
    shares = logged(runs / "one", "zero_shot")
    assert len(shares) == 2 and logged(runs / pieces, "zero_shot") == shares


def test_fp16_scales_the_gradients_of_pieces_as_well(pipeline, tmp_path):
    """Halved from 65,536 until they fit: the first steps are too large and change nothing. Pieces
    may fit one step earlier, so the steps here are too small for that to matter."""
    for name, pieces in (("whole", 0), ("pieces", 4)):
        said = pipeline.run_stage("clip_pretrain", tmp_path / name, "--precision=fp16", *ADAMW,
                                  "--lr=1e-9", "--max_steps=6", f"--micro_pairs={pieces}")
        assert "step 0 skipped: " in said
    found, whole = ({place: figure for place, figure in
                     logged(tmp_path / name, "loss", "grad_norm").items() if math.isfinite(figure)}
                    for name in ("pieces", "whole"))
    assert {(step, "grad_norm") for step in (4, 5)} <= whole.keys() <= found.keys()
    assert {place: found[place] for place in whole} == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize(("flag", "complaint"), [
    ("--micro_pairs=-1", "--micro_pairs=-1: it must be at least 0"),
    ("--zero_shot=nowhere", "there is no folder --zero_shot=nowhere"),
])
def test_mistakes_are_named(pipeline, tmp_path, flag, complaint):
    argv = [*pipeline.flags("clip_pretrain"), f"--out={tmp_path}/run", flag]
    assert complaint in run("clip_pretrain.py", *argv).refusal


def test_the_tower_of_a_run_in_pieces_is_one_to_see_with(pipeline, runs, tmp_path):
    pipeline.run_stage("vision_pretrain", tmp_path, f"--clip={runs}/one_in_four", "--max_steps=1")


# --------------------------------------------------------------------------------------- zero-shot


class Colours(torch.nn.Module):
    """Sees how red, green and blue a picture is; reads a caption by `known`."""

    def __init__(self, tokenizer, known):
        super().__init__()
        self.config, self.tokenizer, self.known = TINY, tokenizer, known

    def image_features(self, pixels):
        return torch.nn.functional.normalize(pixels.mean((2, 3)), dim=-1)

    def text_features(self, ids):
        captions = [self.tokenizer.decode(row[1 : row.index(self.tokenizer.end)])
                    for row in ids.tolist()]
        return torch.tensor([self.known[caption] for caption in captions])


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(["a photo of a few words"], 300)


@pytest.fixture
def colours(tokenizer, monkeypatch):
    monkeypatch.setattr(TINY, "context", 77)
    return Colours(tokenizer, {"one red circle": [1.0, -0.5, -0.5], "one thing": [0.0, 1.0, -1.0],
                               "one blue square": [-0.5, -0.5, 1.0]})


def test_pictures_are_told_apart_by_the_names_of_their_folders(
        labelled, tokenizer, colours, tmp_path, capsys):
    pictures = Labelled(labelled, "one {}")
    assert zero_shot(colours, tokenizer, pictures, MACHINE, batch=2) == 1
    assert zero_shot(colours, tokenizer, pictures, MACHINE) == 1
    said = capsys.readouterr().err
    assert "1 pictures left out" in said and "broken.jpg is not a readable picture" in said
    shutil.copytree(labelled, tmp_path / "labelled")
    (tmp_path / "labelled/red_circle/red.png").rename(tmp_path / "labelled/blue_square/red.png")
    assert zero_shot(colours, tokenizer, Labelled(tmp_path / "labelled", "one {}"),
                     MACHINE) == pytest.approx(4 / 5)


def test_a_class_is_named_as_captions_are_in_training(pipeline):
    """By the ids of packing.Captions, whose captions the text tower knows."""
    tokenizer = tokenizers.load(pipeline.data / "captions")
    captions = Captions(Chats(pipeline.data / "captions", "val"), tokenizer, ImageSpec(1, 32), 64)
    for i in range(8):
        text = tokenizer.decode(captions.caption(i)[1:-1])
        assert caption_ids(tokenizer, [text], 64).tolist() == [captions.caption(i)]
    longest, shortest = caption_ids(tokenizer, ["a circle " * 99, "a"], 64)
    assert len(longest) == 64 and longest[-1] == tokenizer.end
    assert shortest[0] == tokenizer.end_of_text and (shortest == tokenizer.end).sum() > 50


def test_a_picture_is_fitted_as_the_model_was_trained(labelled, tokenizer, colours, monkeypatch):
    seen = []
    monkeypatch.setattr("evals.zero_shot.to_pixels", lambda images, size, how: (
        seen.append(how), to_pixels(images, size, how))[1])
    for how in ("crop", "pad"):
        monkeypatch.setattr(TINY, "fit", how)
        zero_shot(colours, tokenizer, Labelled(labelled, "one {}"), MACHINE)
    assert seen == ["crop"] * 5 + ["pad"] * 5


@pytest.mark.parametrize(("files", "prompt", "complaint"), [
    ((), "a {}", "0 classes with 0 pictures"),
    (("cat/", "dog/"), "a {}", "2 classes with 0 pictures"),
    (("cat/1.png",), "a {}", "1 classes with 1 pictures: it needs a subfolder"),
    (("cat/1.png", "dog/1.png"), "a cat", "needs a {} where the name"),
])
def test_what_is_no_folder_of_classes_is_a_sentence(tmp_path, files, prompt, complaint):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=complaint):
        Labelled(tmp_path, prompt)


def test_a_folder_of_unreadable_pictures_is_a_sentence(tmp_path, tokenizer, colours):
    for name in ("thing", "red_circle"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"x")
    with pytest.raises(UserError, match="not one picture"):
        zero_shot(colours, tokenizer, Labelled(tmp_path, "one {}"), MACHINE)


def test_eval_scores_classes_with_captions_or_without(pipeline, runs, labelled, tmp_path):
    checkpoint, flag = newest(runs / "one"), f"--zero_shot={labelled}"
    shares = []
    for data in (pipeline.data, tmp_path):
        result = run("eval.py", checkpoint, flag, f"--data={data}", "--device=cpu")
        assert result.status == 0 and "broken.jpg" in result.err
        assert ("clip_choice32" in result.out) == (data != tmp_path)
        shares += [float(line.split()[1]) for line in result.out.splitlines() if "zero" in line]
    logs = logged(runs / "one", "zero_shot")
    assert shares == [pytest.approx(logs[1, "zero_shot"], abs=1e-4)] * 2
    refusal = run("eval.py", newest(pipeline.folder / "pretrain"), flag,
                  f"--data={pipeline.data}").refusal
    assert "is for a CLIP" in refusal
