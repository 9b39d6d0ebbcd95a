"""The five stages: logged figures, lineage, exact resume, any number of processes."""

import json
import math
import shutil
import signal

import pytest
from conftest import STAGES, STEPS, log_rows, logged, newest, run, run_stage
from faults.harness import start, start_together, until
from safetensors.torch import load_file


def weights(folder):
    return load_file(newest(folder) / "model.safetensors")


def assert_same_weights(one, other):
    """Both runs ended with the same bits."""
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    different = [name for name in one if not one[name].equal(other[name])]
    assert not different, different


def assert_close(one, other):
    """Both runs took the same steps, up to the order in which floats were added."""
    for name, weight in weights(one).items():
        assert (weight - weights(other)[name]).abs().max() < 1e-5, name
    names = ("loss", "grad_norm", "val_loss")
    assert logged(one, *names) == pytest.approx(logged(other, *names), rel=1e-4)


# ------------------------------------------------------------------------- what a run writes


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_writes_log_report_and_checkpoint(pipeline, stage):
    folder = pipeline.folder / stage
    losses = logged(folder, "loss")
    assert sorted(losses) == [(step, "loss") for step in range(STEPS)]
    assert all(map(math.isfinite, losses.values()))
    assert sorted(logged(folder, "val_loss")) == [(2, "val_loss"), (5, "val_loss")]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = (folder / "report.md").read_text()
    assert "![loss curves](loss.png)" in report and f"| max_steps | {STEPS} |" in report
    assert "## Samples" in report and (folder / "report.html").is_file()
    found = sorted(path.name for path in newest(folder).iterdir())
    assert newest(folder).name == "step_00000006"
    assert found == ["config.json", "manifest.json", "model.safetensors", "state", "tokenizer.json"]


def test_checkpoints_name_their_lineage(pipeline):
    infos = {stage: json.loads((newest(pipeline.folder / stage) / "config.json").read_text())
             for stage in STAGES}
    parents = {"pretrain": [], "clip_pretrain": [], "sft": ["pretrain"],
               "vision_pretrain": ["pretrain", "sft", "clip_pretrain"],
               "vision_sft": ["pretrain", "sft", "clip_pretrain", "vision_pretrain"]}
    for stage, names in parents.items():
        found = infos[stage].get("lineage", [])
        assert [(parent["stage"], parent["folder"]) for parent in found] == [
            (name, str(newest(pipeline.folder / name))) for name in names]
    hashes = [parent["sha256"] for parent in infos["vision_sft"]["lineage"]]
    assert len(set(hashes)) == 4 and {len(digest) for digest in hashes} == {64}


def test_vision_pretrain_trains_only_the_projector(pipeline, tmp_path):
    found = weights(pipeline.folder / "vision_pretrain")
    decoder, clip = weights(pipeline.folder / "sft"), weights(pipeline.folder / "clip_pretrain")
    pipeline.run_stage("vision_pretrain", tmp_path, "--max_steps=1", "--lr=0", "--muon_lr=0")
    untrained = weights(tmp_path)
    for name, weight in found.items():
        part, _, rest = name.partition(".")
        if part == "projector":
            assert not weight.equal(untrained[name]), name
        else:
            before = decoder[rest] if part == "decoder" else clip[f"vision_model.{rest}"]
            assert weight.equal(before), name


def test_vision_sft_trains_projector_and_decoder(pipeline):
    before, after = (weights(pipeline.folder / s) for s in ("vision_pretrain", "vision_sft"))
    same = {name for name in after if after[name].equal(before[name])}
    assert same == {name for name in after if name.startswith("vision_tower.")}


# ----------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("stage", STAGES)
def test_resume_gives_identical_weights(pipeline, stage, tmp_path):
    complete, stopped = pipeline.folder / stage, tmp_path / stage
    shutil.copytree(complete, stopped)
    shutil.rmtree(newest(stopped))
    assert newest(stopped).name == "step_00000004"
    assert "resuming from" in pipeline.run_stage(stage, stopped)
    assert_same_weights(stopped, complete)
    names = ("loss", "grad_norm", "lr", "val_loss")
    assert logged(stopped, *names) == logged(complete, *names)
    assert [row["step"] for row in log_rows(stopped)] == [row["step"] for row in log_rows(complete)]


def test_sigterm_saves_and_the_same_command_resumes(pipeline, tmp_path):
    flags = [*pipeline.flags("pretrain"), "--max_steps=30", "--save_every=0", "--eval_every=0"]
    job = start("pretrain.py", *flags, f"--out={tmp_path}/stopped")
    until(lambda: "\nstep     1 " in job.said)
    job.kill(signal.SIGTERM)
    job.kill(signal.SIGTERM)  # as torchrun and a batch system both may
    assert job.wait() == 75, job.said
    steps = int(newest(tmp_path / "stopped").name.removeprefix("step_"))
    assert job.said.splitlines()[-1].startswith(f"stopped after step {steps - 1} and saved")
    assert 2 <= steps < 30
    said = run_stage("pretrain", *flags, f"--out={tmp_path}/stopped")
    assert f"resuming from {tmp_path}/stopped/step_{steps:08d}" in said
    run_stage("pretrain", *flags, f"--out={tmp_path}/complete")
    assert_same_weights(tmp_path / "stopped", tmp_path / "complete")
    assert logged(tmp_path / "stopped", "loss") == logged(tmp_path / "complete", "loss")


def test_runs_ended_by_the_time_limit_resume_to_identical_weights(pipeline, tmp_path):
    ends = []
    while not ends or ends[-1] == 75:
        argv = [*pipeline.flags("sft"), f"--out={tmp_path}/sft", "--time_limit=1e-9"]
        ends.append(run("sft.py", *argv).status)
        assert len(ends) <= STEPS
    assert len(ends) > 1 and ends[-1] == 0
    assert_same_weights(tmp_path / "sft", pipeline.folder / "sft")


def test_a_finished_run_started_again_changes_nothing(pipeline, tmp_path):
    shutil.copytree(pipeline.folder / "sft", tmp_path / "sft")
    said = pipeline.run_stage("sft", tmp_path / "sft")
    assert "step     " not in said and "done" in said
    assert_same_weights(tmp_path / "sft", pipeline.folder / "sft")
    assert log_rows(tmp_path / "sft") == log_rows(pipeline.folder / "sft")


def test_resume_false_starts_over(pipeline, tmp_path):
    shutil.copytree(pipeline.folder / "pretrain", tmp_path / "pretrain")
    said = pipeline.run_stage("pretrain", tmp_path / "pretrain", "--resume=False", "--max_steps=1")
    assert "resuming" not in said
    assert [path.name for path in (tmp_path / "pretrain").glob("step_*")] == ["step_00000001"]
    assert {row["step"] for row in log_rows(tmp_path / "pretrain")} == {0}


@pytest.mark.parametrize(("stage", "flags"), [
    ("pretrain", ["--resume=False", "--data=nowhere"]),
    ("pretrain", ["--resume=False", "--max_stops=1"]),
    ("pretrain", ["--resume=False", "--context=100000"]), ("sft", [])])
def test_a_mistake_in_the_command_loses_nothing(pipeline, tmp_path, stage, flags):
    """The last one: a folder with a run of another stage."""
    shutil.copytree(pipeline.folder / "pretrain", tmp_path / "run")
    result = run(f"{stage}.py", *pipeline.flags(stage), f"--out={tmp_path}/run", *flags)
    assert result.status != 0
    assert flags or ("pretrain.py" in result.refusal and "--out" in result.refusal)
    assert_same_weights(tmp_path / "run", pipeline.folder / "pretrain")
    assert log_rows(tmp_path / "run") == log_rows(pipeline.folder / "pretrain")


@pytest.mark.parametrize("flag", ["--max_steps=0", "--micro_rows=-1", "--batch_tokens=0",
                                  "--context=0", "--val_rows=0"])
def test_settings_below_their_minimum_are_named(pipeline, tmp_path, flag):
    argv = [*pipeline.flags("pretrain"), f"--out={tmp_path}/run", flag]
    assert f"{flag}: it must be at least 1" in run("pretrain.py", *argv).refusal
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_a_run_cannot_be_written_into_a_file(pipeline, tmp_path, out):
    (tmp_path / "file").write_text("kept")
    refusal = run("pretrain.py", *pipeline.flags("pretrain"), f"--out={tmp_path}/{out}").refusal
    assert f"--out={tmp_path}/{out}" in refusal
    assert (tmp_path / "file").read_text() == "kept"


def test_resume_names_changed_settings(pipeline, tmp_path):
    shutil.copytree(pipeline.folder / "pretrain", tmp_path / "run")
    shutil.rmtree(newest(tmp_path / "run"))
    said = pipeline.run_stage("pretrain", tmp_path / "run", "--weight_decay=0.5")
    assert "changed: " in said and "weight_decay (0.01 -> 0.5)" in said


# ------------------------------------------------------------- processes and micro-batches

# AdamW, as Muon's bf16 products turn differences in the last bit of a gradient into 1e-3 of a step.
EQUAL = ("--max_steps=3", "--save_every=0", "--eval_every=0", "--optimizer=adamw", "--lr=1e-4")
SPLIT = {"sft": ("--micro_rows=2",), "clip_pretrain": (),
         "vision_sft": ("--micro_rows=1", "--text_share=2")}  # some processes have no image


@pytest.mark.parametrize("stage", SPLIT)
def test_two_processes_take_the_same_steps_as_one(pipeline, stage, tmp_path):
    """And, but for CLIP, in other micro-batches; test_distributed.py has pretrain."""
    flags = [*pipeline.flags(stage), *EQUAL, *SPLIT[stage]]
    jobs = start_together(2, f"{stage}.py", *flags, f"--out={tmp_path}/two")
    one = () if stage == "clip_pretrain" else ("--micro_rows=8",)
    run_stage(stage, *flags, f"--out={tmp_path}/one", *one)
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].said + jobs[1].said
    assert "on 2 x " in jobs[0].said and jobs[0].said.count("done: ") == 1, jobs[0].said
    assert not jobs[1].said, jobs[1].said
    assert_close(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("stage", ["pretrain", "vision_sft"])
def test_micro_batches_take_the_same_steps_as_one_batch(pipeline, stage, tmp_path):
    for micro_rows in (8, 4):
        flags = (*EQUAL, *SPLIT.get(stage, ()), f"--micro_rows={micro_rows}")
        pipeline.run_stage(stage, tmp_path / str(micro_rows), *flags)
    assert_close(tmp_path / "8", tmp_path / "4")
