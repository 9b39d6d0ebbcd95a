"""The five stages: logged figures, lineage, exact resume, any number of processes."""

import json
import math
import re
import shutil

import pytest
from conftest import ROOT, STAGES, STEPS, log_rows, logged, newest, run, run_stage
from faults.harness import start_together
from safetensors.torch import load_file

from common import checkpoint
from common.checkpoint import steps_in
from common.config import read_json
from experiments.contamination import data_folders


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


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_writes_log_curves_and_checkpoint(pipeline, stage):
    folder = pipeline.folder / stage
    losses = logged(folder, "loss")
    assert sorted(losses) == [(step, "loss") for step in range(STEPS)]
    assert all(map(math.isfinite, losses.values()))
    assert sorted(logged(folder, "val_loss")) == [(2, "val_loss"), (5, "val_loss")]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    found = sorted(path.name for path in newest(folder).iterdir())
    assert newest(folder).name == "step_00000006"
    assert found == ["config.json", "manifest.json", "model.safetensors", "state", "tokenizer.json"]


def test_a_checkpoint_has_the_validation_loss_of_its_own_step(pipeline, tmp_path):
    """And none if that step was not evaluated, also after resuming."""
    for steps in 6, 8:
        pipeline.run_stage("pretrain", tmp_path, "--save_every=1", "--keep_every=1",
                           f"--max_steps={steps}")
    found = {step: read_json(folder / "config.json")["metrics"].get("val_loss")
             for step, folder in steps_in(tmp_path).items()}
    losses = {step + 1: loss for (step, _), loss in logged(tmp_path, "val_loss").items()}
    assert list(found) == [1, 2, 3, 4, 5, 6, 7, 8] and list(losses) == [3, 6, 8]
    assert found == {step: losses.get(step) and pytest.approx(losses[step], abs=1e-6)
                     for step in found}


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


def test_pretraining_that_continues_keeps_the_data_and_cost_before_it(pipeline, tmp_path):
    """Also when it is resumed, and its parent's folder is gone or has other weights."""
    pipeline.run_stage("pretrain", tmp_path / "first")
    parent = checkpoint.read(tmp_path / "first")[0]
    data, out = shutil.copytree(pipeline.data / "text", tmp_path / "text"), tmp_path / "second"
    flags = f"--data={data}", f"--init_from={tmp_path}/first"
    pipeline.run_stage("pretrain", out, *flags)
    pipeline.run_stage("pretrain", tmp_path / "first", "--resume=False", "--seed=7")
    pipeline.run_stage("pretrain", out, *flags, "--max_steps=8")
    shutil.rmtree(tmp_path / "first")
    info = checkpoint.read(out)[0]
    line, = info["lineage"]
    assert (line["stage"], line["sha256"], info["step"]) == ("pretrain", parent["sha256"], 8)
    assert data_folders(info) == [data, pipeline.data / "text"]
    minutes = (parent["metrics"]["seconds"] + info["metrics"]["seconds"]) / 60
    assert re.search(rf"total\*\* .* \*\*{minutes:.1f}\*\* ", (out / "report.md").read_text())


def test_the_vision_stages_train_the_projector_and_then_also_the_decoder(pipeline, tmp_path):
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
    after = weights(pipeline.folder / "vision_sft")
    same = {name for name in after if after[name].equal(found[name])}
    assert same == {name for name in after if name.startswith("vision_tower.")}


@pytest.mark.parametrize("stage", STAGES)
def test_resume_gives_identical_weights(pipeline, stage, tmp_path):
    """Also after a kill that cut the last line of the log."""
    complete, stopped = pipeline.folder / stage, tmp_path / stage
    shutil.copytree(complete, stopped)
    shutil.rmtree(newest(stopped))
    (stopped / "log.jsonl").write_bytes((complete / "log.jsonl").read_bytes()[:-9])
    assert newest(stopped).name == "step_00000004"
    assert "resuming from" in pipeline.run_stage(stage, stopped)
    assert_same_weights(stopped, complete)
    names = ("loss", "grad_norm", "lr", "val_loss")
    assert logged(stopped, *names) == logged(complete, *names)
    assert [row["step"] for row in log_rows(stopped)] == [row["step"] for row in log_rows(complete)]


def test_runs_ended_by_the_time_limit_resume_to_identical_weights(pipeline, tmp_path):
    ends = []
    while not ends or ends[-1] == 75:
        argv = [*pipeline.flags("sft"), f"--out={tmp_path}/sft", "--time_limit=1e-9"]
        ends.append(run("sft.py", *argv).status)
        assert len(ends) <= STEPS
    assert len(ends) > 1 and ends[-1] == 0
    assert_same_weights(tmp_path / "sft", pipeline.folder / "sft")


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
                                  "--context=0", "--val_rows=0", "--n_head=0", "--lr=-0.5",
                                  "--momentum=-2.0", "--grad_clip=-1.0", "--out={}/file",
                                  "--out={}/file/run"])
def test_settings_that_cannot_be_used_are_named(pipeline, tmp_path, flag):
    flag, file = flag.format(tmp_path), tmp_path / "file"
    file.write_text("kept")
    argv = [*pipeline.flags("pretrain"), f"--out={tmp_path}/run", flag]
    wanted = flag if "out" in flag else f"{flag}: it must be at least"
    assert wanted in run("pretrain.py", *argv).refusal
    assert not (tmp_path / "run").exists() and file.read_text() == "kept"


# AdamW, as Muon's bf16 products turn differences in the last bit of a gradient into 1e-3 of a step.
EQUAL = ("--max_steps=3", "--save_every=0", "--eval_every=0", "--optimizer=adamw", "--lr=1e-4")
SPLIT = {"sft": ("--micro_rows=2",), "pretrain": ("--micro_rows=2",), "clip_pretrain": (),
         "vision_sft": ("--micro_rows=1", "--text_share=2")}  # some processes have no image


@pytest.mark.parametrize("stage", SPLIT)
def test_two_processes_take_the_same_steps_as_one(pipeline, stage, tmp_path):
    """And, but for CLIP, in other micro-batches."""
    flags = [*pipeline.flags(stage), *EQUAL, *SPLIT[stage]]
    jobs = start_together(2, f"{stage}.py", *flags, f"--out={tmp_path}/two")
    one = () if stage == "clip_pretrain" else ("--micro_rows=8",)
    run_stage(stage, *flags, f"--out={tmp_path}/one", *one)
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].said + jobs[1].said
    assert "on 2 x " in jobs[0].said and jobs[0].said.count("done: ") == 1, jobs[0].said
    assert not jobs[1].said, jobs[1].said
    assert_close(tmp_path / "one", tmp_path / "two")


TAKEN = {"pretrain.py": "text", "sft.py": "chats", "clip_pretrain.py": "images",
         "vision_pretrain.py": "images", "vision_sft.py": "images", "eval.py": "several",
         "prepare.py check": "chats images", "bench.py": "text chats images",
         "vision_sft.py --text_data": "chats", "vision_sft.py --replay": "text"}
OTHERS = {  # place: (its kind, or words of the refusal)
    "demo/text": ("text", "holds token shards of text, for pretrain.py and --replay; needed are"),
    "demo/chats": ("chats", "holds text-only chats, for sft.py and --text_data; needed are"),
    "demo/scenes": ("images", "holds chats about images, for clip_pretrain.py and the vision"),
    "demo": ("several", "holds several data sets: use data/demo/"),
    "demo/chats/train": ("", "holds no data set|is not prepared yet"),
    "run": ("", "is a checkpoint or a run"), "run/step_00000006": ("", "is a checkpoint or a run"),
    "rows": ("", r"not prepared yet: prepare.py \w+ --files='data/rows/\*.jsonl'|holds no data"),
    "rows/a.jsonl": ("", r"prepare.py \w+ --files=data/rows/a.jsonl|holds no data set"),
    "photos": ("", r"prepare.py \w+ --image_root=data/photos|holds no data set"),
    "empty": ("", "holds no data set"), "none": ("", "does not exist; needed are"),
}


@pytest.mark.parametrize("place", OTHERS)
@pytest.mark.parametrize("command", TAKEN)
def test_data_of_another_kind_is_named_before_anything_is_loaded(
        command, place, pipeline, tmp_path, monkeypatch):
    kind, words = OTHERS[place]
    if (kind and kind in TAKEN[command]) or (command, place) in (
            ("bench.py", "none"), ("prepare.py check", "rows/a.jsonl"),
            ("prepare.py check", "none")):
        return  # is taken, or has a sentence of its own
    monkeypatch.chdir(tmp_path)
    for name in "rows", "photos", "empty":
        (tmp_path / "data" / name).mkdir(parents=True)
    for name in "rows/a.jsonl", "rows/b.jsonl", "rows/README.md", "photos/a.JPG":
        (tmp_path / "data" / name).touch()
    (tmp_path / "data/demo").symlink_to(pipeline.data)
    (tmp_path / "data/run").symlink_to(pipeline.folder / "sft")
    script, *rest = command.split()
    data = f"data/{place}" if rest == ["check"] else f"--data=data/{place}"
    argv = {"prepare.py": [*rest, data], "eval.py": ["no", data], "bench.py": [
        str(ROOT / "configs/demo/sft.py"), "--device=cpu", data]}.get(script, [data])
    if rest and rest != ["check"]:
        argv = [f"--data={pipeline.data}/scenes", f"{rest[0]}=data/{place}"]
    assert re.search(words, run(script, *argv).refusal)
    assert not (tmp_path / "out").exists()
