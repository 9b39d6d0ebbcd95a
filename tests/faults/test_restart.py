"""A process that dies is started again by torchrun, with the flags that runs/ starts it with."""

import os
import re
import signal
import subprocess
from pathlib import Path

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
LAUNCHERS = [path.name for path in sorted((ROOT / "runs").glob("*.sh"))
             if re.search(r"^[^#]*torchrun ", path.read_text(), re.MULTILINE)]


def launches(name, folder):
    """[(flags, environment)] of every torchrun that a script of runs/ would start here."""
    (folder / "bin").mkdir()
    (folder / "calls").mkdir()
    for stub, body in STUBS.items():
        (folder / "bin" / stub).write_text(f"#!/bin/bash\n{body}\n")
        (folder / "bin" / stub).chmod(0o755)
    environment = {**os.environ, **MACHINE, "PATH": f"{folder}/bin:{os.environ['PATH']}",
                   "CALLS": f"{folder}/calls", "SLURM_SUBMIT_DIR": str(folder)}
    for variable in ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        environment.pop(variable, None)
    argv = ["pretrain.py", "configs/full/pretrain.py"] if name == "slurm.sh" else []
    subprocess.run(["bash", ROOT / "runs" / name, *argv], env=environment, check=True, cwd=folder)
    return [recorded(path) for path in sorted((folder / "calls").glob("*.argv"))]


def recorded(path):
    argv = path.read_text().split("\0")
    script = next(i for i, word in enumerate(argv) if word.endswith(".py"))
    lines = path.with_suffix(".env").read_text().split("\0")
    return argv[:script], {line.split("=", 1)[0]: line.split("=", 1)[1] for line in lines
                           if line.startswith("TORCH")}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_starts_dead_processes_again(name, tmp_path):
    found = launches(name, tmp_path)
    assert found
    for flags, environment in found:
        assert "--max-restarts=3" in flags, flags
        assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
        assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) > 60


def test_there_are_launchers():
    assert LAUNCHERS == ["full.sh", "slurm.sh"]


CASES = scale([("full.sh", [1])], [("full.sh", [0]), ("full.sh", [1, 0]), ("slurm.sh", [1])])


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "dies"), CASES)
def test_a_process_that_is_killed_comes_back_and_the_job_ends_with_the_same_bits(
        pipeline, launcher, dies, tmp_path):
    """dies: the processes that are killed, one after the other."""
    tries = Tries(pipeline, "pretrain", 2, tmp_path)
    flags, environment = launches(launcher, tmp_path)[0]
    flags = [flag.replace("29500", str(free_port())) for flag in flags]
    job = torchrun(flags, environment, *tries.command, f"--out={tries.out}")
    for number, rank in enumerate(dies):
        wait_for_step(tries.out, 7 + 6 * number)
        os.kill(worker(job, rank), signal.SIGKILL)
    said = ended(job)
    assert job.returncode == 0, said
    assert said.count(" on 2 x ") == 1 + len(dies), said
    assert said.count(f"resuming from {tries.out}/step_") == len(dies), said
    tries.compare()


def wait_for_step(folder, step):
    """Wait until a run has logged a step."""
    until(lambda: Path(folder, "log.jsonl").exists() and any(
        row["step"] >= step for row in log_rows(folder)))
