"""Several processes: another number of them on resume, several machines, Slurm."""

import os
import re
import shutil
import subprocess

import pytest
import yaml
from conftest import ROOT, newest
from faults.harness import LAUNCHER, ended, free_port, start_together, torchrun
from test_stages import assert_close, weights

ADAMW = ("--optimizer=adamw", "--lr=1e-4")


def two(pipeline, out, *more):
    """What pretrain in two processes prints."""
    jobs = start_together(2, "pretrain.py", *pipeline.flags("pretrain"), "--micro_rows=2", *ADAMW,
                          f"--out={out}", *more)
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].said + jobs[1].said
    return jobs[0].said


@pytest.fixture(scope="module")
def runs(pipeline, tmp_path_factory):
    """The folder of a run in `one` process and one in `two`."""
    folder = tmp_path_factory.mktemp("runs")
    pipeline.run_stage("pretrain", folder / "one", "--micro_rows=2", *ADAMW)
    two(pipeline, folder / "two")
    return folder


def test_muon_is_split_over_processes(pipeline, tmp_path):
    """Up to the noise of its products; its steps are 0.02, so a matrix in the wrong place shows."""
    two(pipeline, tmp_path, "--optimizer=muon", "--lr=0.003")  # as in the pipeline
    one, found = weights(pipeline.folder / "pretrain"), weights(tmp_path)
    assert max((one[name] - found[name]).abs().max() for name in one) < 5e-3


@pytest.mark.parametrize(("before", "now"), [("one", "two"), ("two", "one")])
def test_another_number_of_processes_resumes_with_the_same_batches(
        pipeline, runs, before, now, tmp_path):
    run, counts = tmp_path / "run", {"one": 1, "two": 2}
    shutil.copytree(runs / before, run)
    shutil.rmtree(newest(run))
    said = two(pipeline, run) if now == "two" else pipeline.run_stage("pretrain", run, *ADAMW)
    assert f"{counts[before]} processes before, {counts[now]} now" in said
    assert_close(run, runs / before)


def test_machines_without_a_shared_folder_are_refused(pipeline, runs, tmp_path):
    shutil.copytree(runs / "one", tmp_path / "machine0")  # and no folder machine1
    jobs = start_together(2, "pretrain.py", *pipeline.flags("pretrain"),
                          f"--out={tmp_path}/machineRANK")
    assert [job.wait() for job in jobs] == [1, 1], jobs[0].said
    assert f"different contents in --out={tmp_path}/machine0" in jobs[0].said


def test_two_machines_take_the_same_steps_as_one(pipeline, runs, tmp_path):
    """Two torchruns with one process each."""
    flags = ("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
             f"--rdzv_endpoint=localhost:{free_port()}", "--rdzv_id=test")
    jobs = [torchrun(flags, "pretrain.py", *pipeline.flags("pretrain"), "--micro_rows=2", *ADAMW,
                     f"--out={tmp_path}/run") for _ in range(2)]
    said = [ended(job) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert sum(text.count("on 2 x ") for text in said) == 1, said
    assert_close(tmp_path / "run", runs / "one")


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


def test_every_launcher_is_valid_and_restarts_dead_processes():
    """With the environment that tests/faults/test_processes.py tries."""
    task = yaml.safe_load((ROOT / "runs/sky.yaml").read_text())
    assert "bash runs/full.sh" in task["run"] and task["resources"]["use_spot"]
    subprocess.run(["bash", "-n"], input=task["setup"] + task["run"], text=True, check=True)
    for source in ((ROOT / "runs" / f"{name}.sh").read_text() for name in ("common", "slurm")):
        subprocess.run(["bash", "-n"], input=source, text=True, check=True)
        words = "torchrun ", "--max-restarts=3", *(
            f"{name}={LAUNCHER[name]}" for name in LAUNCHER if name.startswith("TORCH_"))
        assert all(re.search(rf"^[^#]*{word}", source, re.MULTILINE) for word in words), source
