"""bench.py times the steps of every stage, generation, and plans a whole pipeline."""

import json
import re

import pytest
from conftest import ROOT, STAGES, TINY, run

import bench
from experiments import generation_speed

SMALL = ("--steps=1", "--device=cpu", "--precision=fp32")


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """A folder of configs as small as the models of the tests."""
    folder = tmp_path_factory.mktemp("configs")
    for stage in STAGES:
        lines = [flag.removeprefix("--") + "\n" for flag in TINY[stage]]
        (folder / f"{stage}.py").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Fewer tokens and repetitions than for a measurement."""
    for name, value in {"PROMPT": 16, "TOKENS": 8, "BATCHES": (1, 3), "REPEATS": 1}.items():
        monkeypatch.setattr(generation_speed, name, value)
    monkeypatch.setattr("benchmarks.training.REPEATS", 2)
    for name in "REPEATS", "WARM":
        monkeypatch.setattr(f"experiments.nanogpt_speed.{name}", 1)


def figures_of(*argv):
    result = run("bench.py", *argv)
    assert result.status == 0, result.err
    return json.loads(result.out[result.out.rindex("\n{") :]), result.out


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_of_every_stage_is_timed(configs, stage):
    figures, _ = figures_of(configs / f"{stage}.py", *SMALL)
    unit = "img" if stage == "clip_pretrain" else "tok"
    assert figures["stage"] == stage and 0 < figures["mfu"] < 1 and figures["host_gb"] > 0
    assert figures["slowest_ms"] >= figures["ms"] > 0
    rate = figures[f"{unit}_per_step"] / figures["ms"] * 1e3
    assert figures[f"{unit}_per_s"] == pytest.approx(rate, rel=1e-3)


def test_generation_is_timed_beside_transformers_and_gives_the_same_text(configs):
    cfg = bench.read_config([str(configs / "pretrain.py"), *SMALL[1:]], STAGES)
    figures = generation_speed.decode_speeds(*cfg, peer=True)
    assert figures["same_text"] and "first_token_image_ms" not in figures
    for name in "fp32", "transformers_fp32", "batch_1", "batch_3":
        assert figures[f"{name}_tok_per_s"] > 0


@pytest.mark.parametrize("slow", [False, True])
def test_a_plan_times_every_stage_and_warns_on_slow_machines(slow, configs, monkeypatch):
    monkeypatch.setattr("benchmarks.plan.SLOW", 0.0 if slow else 1e9)
    result = run("bench.py", "plan", configs, "--vocabulary=512", "--check=True")
    assert result.status == 0, result.err
    lines = result.out[result.out.rindex("clip_pretrain ") :].splitlines()
    assert [line.split()[0] for line in lines[:6]] == [*STAGES, "all"]
    assert [("STEPS=0.2 make demo" in line) for line in lines[6:]] == [True] * slow
    assert all(" steps of" in line and "(measured, mfu" in line for line in lines[:5])


@pytest.mark.slow
def test_a_plan_computes_size_work_memory_and_price(tmp_path, monkeypatch):
    """By hand for the reference's decoder; memory within a fifth of tests/gpu/recorded.json."""
    monkeypatch.chdir(ROOT)
    gpu = {"name": "X", "gpus": 8, "memory_gib": 80, "tflops": 300, "mfu": 0.5,
           "dollars_per_hour": 16}
    (tmp_path / "gpus.json").write_text(json.dumps([gpu, {**gpu, "name": "Y", "memory_gib": 1}]))
    result = run("bench.py", "plan", "configs/full", "--gpu=X", f"--gpus={tmp_path}/gpus.json",
                 f"--out={tmp_path}")
    assert result.status == 0, result.err
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["gpus"]["Y"]["pretrain"] == {} and "does not fit" in result.out
    pretrain, flop = found["gpus"]["X"]["pretrain"], 3.06e9 * 524_288 * 17_166
    assert pretrain["seconds"] == pytest.approx(flop / (8 * 150e12), rel=0.01)
    assert pretrain["dollars"] == pytest.approx(pretrain["seconds"] / 225)
    assert found["flags"]["pretrain"] == "--micro_rows=64" and "| 522.12 |" in result.out
    counted = json.loads((ROOT / "tests/gpu/recorded.json").read_text())["full, 9.0"]
    assert pretrain["gb"] == pytest.approx(counted["pretrain"]["peak_gb"], rel=0.25)
    larger, smaller = (run("bench.py", "plan", "configs/full", f"--budget={budget}").out
                       for budget in (1000, 40))
    layers = [int(re.search(r"--n_layer=(\d+)", out)[1]) for out in (larger, smaller)]
    assert layers[0] == 24 > layers[1] > 4


@pytest.mark.parametrize(("argv", "named"), [
    ((), "which config"),
    (("configs/full/nothing.py",), "vision_sft"),
    (("configs/full/sft.py", "--stepz=3"), "stepz"),
    (("plan", "configs/nowhere"), "configs/nowhere"),
    (("plan", "configs/full", "--gpu=Z"), "A100 80 GB"),
    (("plan", "configs/full", "--budget=ten"), "--budget=ten"),
])
def test_mistakes_are_named(argv, named, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert named in run("bench.py", *argv).refusal
