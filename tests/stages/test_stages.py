"""The claims of the five stages: figures, lineage, exact resuming, any number of processes."""

import json
import math
import shutil
import signal

import numpy as np
import pytest
from conftest import STAGES, STEPS, log_rows, logged, newest, reseal, run, run_stage
from faults.harness import server, until
from safetensors.torch import load_file

from data import Chats, ImageSpec, Share
from tokenizer import load
from train.packing import Packed


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


# ------------------------------------------------------------------------------- what a run leaves


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_leaves_its_figures_and_a_checkpoint(pipeline, stage):
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


def test_a_checkpoint_names_those_it_came_from(pipeline):
    def info(stage):
        return json.loads((newest(pipeline.folder / stage) / "config.json").read_text())

    def line(stage):
        return [(parent["stage"], parent["folder"]) for parent in info(stage).get("lineage", [])]

    def named(*stages):
        return [(stage, str(newest(pipeline.folder / stage))) for stage in stages]

    assert line("pretrain") == line("clip_pretrain") == []
    assert line("sft") == named("pretrain")
    assert line("vision_pretrain") == named("pretrain", "sft", "clip_pretrain")
    assert line("vision_sft") == named("pretrain", "sft", "clip_pretrain", "vision_pretrain")
    hashes = [parent["sha256"] for parent in info("vision_sft")["lineage"]]
    assert hashes[:3] == [parent["sha256"] for parent in info("vision_pretrain")["lineage"]]
    assert len(set(hashes)) == 4 and {len(digest) for digest in hashes} == {64}


def test_figures_can_be_logged_at_the_end_alone_and_two_validation_rows_are_enough(
        pipeline, tmp_path):
    shutil.copytree(pipeline.data / "text", tmp_path / "text")
    np.save(tmp_path / "text/val_000000.npy", np.load(tmp_path / "text/val_000000.npy")[:140])
    reseal(tmp_path / "text")
    pipeline.run_stage("pretrain", tmp_path / "run", f"--data={tmp_path}/text", "--log_every=0",
                       "--eval_every=0")
    assert [row["step"] for row in log_rows(tmp_path / "run")] == [STEPS - 1] * 2
    assert math.isfinite(logged(tmp_path / "run", "val_loss")[STEPS - 1, "val_loss"])


# ----------------------------------------------------------------------------- what learns, or not


def test_vision_pretrain_changes_the_projector_alone(pipeline, tmp_path):
    found = weights(pipeline.folder / "vision_pretrain")
    decoder, clip = weights(pipeline.folder / "sft"), weights(pipeline.folder / "clip_pretrain")
    for name, weight in found.items():
        part, _, rest = name.partition(".")
        if part != "projector":
            before = decoder[rest] if part == "decoder" else clip[f"vision_model.{rest}"]
            assert weight.equal(before), name
    pipeline.run_stage("vision_pretrain", tmp_path, "--max_steps=1", "--lr=0", "--muon_lr=0")
    untrained = weights(tmp_path)
    projector = [name for name in found if name.startswith("projector.")]
    assert len(projector) == 4
    assert not any(found[name].equal(untrained[name]) for name in projector)


def test_vision_sft_changes_projector_and_decoder_but_not_clip(pipeline):
    before, after = (weights(pipeline.folder / s) for s in ("vision_pretrain", "vision_sft"))
    same = {name for name in after if after[name].equal(before[name])}
    assert same == {name for name in after if name.startswith("vision_tower.")}


# ------------------------------------------------------------------------------ stop, and go on


@pytest.mark.parametrize("stage", STAGES)
def test_a_stopped_run_goes_on_to_the_same_bits(pipeline, stage, tmp_path):
    whole, stopped = pipeline.folder / stage, tmp_path / stage
    shutil.copytree(whole, stopped)
    shutil.rmtree(newest(stopped))
    assert newest(stopped).name == "step_00000004"
    assert "resuming from" in pipeline.run_stage(stage, stopped)
    assert_same_weights(stopped, whole)
    names = ("loss", "grad_norm", "lr", "val_loss")
    assert logged(stopped, *names) == logged(whole, *names)
    assert [row["step"] for row in log_rows(stopped)] == [row["step"] for row in log_rows(whole)]


def test_sigterm_saves_at_a_step_boundary_and_the_same_command_goes_on(pipeline, tmp_path):
    flags = [*pipeline.flags("pretrain"), "--max_steps=60", "--save_every=0", "--eval_every=0"]
    job = server().start("pretrain.py", *flags, f"--out={tmp_path}/stopped")
    until(lambda: "\nstep     1 " in job.said)
    job.kill(signal.SIGTERM)
    job.kill(signal.SIGTERM)  # as torchrun and a batch system both may
    assert job.wait() == 75, job.said
    steps = int(newest(tmp_path / "stopped").name.removeprefix("step_"))
    last = job.said.splitlines()[-1]
    assert last == f"stopped after step {steps - 1} and saved; the same command resumes"
    assert 2 <= steps < 60
    assert f"resuming from {tmp_path}/stopped/step_{steps:08d}" in run_stage(
        "pretrain", *flags, f"--out={tmp_path}/stopped")
    run_stage("pretrain", *flags, f"--out={tmp_path}/whole")
    assert_same_weights(tmp_path / "stopped", tmp_path / "whole")
    assert logged(tmp_path / "stopped", "loss") == logged(tmp_path / "whole", "loss")


def test_a_time_limit_ends_a_run_that_the_same_command_goes_on_with(pipeline, tmp_path):
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


@pytest.mark.parametrize("mistake", ["--data=nowhere", "--max_stops=1", "--context=100000"])
def test_resume_false_with_a_mistake_in_the_command_loses_nothing(pipeline, tmp_path, mistake):
    shutil.copytree(pipeline.folder / "pretrain", tmp_path / "pretrain")
    argv = [*pipeline.flags("pretrain"), f"--out={tmp_path}/pretrain", "--resume=False", mistake]
    assert run("pretrain.py", *argv).status != 0
    assert_same_weights(tmp_path / "pretrain", pipeline.folder / "pretrain")


def test_a_run_of_another_stage_is_refused_and_left_alone(pipeline, tmp_path):
    shutil.copytree(pipeline.folder / "pretrain", tmp_path / "run")
    refusal = run("sft.py", *pipeline.flags("sft"), f"--out={tmp_path}/run").refusal
    assert f"{tmp_path}/run holds a run of pretrain.py" in refusal and "--out" in refusal
    assert_same_weights(tmp_path / "run", pipeline.folder / "pretrain")
    assert log_rows(tmp_path / "run") == log_rows(pipeline.folder / "pretrain")


@pytest.mark.parametrize("flag", ["--max_steps=0", "--micro_rows=0", "--batch_tokens=0",
                                  "--context=0", "--val_rows=0", "--micro_rows=-1"])
def test_what_must_be_at_least_one_is_named(pipeline, tmp_path, flag):
    argv = [*pipeline.flags("pretrain"), f"--out={tmp_path}/run", flag]
    assert f"{flag}: it must be at least 1" in run("pretrain.py", *argv).refusal
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_a_run_cannot_be_written_into_a_file(pipeline, tmp_path, out):
    (tmp_path / "file").write_text("kept")
    refusal = run("pretrain.py", *pipeline.flags("pretrain"), f"--out={tmp_path}/{out}").refusal
    assert f"--out={tmp_path}/{out} cannot be made a folder" in refusal
    assert (tmp_path / "file").read_text() == "kept"


# ------------------------------------------------------------------- processes and micro-batches

# AdamW, as Muon's bf16 products turn differences in the last bit of a gradient into 1e-3 of a step.
EQUAL = ("--max_steps=3", "--save_every=0", "--eval_every=0", "--optimizer=adamw", "--lr=1e-4")
SPLIT = {"pretrain": ("--micro_rows=2",), "sft": ("--micro_rows=2",), "clip_pretrain": (),
         "vision_sft": ("--micro_rows=1", "--text_share=2")}  # twice as many chats without picture


@pytest.mark.parametrize("stage", SPLIT)
def test_two_processes_take_the_same_steps_as_one(pipeline, stage, tmp_path):
    flags = [*pipeline.flags(stage), *EQUAL, *SPLIT[stage]]
    jobs = server().start_together(2, f"{stage}.py", *flags, f"--out={tmp_path}/two")
    whole = () if stage == "clip_pretrain" else ("--micro_rows=8",)  # there, micro-batches as well
    run_stage(stage, *flags, f"--out={tmp_path}/one", *whole)
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].said + jobs[1].said
    assert "on 2 x " in jobs[0].said and jobs[0].said.count("done: ") == 1, jobs[0].said
    assert not jobs[1].said, jobs[1].said
    assert_close(tmp_path / "one", tmp_path / "two")


def test_some_of_those_rows_had_no_picture(pipeline):
    """What the test above is worth for vision_sft: there a process may have no picture in a row."""
    tokenizer = load(pipeline.data / "scenes")
    scenes, texts = (Chats(pipeline.data / kind, "train") for kind in ("scenes", "chats"))
    sources = [scenes, Share(texts, 2 * len(scenes), 1337)]
    packed = Packed(sources, 128, tokenizer, ImageSpec(16, 32))
    seen = [packed.batch([row]).pixels is not None for row in range(len(packed))]
    assert 0.2 < sum(seen) / len(seen) < 0.8


@pytest.mark.parametrize("stage", ["pretrain", "sft", "vision_sft"])
def test_accumulated_micro_batches_take_the_same_steps_as_one(pipeline, stage, tmp_path):
    for micro_rows in (8, 4):
        flags = (*EQUAL, *SPLIT[stage], f"--micro_rows={micro_rows}")
        pipeline.run_stage(stage, tmp_path / str(micro_rows), *flags)
    assert_close(tmp_path / "8", tmp_path / "4")
