"""bench.py times the steps of every stage, generation, and plans a whole pipeline."""

import json

import pytest
from conftest import ROOT, STAGES, TINY, run

from benchmarks import training

SMALL = ("--steps=1", "--device=cpu", "--precision=fp32")
SIZES = {"pretrain": "n_layer = 2\nn_head = 2\nn_embd = 32\nmax_positions = 256\n",
         "clip_pretrain": "image_size = 32\npatch_size = 8\nvision_width = 32\nvision_layers = 1\n"
                          "vision_heads = 2\ntext_width = 32\ntext_layers = 1\ntext_heads = 2\n"
                          "embed_dim = 32\n"}


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """A folder of configs as small as the models of the tests."""
    folder = tmp_path_factory.mktemp("configs")
    for stage in STAGES:
        (folder / f"{stage}.py").write_text(SIZES.get(stage, ""), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Fewer tokens and repetitions than for a measurement."""
    for name, value in {"decoding.PROMPT": 16, "decoding.TOKENS": 8, "decoding.BATCHES": (1, 3),
                        "decoding.REPEATS": 1, "training.REPEATS": 2, "baselines.REPEATS": 1,
                        "baselines.WARM": 1}.items():
        monkeypatch.setattr(f"benchmarks.{name}", value)


def figures_of(*argv):
    result = run("bench.py", *argv)
    assert result.status == 0, result.err
    return json.loads(result.out.splitlines()[-1]), result.out


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_of_every_stage_is_timed(configs, stage):
    flags = [flag for flag in TINY[stage] if "text_share" not in flag]
    figures, _ = figures_of(configs / f"{stage}.py", *SMALL, *flags)
    unit = "img" if stage == "clip_pretrain" else "tok"
    assert figures["stage"] == stage and 0 < figures["mfu"] < 1 and figures["host_gb"] > 0
    assert figures["slowest_ms"] >= figures["ms"] > 0
    assert ("img_per_s" in figures) == (stage not in ("pretrain", "sft"))
    for name in {unit, "img"} if "img_per_s" in figures else {unit}:
        rate = figures[f"{name}_per_step"] / figures["ms"] * 1e3
        assert figures[f"{name}_per_s"] == pytest.approx(rate, rel=1e-3)


def test_the_most_expensive_operations_are_listed(configs):
    _, printed = figures_of(configs / "pretrain.py", *SMALL, "--context=64", "--batch_tokens=512",
                            "--profile=True")
    assert "aten::mm" in printed


def test_a_vision_step_is_timed_beside_transformers(configs):
    figures, _ = figures_of(configs / "vision_pretrain.py", *SMALL, *TINY["vision_pretrain"],
                            "--peer=transformers")
    ratio = figures["ours_img_per_s"] / figures["transformers_img_per_s"]
    assert figures["times_transformers"] == pytest.approx(ratio, rel=1e-3)
    ratio = figures["ours_peak_gb"] / figures["transformers_peak_gb"]
    assert figures["memory_of_transformers"] == pytest.approx(ratio, rel=1e-2)


def test_generation_is_timed_beside_transformers_and_gives_the_same_text(configs):
    figures, _ = figures_of("decode", configs / "pretrain.py", *SMALL[1:], "--peer=transformers")
    assert figures["same_text"] and "first_token_image_ms" not in figures
    for name in "fp32", "transformers_fp32", "batch_1", "batch_3":
        assert figures[f"{name}_tok_per_s"] > 0


def test_the_first_token_about_an_image_is_timed(configs):
    figures, _ = figures_of("decode", configs / "vision_sft.py", "--device=cpu")
    assert min(figures[f"{name}_ms"] for name in ("second_turn", "first_token_image")) > 0


@pytest.mark.parametrize("slow", [False, True])
def test_a_plan_lists_every_stage_and_the_sum(tmp_path, monkeypatch, slow):
    for stage in "pretrain", "sft":
        (tmp_path / f"{stage}.py").write_text(
            SIZES.get(stage, "") + "context = 32\nbatch_tokens = 64\nmax_steps = 50\n")
    monkeypatch.setattr(training, "SLOW", 0.0 if slow else 1e9)
    result = run("bench.py", "plan", tmp_path, "--vocabulary=512")
    assert result.status == 0, result.err
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["pretrain", "sft", "all"]
    assert all("50 steps of" in line for line in lines[:2])
    assert ("STEPS=0.2" in lines[-1]) == slow


def test_the_demo_plans_all_its_stages():
    assert {path.stem for path in (ROOT / "configs/demo").glob("*.py")} == set(training.STAGES)


@pytest.mark.parametrize(("argv", "named"), [
    ((), "which config"),
    (("configs/full/nothing.py",), "vision_sft"),
    (("configs/full/sft.py", "--stepz=3"), "stepz"),
    (("--peer=nowhere.py",), "nowhere.py"),
    (("configs/full/sft.py", "--peer=transformers"), "vision_pretrain"),
    (("plan", "configs/nowhere"), "configs/nowhere"),
])
def test_mistakes_are_named(argv, named, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert named in run("bench.py", *argv).refusal
