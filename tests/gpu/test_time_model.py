"""experiments/gpu_time_model.py: figures of one layer, worked out by hand."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

C, B, T, V = 1024, 16, 512, 50304  # width, rows, positions, vocabulary
SETTINGS = dict(n_layer=1, n_head=8, n_embd=C, max_positions=T, context=T, micro_rows=B,
                batch_tokens=2 * B * T, max_steps=3600)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="the simulated GPU needs g++")
def test_the_time_of_a_layer_is_that_worked_out_by_hand(tmp_path):
    (folder := tmp_path / "t4").mkdir()
    (folder / "pretrain.py").write_text(
        "\n".join(f"{name} = {value}" for name, value in SETTINGS.items()))
    done = subprocess.run([sys.executable, "experiments/gpu_time_model.py", folder], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tflop = {name: float(n) for name, n in re.findall(r"\| (\w+) \| ([\d.]+) \|", done.stdout)}
    assert tflop["products"] == pytest.approx(6 * B * T * 12 * C**2 / 1e12, rel=0.01)
    assert tflop["attention"] == pytest.approx(7 * C * B * T**2 / 1e12, rel=0.01)  # causal: half
    assert tflop["head"] == pytest.approx(6 * B * T * C * V / 1e12, rel=0.01)
    muon = 5 * (4 * 6 + 2 * 18) * C**3  # five steps: of q, k, v and out, of up and down
    assert tflop["update"] == pytest.approx(muon / 1e12, rel=0.01)
    blocks = (2 * 54.2 * B * T * C + 12 * 12 * C**2) / 1e9  # compiled
    assert f"{blocks:.3g} GB a micro-batch" in done.stdout and "2 micro-batches" in done.stdout
    ms = re.search(r"\| T4 \| (.*) \| \d+% ", done.stdout)[1].replace(",", "").split(" | ")
    # A T4's peak at 30 % or its bandwidth at 80 % limits each product; two micro-batches.
    assert float(ms[0]) >= 0.99 * 2e3 * tflop["products"] / (65 * 0.3)
    assert float(ms[7]) == pytest.approx(sum(map(float, ms[:7])), abs=2)
