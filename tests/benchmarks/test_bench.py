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
    assert 0 <= figures["waited"] < 1
    sees = stage not in ("pretrain", "sft")
    assert ("img_per_s" in figures) == ("decode_img_per_s_per_core" in figures) == sees
    if sees:
        rate = figures["img_per_step"] / figures["ms"] * 1e3
        assert figures["img_per_s"] == pytest.approx(rate, rel=1e-3)
        assert figures["img_per_step"] > 1
        assert figures["stored_img_per_s_per_core"] > figures["decode_img_per_s_per_core"] > 0


def test_a_vision_step_can_be_timed_beside_that_of_transformers(configs):
    figures = figures_of(run("bench.py", configs / "vision_pretrain.py", *SMALL,
                             *TINY["vision_pretrain"], "--peer=transformers"))
    ratio = figures["ours_img_per_s"] / figures["transformers_img_per_s"]
    assert figures["times_transformers"] == pytest.approx(ratio, rel=1e-3)
    assert figures["img_per_step"] > 4 and figures["transformers_positions"] > 0
    ratio = figures["ours_peak_gb"] / figures["transformers_peak_gb"]
    assert figures["memory_of_transformers"] == pytest.approx(ratio, rel=1e-2)


def test_the_operations_that_take_the_most_time_are_listed(configs):
    flags = ("--context=64", "--batch_tokens=512", "--profile=True")
    result = run("bench.py", configs / "pretrain.py", *SMALL, *flags)
    figures = figures_of(result)
    lines = [line.split() for line in result.out.splitlines()]
    table = lines[lines.index(["ms", "a", "step", "share", "operation"]) + 1 : -2]
    times = [float(line[0]) for line in table]
    assert len(times) == 10 and times == sorted(times, reverse=True)
    assert "aten::mm" in [line[2] for line in table]
    assert 0 < sum(times) <= figures["operations_ms"] * 1.01


@pytest.fixture
def briefly(monkeypatch):
    """Fewer tokens than anybody would measure."""
    for name, value in {"PROMPT": 16, "TOKENS": 8, "BATCHES": (1, 3), "REPEATS": 1}.items():
        monkeypatch.setattr(f"benchmarks.decoding.{name}", value)


def test_talking_can_be_timed_beside_generate_of_transformers(configs, briefly):
    figures = figures_of(run("bench.py", "decode", configs / "pretrain.py", "--device=cpu",
                             "--precision=fp32", "--peer=transformers"))
    assert figures["same_text"]
    ratio = figures["fp32_tok_per_s"] / figures["transformers_fp32_tok_per_s"]
    assert figures["fp32_times_transformers_fp32"] == pytest.approx(ratio, rel=1e-2)
    ratio = figures["fp32_batch_3_tok_per_s"] / figures["fp32_batch_1_tok_per_s"]
    assert figures["batch_3_times_one"] == pytest.approx(ratio, rel=1e-2)
    assert 0 < figures["int8_share_of_bandwidth"] < 1 and "first_token_image_ms" not in figures


def test_the_first_token_about_a_picture_and_the_second_question_can_be_timed(configs, briefly):
    figures = figures_of(run("bench.py", "decode", configs / "vision_sft.py", "--device=cpu"))
    ratio = figures["second_turn_ms"] / figures["first_token_image_ms"]
    assert figures["second_of_first_turn"] == pytest.approx(ratio, rel=1e-2)


@pytest.mark.parametrize(("argv", "complaint"), [
    ((), "say which config to time"),
    (("configs/full/nothing.py",), "its name must be a stage's"),
    (("configs/full/sft.py", "--stepz=3"), "there is no setting 'stepz'"),
    (("--peer=nowhere.py",), "--peer=nowhere.py is no Python file"),
    (("configs/full/sft.py", "--peer=transformers"), "its name must be a stage's: vision_pretrain"),
])
def test_mistakes_are_named(argv, complaint, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert complaint in run("bench.py", *argv).refusal
