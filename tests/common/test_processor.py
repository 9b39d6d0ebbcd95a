"""The claims of common.device.processor: types follow the instruction set, and the variables that
limit PyTorch to an older one."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import COMMON, ROOT, TINY, newest, run_stage
from test_stages import assert_same_weights

from common.device import Processor, processor

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}
NATIVE = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="needs AVX2")
def test_avx2_computes_in_fp32_by_default():
    script = ("import torch; from common.device import *; cpu = torch.device('cpu');"
              "print(processor().instructions, processor().vnni, pick_dtype(cpu))")
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                            check=True, cwd=ROOT, env={**os.environ, **AVX2})
    assert result.stdout.split() == ["AVX2", "False", "torch.float32"]


@pytest.mark.skipif(not (NATIVE and torch.cpu._is_vnni_supported()), reason="needs bf16 and VNNI")
@pytest.mark.parametrize(("variable", "value", "instructions", "vnni", "bf16"), [
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE", "AVX512", False, False),
    ("ONEDNN_MAX_CPU_ISA", "AVX2", "AVX2", False, False),
    ("FBGEMM_ENABLE_INSTRUCTIONS", "AVX2", None, False, True),
    ("FBGEMM_ENABLE_INSTRUCTIONS", "", None, True, True)])
def test_one_limited_library_is_enough(variable, value, instructions, vnni, bf16, monkeypatch):
    for name in AVX2:
        monkeypatch.setenv(name, "")
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    found = processor.__wrapped__()
    assert (found.vnni, found.bf16) == (vnni, bf16)
    assert instructions in (None, found.instructions)


# -------------------------------------------------------------------- a run on another processor


def test_a_run_keeps_its_types_on_another_processor_by_default(world_data, tmp_path, monkeypatch):
    def stage(out, bf16, *flags):
        name = "AVX512_BF16" if bf16 else "AVX2"
        monkeypatch.setattr("common.device.processor", lambda: Processor(name, bf16, False))
        said = run_stage("pretrain", *COMMON[:-1], *TINY["pretrain"], f"--data={world_data}/text",
                         f"--out={tmp_path}/{out}", *flags)
        info = json.loads((newest(tmp_path / out) / "config.json").read_text())
        return said, {info["precision"], info["muon_precision"]}

    assert stage("whole", True)[1] == {"bf16"}
    for copy in ("kept", "asked"):
        shutil.copytree(tmp_path / "whole", tmp_path / copy)
        shutil.rmtree(newest(tmp_path / copy))
    said, types = stage("kept", False)
    assert "--precision=fp32" in said and types == {"bf16"}
    assert_same_weights(tmp_path / "kept", tmp_path / "whole")
    assert stage("asked", False, "--precision=fp32")[1] == {"fp32"}
