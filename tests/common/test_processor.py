"""The claims of common.device.processor: types follow the instruction set, and the variables
that emulate an older one."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import COMMON, ROOT, TINY, newest, run_stage
from test_stages import assert_same_weights

from common.device import Processor, pick_dtype, processor

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}
SCRIPT = """
import torch
from common.device import pick_dtype, processor
cpu = torch.device("cpu")
print(processor().instructions, processor().vnni, pick_dtype(cpu), pick_dtype(cpu, "bf16"))
"""
NATIVE = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
x86 = pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="needs AVX2")
wide = pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="needs AVX-512")


def found_with(**variables):
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True,
                            check=True, cwd=ROOT, env={**os.environ, **AVX2, **variables})
    return result.stdout.split()


@x86
def test_an_emulated_avx2_processor_multiplies_in_fp32_unless_told_otherwise():
    assert found_with() == ["AVX2", "False", "torch.float32", "torch.bfloat16"]


@wide
@pytest.mark.parametrize(("variables", "expected"), [
    ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, ["AVX512", "False", "torch.float32"]),
    ({"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": ""},
     ["AVX2", "False", "torch.float32"]),
])
def test_avx512_without_bf16_multiplies_in_fp32(variables, expected):
    variables = {"ATEN_CPU_CAPABILITY": "avx512", **variables}
    assert found_with(**variables)[:3] == expected


@pytest.mark.skipif(not (NATIVE and torch.cpu._is_vnni_supported()), reason="needs bf16 and VNNI")
def test_fbgemm_held_to_avx2_has_no_vnni_but_bf16_stays():
    variables = dict.fromkeys(AVX2, "")
    assert found_with(**variables)[1:3] == ["True", "torch.bfloat16"]
    found = found_with(**{**variables, "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"})
    assert found[1:3] == ["False", "torch.bfloat16"]


@x86
def test_bf16_is_chosen_only_where_it_is_faster():
    """A measurement, but the factors are 2 or more up and 2 to 100 down."""
    from torch.utils.benchmark import Timer

    def seconds(dtype):
        timer = Timer("a @ a", globals={"a": torch.ones(384, 384, dtype=dtype)})
        return timer.blocked_autorange(min_run_time=0.1).median

    assert processor().bf16 == (seconds(torch.bfloat16) < seconds(torch.float32))
    expected = torch.bfloat16 if processor().bf16 else torch.float32
    assert pick_dtype(torch.device("cpu")) == expected


# -------------------------------------------------------------------- a run on another processor


@pytest.fixture
def on_a_processor(monkeypatch):
    def on(bf16):
        one = Processor("AVX512_BF16" if bf16 else "AVX2", bf16, False)
        monkeypatch.setattr("common.device.processor", lambda: one)

    return on


def test_a_run_keeps_its_types_on_another_processor_unless_told_otherwise(
        world_data, tmp_path, on_a_processor):
    flags = [*COMMON[:-1], *TINY["pretrain"], f"--data={world_data}/text"]
    on_a_processor(bf16=True)
    whole, kept, asked = (tmp_path / name for name in ("whole", "kept", "asked"))
    said = run_stage("pretrain", *flags, f"--out={whole}")
    assert "threads) in bf16, Muon's products in bf16, into" in said and "AVX512_BF16, " in said
    for copy in (kept, asked):
        shutil.copytree(whole, copy)
        shutil.rmtree(newest(copy))
    on_a_processor(bf16=False)
    said = run_stage("pretrain", *flags, f"--out={kept}")
    assert "this machine would choose fp32: --precision=fp32" in said
    assert "threads) in bf16, Muon's products in bf16, into" in said
    assert_same_weights(kept, whole)
    said = run_stage("pretrain", *flags, f"--out={asked}", "--precision=fp32")
    assert "threads) in fp32, Muon's products in fp32, into" in said and "would choose" not in said
    info = json.loads((newest(asked) / "config.json").read_text())
    assert info["precision"] == info["muon_precision"] == "fp32"
