"""The claims of bench.py: every stage's config can be timed, and what it prints adds up."""

import json

import pytest
from conftest import ROOT, STAGES, TINY, run

SMALL = ("--steps=1", "--device=cpu", "--precision=fp32")
DECODER = "n_layer = 2\nn_head = 2\nn_embd = 32\nmax_positions = 256\n"
TOWERS = ("image_size = 32\npatch_size = 8\nvision_width = 32\nvision_layers = 1\n"
          "vision_heads = 2\ntext_width = 32\ntext_layers = 1\ntext_heads = 2\nembed_dim = 32\n")


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """A folder of configs as tiny as the tests' models."""
    folder = tmp_path_factory.mktemp("configs")
    for stage in STAGES:
        text = {"pretrain": DECODER, "clip_pretrain": TOWERS}.get(stage, "")
        (folder / f"{stage}.py").write_text(text, encoding="utf-8")
    return folder


def figures_of(result):
    assert result.status == 0, result.err
    return json.loads(result.out.splitlines()[-1])


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_of_every_stage_can_be_timed(configs, stage):
    flags = [flag for flag in TINY[stage] if "text_share" not in flag]
    figures = figures_of(run("bench.py", configs / f"{stage}.py", *SMALL, *flags))
    unit = "img" if stage == "clip_pretrain" else "tok"
    rate = figures[f"{unit}_per_step"] / figures["ms"] * 1e3
    assert figures["stage"] == stage
    assert figures[f"{unit}_per_s"] == pytest.approx(rate, rel=1e-3)
    assert 0 < figures["mfu"] < 1 and figures["host_gb"] > 0
    assert figures["slowest_ms"] >= figures["ms"] > 0


def test_decoding_can_be_timed(configs):
    figures = figures_of(run("bench.py", configs / "pretrain.py", "--decode=True", "--device=cpu"))
    assert figures["tok_per_s"] == pytest.approx(1e3 / figures["ms"], rel=1e-3)
    assert 0 < figures["share_of_bandwidth"] < 1


@pytest.mark.parametrize(("argv", "complaint"), [
    ((), "say which config to time"),
    (("configs/full/nothing.py",), "its name must be a stage's"),
    (("configs/full/sft.py", "--stepz=3"), "there is no setting 'stepz'"),
    (("--peer=nowhere.py",), "--peer=nowhere.py is no Python file"),
])
def test_mistakes_are_named(argv, complaint, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert complaint in run("bench.py", *argv).refusal
