"""A process that dies is restarted by torchrun, with the flags of the launchers in runs/."""

import os
import re
import signal
import subprocess

import pytest
from conftest import ROOT, log_rows

from faults.conftest import scale
from faults.harness import ended, free_port, torchrun, until, worker
from faults.test_kill import Tries

STUBS = {
    "python": "exit 0",
    "scontrol": 'echo localhost',
    "srun": 'while [[ $1 == --* ]]; do shift; done; "$@"',
    "torchrun": 'n=$(ls "$CALLS" | wc -l); env -0 > "$CALLS/$n.env"; '
                'printf "%s\\0" "$@" > "$CALLS/$n.argv"',
}
MACHINE = {"GPUS": "2", "COCO": "coco.zip", "SLURM_JOB_ID": "7", "SLURM_NNODES": "1",
           "SLURM_JOB_NODELIST": "localhost", "SLURM_GPUS_ON_NODE": "2"}
VARIABLES = ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")


def launches(name, folder):
    """[(flags, environment)] of every torchrun that a script of runs/ would start here."""
    binaries, calls = folder / "bin", folder / "calls"
    binaries.mkdir()
    calls.mkdir()
    for stub, body in STUBS.items():
        (binaries / stub).write_text(f"#!/bin/bash\n{body}\n")
        (binaries / stub).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {**MACHINE, "PATH": f"{binaries}:{os.environ['PATH']}", "CALLS": str(calls),
                    "SLURM_SUBMIT_DIR": str(folder)}
    argv = ["pretrain.py", "configs/full/pretrain.py"] if name == "slurm.sh" else []
    subprocess.run(["bash", ROOT / "runs" / name, *argv], env=environment, check=True, cwd=folder)
    found = []
    for path in sorted(calls.glob("*.argv")):
        argv = path.read_text().split("\0")
        script = next(i for i, word in enumerate(argv) if word.endswith(".py"))
        lines = path.with_suffix(".env").read_text().split("\0")
        variables = dict(line.split("=", 1) for line in lines if line.startswith("TORCH"))
        found.append((argv[:script], variables))
    return found


@pytest.mark.parametrize("name", ["full.sh", "slurm.sh"])
def test_every_launcher_restarts_dead_processes(name, tmp_path):
    found = launches(name, tmp_path)
    assert found
    for flags, environment in found:
        assert "--max-restarts=3" in flags, flags
        assert environment[VARIABLES[0]] == "1" and int(environment[VARIABLES[1]]) > 60


def test_no_launcher_is_missing_above():
    assert {"full.sh", "slurm.sh"} == {
        path.name for path in (ROOT / "runs").glob("*.sh")
        if re.search(r"^[^#]*torchrun ", path.read_text(), re.MULTILINE)}


CASES = scale([("full.sh", [1])], [("full.sh", [0]), ("full.sh", [1, 0]), ("slurm.sh", [1])])


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "killed"), CASES)
def test_a_killed_process_is_restarted_and_the_run_ends_bit_identical(
        pipeline, launcher, killed, tmp_path):
    """killed: the ranks of the processes that are killed, one after the other."""
    tries = Tries(pipeline, "pretrain", 2, tmp_path)
    flags, environment = launches(launcher, tmp_path)[0]
    flags = [flag.replace("29500", str(free_port())) for flag in flags]
    job = torchrun(flags, environment, *tries.command, f"--out={tries.out}")
    log = tries.out / "log.jsonl"
    for step, rank in zip((7, 13), killed, strict=False):
        until(lambda step=step: log.exists() and any(
            row["step"] >= step for row in log_rows(tries.out)))
        os.kill(worker(job, rank), signal.SIGKILL)
    said = ended(job)
    assert job.returncode == 0, said
    assert said.count(" on 2 x ") == 1 + len(killed), said
    assert said.count(f"resuming from {tries.out}/step_") == len(killed), said
    tries.compare()
