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

from common.config import UserError
from common.device import Processor, compile_blocks, pick_device, pick_dtype, processor, setup
from train.async_save import Saver
from train.optim import Muon

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


def test_a_run_resumes_in_another_precision_and_back(pipeline, tmp_path):
    """Only fp16 has a loss scale."""
    out = tmp_path / "run"
    for precision, steps in (("fp32", 2), ("fp16", 4), ("fp32", 5), ("fp16", 6), ("bf16", 7)):
        said = run_stage("pretrain", *pipeline.flags("pretrain"), f"--out={out}",
                         f"--precision={precision}", f"--max_steps={steps}")
        assert f"in {precision}, " in said and f"step     {steps - 1} | loss" in said
        state = torch.load(newest(out) / "state/training.pt", weights_only=False)
        assert state["fp16"].get("scale", 0) == (65536 if precision == "fp16" else 0)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability): pretend that there are two such GPUs; gives the calls that reach them."""
    calls = []

    def pretend(*capability):
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
        for name in ("set_device", "synchronize"):
            monkeypatch.setattr(f"torch.cuda.{name}", lambda x, name=name: calls.append((name, x)))
        monkeypatch.setattr("torch.backends.cuda.enable_cudnn_sdp",
                            lambda allowed: calls.append(("cudnn", allowed)))
        return calls

    return pretend


@pytest.mark.parametrize(("capability", "dtype"), [
    ((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16),
    ((9, 0), torch.bfloat16)], ids=str)
def test_products_and_attention_follow_the_capability(gpu, monkeypatch, capability, dtype):
    calls, cuda = gpu(*capability), pick_device("cuda:1")
    assert calls == [("set_device", 1)] + [("cudnn", False)] * (capability >= (9, 0))
    assert pick_dtype(cuda) == dtype
    monkeypatch.setattr("train.optim.pick_dtype", lambda device: pick_dtype(cuda))
    assert Muon([torch.nn.Parameter(torch.zeros(2, 2))], 0.02).dtype == dtype


def test_memory_segments_grow_unless_the_user_chose(gpu, monkeypatch):
    gpu(8, 0)
    for chosen in {}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}:
        monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
        for name, value in chosen.items():
            monkeypatch.setenv(name, value)
        setup("cuda")
        assert os.environ.get("PYTORCH_ALLOC_CONF") == (
            None if chosen else "expandable_segments:True")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # so that it is removed at the end


def test_the_saver_waits_for_its_own_device(gpu):
    calls, device = gpu(8, 0), torch.device("cuda:1")
    assert Saver(device).copy({"a": torch.ones(2)})["a"].tolist() == [1, 1]
    Saver(torch.device("cpu")).copy({})
    assert calls == [("synchronize", device)]


def test_compiling_without_pythons_headers_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda name: name)
    with pytest.raises(UserError, match=r"needs Python.h.*apt install python3\.\d+-dev"):
        compile_blocks(torch.nn.Linear(1, 1))
