"""Every stage of configs/full and configs/t4 on a GPU that computes shapes only: no tensor on a
wrong device, no wait for the device inside a step, as many operations, bytes and as much memory as
recorded. After an intended change, record again: RECORD=1 python -m pytest tests/gpu
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import COMMON, ROOT, TINY, run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not shutil.which("g++"), reason="the simulated GPU needs the C++ compiler g++")]
RECORDED = Path(__file__).with_name("recorded.json")
TOLERANCE = 0.1
GRAPHS = """
import os, runpy, sys, torch
compiled, compile = [], torch.nn.Module.compile
def backend(graph, inputs):
    compiled.append(graph)
    return graph.forward
torch.nn.Module.compile = lambda module: compile(module, backend=backend)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
if os.environ["RANK"] == "0":
    print("graphs:", len(compiled))
"""


@pytest.mark.parametrize("capability", ["9.0", "7.5"])  # Hopper, Turing
@pytest.mark.parametrize("folder", ["full", "t4"])
def test_every_stage_on_a_gpu(folder, capability, vocabulary, tmp_path):
    command = [sys.executable, "experiments/simulated_steps.py", f"configs/{folder}", capability,
               vocabulary, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not (errors := [f"{stage}: {entry['error']}" for stage, entry in found.items()
                           if "error" in entry]), "\n\n".join(errors)
    compare(f"{folder}, {capability}", {stage: entry["figures"] for stage, entry in found.items()})
    for stage, entry in found.items():
        if stage != "clip_pretrain":  # slots: 257 are needed, a multiple of 64 is allocated
            assert entry["served"] == {"device": 1, "mode": "thread_local", "slots": [256, 320],
                                       "later": 0}
            target = tmp_path / f"{stage}_export"
            exported = run("upload.py", tmp_path / stage, f"--to={target}")
            assert (target / "model.safetensors").is_file(), exported.err


def compare(name, figures):
    """Figures must be those recorded, or become them with RECORD=1 in the environment."""
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    if os.environ.get("RECORD"):
        everything = json.dumps({**recorded, name: figures}, indent=1, sort_keys=True)
        RECORDED.write_text(everything + "\n")
        return
    known = recorded[name]
    assert figures.keys() == known.keys()
    wrong = [f"{name}, {stage}: {key} is {value}, recorded {known[stage][key]}"
             for stage, found in figures.items() for key, value in found.items()
             if value != known[stage][key] and (key == "precision" or value != pytest.approx(
                 known[stage][key], rel=TOLERANCE))]
    assert not wrong, "\n".join(wrong)


def test_two_processes_compile_a_block_once_for_training_and_once_for_evaluation(
        world_data, tmp_path):
    flags = ["pretrain.py", *COMMON, *TINY["pretrain"], f"--data={world_data}/text",
             f"--out={tmp_path}/out", "--compile=True", "--n_embd=256", "--max_steps=3"]
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    ranks = [subprocess.Popen([sys.executable, "-c", GRAPHS, *flags], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE, env={**environment, "RANK": rank})
             for rank in ("0", "1")]
    out = [process.communicate(timeout=300)[0] for process in ranks]
    assert "graphs: 2" in out[0], out[0]
