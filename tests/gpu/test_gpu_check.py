"""runs/gpu_check.sh, on a CPU: every check runs, and a failed one ends no other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from experiments import gpu_check

PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.mark.slow
def test_a_dry_run_reports_every_check(tmp_path):
    out = tmp_path / "check.json"
    done = subprocess.run(["bash", "runs/gpu_check.sh", "--dry_run", f"--out={out}"], cwd=ROOT,
                          env={**os.environ, "PATH": PATH}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found.keys() == gpu_check.CHECKS.keys()
    assert not {name: entry for name, entry in found.items() if "error" in entry}, done.stdout
    assert all(f"ok     {name}" in done.stdout for name in found)
    assert found["sft step"]["tok_per_s"] > 0 and found["decoding"]["graphs_steps_per_s"] > 0
    assert found["eager and compiled step"]["compiled_tok_per_s"] > 0 < found["new lengths"]["ms"]


@pytest.mark.slow
def test_a_failed_check_says_what_to_set_and_ends_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    broken = None, (), "--something=else"  # no such check in the process of its own
    monkeypatch.setattr(gpu_check, "CHECKS", {"broken": broken,
                                              "machine": gpu_check.CHECKS["machine"]})
    monkeypatch.setattr(sys, "argv", ["gpu_check", f"--out={tmp_path}/check.json"])
    gpu_check.main()
    printed = capsys.readouterr().out
    assert "FAILED broken" in printed and "set --something=else" in printed
    assert "ok     machine" in printed
