"""Many processes: sharding, another number of them on resume, several machines, Slurm."""

import contextlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, Result, newest
from faults.harness import free_port
from test_stages import assert_close, assert_same_weights, weights

ADAMW = ("--optimizer=adamw", "--lr=1e-4")
STOP = ("--time_limit=1e-9",)  # the run ends after step 0


def start(ranks, *argv):
    """`ranks` processes of a script that are one job, as torchrun would start them."""
    common = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost",
              "MASTER_PORT": free_port()}
    return [subprocess.Popen(
        [sys.executable, *map(str, argv)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **{name: str(value) for name, value in
                              {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}})
        for rank in range(ranks)]


def finish(jobs, timeout=150):
    """[(printed text, exit status)] of every process; none is left running."""
    try:
        return [(job.communicate(timeout=timeout)[0], job.returncode) for job in jobs]
    finally:
        for job in jobs:
            with contextlib.suppress(ProcessLookupError):
                job.kill()


def without_newest(folder, copy):
    """A copy of a run as it was before its newest checkpoint."""
    shutil.copytree(folder, copy)
    shutil.rmtree(newest(copy))


@pytest.fixture(scope="module")
def runs(pipeline, tmp_path_factory):
    """(folder of runs in two processes, {name: Result of the main process})."""
    folder = tmp_path_factory.mktemp("runs")
    text, full = [*pipeline.flags("pretrain"), "--micro_rows=2", *ADAMW], "--shard=full"
    pipeline.run_stage("pretrain", folder / "one", "--micro_rows=2", *ADAMW)
    without_newest(folder / "one", folder / "one_to_two")
    without_newest(folder / "one", folder / "one_to_shards")
    shutil.copytree(folder / "one", folder / "machine0")  # and no folder machine1
    commands = {
        "two": [*text], "full": [*text, full],
        "stopped": [*text, full, *STOP], "resumed": [*text, full, f"--out={folder}/stopped"],
        "one_to_two": text, "one_to_shards": [*text, full],
        "muon": [*text, "--optimizer=muon"], "muon_full": [*text, "--optimizer=muon", full],
        "vision": [*pipeline.flags("vision_pretrain"), *ADAMW, full],
        "clip": [*pipeline.flags("clip_pretrain"), full],
        "fp16": [*text, full, "--precision=fp16"],
        "apart": [*text, f"--out={folder}/machineRANK"],
    }
    stages = {"vision": "vision_pretrain.py", "clip": "clip_pretrain.py"}
    commands = {name: [stages.get(name, "pretrain.py"), f"--out={folder}/{name}", *argv]
                for name, argv in commands.items()}
    jobs = start(2, ROOT / "tests" / "several.py", json.dumps(list(commands.values())))
    (said, status), (_, other) = finish(jobs)
    assert status == other == 0, said
    found = [Result(**json.loads(line)) for line in said.splitlines() if line.startswith("{")]
    return folder, dict(zip(commands, found, strict=True))


# ----------------------------------------------------------------------------------------- sharding


def test_a_sharded_run_takes_the_same_steps_as_one_process_and_as_two(runs):
    folder, said = runs
    assert said["full"].status == 0, said["full"].err
    assert_close(folder / "two", folder / "one")
    assert_close(folder / "full", folder / "one")


def test_stages_with_frozen_parts_can_be_sharded(pipeline, runs, tmp_path):
    folder, said = runs
    assert said["vision"].status == 0, said["vision"].err
    pipeline.run_stage("vision_pretrain", tmp_path / "one", *ADAMW)
    assert_close(folder / "vision", tmp_path / "one")


def test_a_sharded_run_writes_samples_and_a_complete_checkpoint(runs):
    folder, _ = runs
    assert "## Samples" in (folder / "full/report.md").read_text()
    state = list((newest(folder / "full") / "state").iterdir())
    assert {path.name for path in state} == {"shard_00000.pt", "shard_00001.pt", "training.pt"}
    complete = (newest(folder / "two") / "state/training.pt").stat().st_size
    assert all(path.stat().st_size < 0.7 * complete for path in state)
    shapes = [{name: weight.shape for name, weight in weights(folder / run).items()}
              for run in ("full", "one")]
    assert shapes[0] == shapes[1]


def test_muon_gathers_sharded_matrices(runs):
    """Up to the noise of its bf16 products; its steps are 0.02, so rows in the wrong place show."""
    folder, said = runs
    assert said["muon_full"].status == 0, said["muon_full"].err
    two, full = weights(folder / "muon"), weights(folder / "muon_full")
    assert max((two[name] - full[name]).abs().max() for name in two) < 5e-3


def test_a_sharded_run_resumes_to_identical_weights(runs):
    folder, said = runs
    assert said["stopped"].status == 75 and "stopped after step 0 " in said["stopped"].out
    assert said["resumed"].status == 0 and "step_00000001" in said["resumed"].out
    assert_same_weights(folder / "stopped", folder / "full")
    assert "before" not in said["resumed"].out


def test_what_cannot_be_sharded_is_refused(runs):
    _, said = runs
    assert "--shard=full is not for this stage" in said["clip"].refusal
    assert "--precision=bf16 or fp32" in said["fp16"].refusal


# ---------------------------------------------------------------------- another number of processes


@pytest.mark.parametrize("name", ["one_to_two", "one_to_shards"])
def test_one_process_resumes_as_two_with_the_same_batches(runs, name):
    folder, said = runs
    assert "1 processes before, 2 now" in said[name].out
    assert_close(folder / name, folder / "one")


@pytest.mark.parametrize("before", ["two", "full"])
def test_two_processes_resume_as_one_with_the_same_batches(pipeline, runs, before, tmp_path):
    without_newest(runs[0] / before, tmp_path / "run")
    said = pipeline.run_stage("pretrain", tmp_path / "run", *ADAMW, "--shard=full")
    assert "2 processes before, 1 now" in said and "--shard=full is ignored" in said
    assert_close(tmp_path / "run", runs[0] / before)


# --------------------------------------------------------------------------------- several machines


def test_machines_without_a_shared_folder_are_refused(runs):
    folder, said = runs
    assert f"different contents in --out={folder}/machine0" in said["apart"].refusal


def test_two_machines_take_the_same_steps_as_one(pipeline, runs, tmp_path):
    """Two torchruns with one process each."""
    commands = [["pretrain.py", *pipeline.flags("pretrain"), "--micro_rows=2", *ADAMW,
                 f"--out={tmp_path}/{shard}", f"--shard={shard}"] for shard in ("none", "full")]
    node = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
            "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{free_port()}", "--rdzv_id=test",
            ROOT / "tests" / "several.py", json.dumps(commands)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    jobs = [subprocess.Popen(node, **pipes) for _ in range(2)]
    try:
        said = [job.communicate(timeout=150)[0] for job in jobs]
    finally:
        for job in jobs:
            job.terminate()  # torchrun then ends its processes; killed, it would leave them behind
    assert [job.returncode for job in jobs] == [0, 0], said
    assert sum(text.count("on 2 x ") for text in said) == 2
    for shard in ("none", "full"):
        assert_close(tmp_path / shard, runs[0] / "one")


SLURM = {
    "scontrol": 'case "$1 $2" in "show hostnames") echo node1;; "show job") echo "$STATE";; '
                'requeue*) echo "requeue $2" >> "$CALLS";; esac',
    "srun": 'echo "srun $*" >> "$CALLS"; eval "$SRUN"',
}


@pytest.mark.parametrize(("srun", "state", "status"), [
    ("exit 1", "RUNNING", 1),
    ("echo '  exitcode  : 75 (pid: 7)'; exit 1", "RUNNING", 75),  # torchrun's message for a 75
    ("kill -TERM $PPID; sleep 0.2; exit 1", "RUNNING", 75),  # near its time limit
    ("echo 'Process 7 got signal: 15'; exit 1", "PENDING", 75),  # preempted
    ("echo 'Process 7 got signal: 15'; exit 1", "CANCELLED", 1),
])
def test_slurm_requeues_a_stopped_job(tmp_path, srun, state, status):
    for name, body in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SRUN": srun,
                   "STATE": f"JobState={state}", "CALLS": str(calls), "SLURM_JOB_ID": "42",
                   "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]",
                   "SLURM_GPUS_ON_NODE": "8", "SLURM_SUBMIT_DIR": str(tmp_path)}
    job = subprocess.run(["bash", ROOT / "runs/slurm.sh", "pretrain.py", "configs/x.py"], text=True,
                         env=environment, cwd=tmp_path, capture_output=True)
    assert job.returncode == status, job.stderr
    said = calls.read_text()
    assert ("requeue 42" in said) == (status == 75)
    for flag in ("--nnodes=2", "--nproc_per_node=8", "--rdzv_endpoint=node1:29500",
                 "--rdzv_id=42", "pretrain.py configs/x.py"):
        assert flag in said


def test_scripts_for_several_machines_have_valid_syntax():
    subprocess.run(["bash", "-n", ROOT / "runs/slurm.sh"], check=True)
    task = yaml.safe_load((ROOT / "runs/sky.yaml").read_text())
    assert task["num_nodes"] > 1 and task["resources"]["use_spot"]
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)
    assert "torchrun" in task["run"]
