"""Device, precision and processes of a run, and how fast the device is at best.

Started by `torchrun`, a stage finds its rank in the environment; started by `python`, it is the
only process.
"""

import contextlib
import ctypes
import functools
import inspect
import os
import re
import resource
import shutil
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common.config import UserError

# Dense bf16 (fp16 for T4 and V100) FLOP/s from NVIDIA's data sheets. A name that contains another
# comes first.
GPU_PEAKS = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
    "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10G": 70e12,
    "A10": 125e12, "A40": 150e12, "A6000": 155e12, "RTX 6000 Ada": 364e12, "4090": 165e12,
    "3090": 71e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TIMEOUT = timedelta(minutes=30)  # of collectives: the others wait while one writes a checkpoint


@dataclass(frozen=True)
class Processor:
    """What the CPU multiplies natively; types and kernels are chosen by it."""

    instructions: str  # the newest for matrix products: AMX, AVX512_BF16, ..., AVX2
    bf16: bool  # bf16 products are faster than fp32 ones, not emulated
    vnni: bool  # 8-bit products are summed in 32 bits without saturation


@functools.cache
def processor():
    """The Processor of this machine.

    Without AVX-512 BF16 or AMX, oneDNN emulates bf16: 2 GFLOP/s instead of 100 with AVX2, 38
    instead of 78 with AVX-512 alone. The variables that limit PyTorch's libraries to an older
    instruction set limit this as well.
    """
    onednn = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() or "ALL"
    fbgemm = os.environ.get("FBGEMM_ENABLE_INSTRUCTIONS", "").upper() or "AVX512_E1"  # E1: VNNI
    capability = torch.backends.cpu.get_cpu_capability()  # obeys ATEN_CPU_CAPABILITY
    if capability != "AVX512" or not onednn.startswith(("ALL", "DEFAULT", "AVX512", "AVX10")):
        return Processor(capability.replace("AVX512", "AVX2"), bf16=False, vnni=False)
    vnni = torch.cpu._is_vnni_supported() and onednn != "AVX512_CORE" and "E1" in fbgemm
    newer = onednn not in ("AVX512_CORE", "AVX512_CORE_VNNI")
    amx = newer and torch.cpu._is_amx_tile_supported() and (onednn in ("ALL", "DEFAULT")
                                                            or "AMX" in onednn)
    bf16 = amx or (newer and torch.cpu._is_avx512_bf16_supported())
    name = "AMX" if amx else "AVX512_BF16" if bf16 else "AVX512_VNNI" if vnni else "AVX512"
    return Processor(name, bf16, vnni)


@dataclass
class Machine:
    """The device of this process, and the processes that it computes with."""

    device: torch.device
    dtype: torch.dtype  # of matrix products; weights and optimizer stay fp32
    rank: int = 0
    ranks: int = 1
    name: str = field(default="", repr=False)
    hosts: object = field(default=None, repr=False)  # process group over CPUs

    @property
    def is_main(self):
        return self.rank == 0

    def autocast(self):
        """A context in which matrix products run in `dtype`."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def sum(self, tensor):
        """`tensor` summed over all processes (in place)."""
        if self.ranks > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag):
        """Whether `flag` is true in any process, without synchronizing the GPUs."""
        if self.ranks > 1:
            flags = torch.tensor(int(flag))
            dist.all_reduce(flags, group=self.hosts)
            return flags.item() > 0
        return flag

    def barrier(self):
        if self.ranks > 1:
            dist.barrier()

    def leave(self):
        if dist.is_initialized():
            dist.destroy_process_group()


def setup(device="auto", precision="auto"):
    """The Machine of this process; joins the process group if torchrun started it."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # Packed rows need memory in ever new sizes; read when CUDA starts.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    device = pick_device(device)
    if ranks > 1 and device.type == "mps":  # gloo does not reduce its tensors
        raise UserError("MPS works with one process only: start it without torchrun")
    if ranks > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, device_id=device if device.type == "cuda" else None,
                                timeout=TIMEOUT)
    torch.set_float32_matmul_precision("high")  # fp32 products may use TF32
    hosts = dist.new_group(backend="gloo", timeout=TIMEOUT) if ranks > 1 else None
    return Machine(device, pick_dtype(device, precision), rank, ranks, device_name(device), hosts)


def pick_device(name):
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    if name in ("cpu", "mps"):
        return torch.device(name)
    if not name.startswith("cuda"):
        raise UserError(f"--device={name}: expected auto, cpu, cuda or mps")
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    number = name.removeprefix("cuda:") if ":" in name else str(local)
    if not number.isdecimal() or int(number) >= count:
        raise UserError(f"--device={name}: there is no cuda:{number} for process {local} of this "
                        f"machine: PyTorch sees {count} CUDA devices; check --nproc_per_node")
    torch.cuda.set_device(int(number))
    cudnn_attention(device := torch.device(f"cuda:{number}"), False)
    return device


def cudnn_attention(device, allowed):
    """Whether attention may use cuDNN, PyTorch's first choice from Hopper on since 2.11. It plans
    each new shape for hundreds of milliseconds, so it is allowed only where shapes repeat."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        torch.backends.cuda.enable_cudnn_sdp(allowed)


def pick_dtype(device, precision="auto"):
    """bf16 where the hardware multiplies it natively, fp16 on older GPUs, else fp32."""
    if precision != "auto":
        return PRECISIONS[precision]
    if device.type == "cuda":
        newer = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if newer else torch.float16
    return torch.bfloat16 if device.type == "cpu" and processor().bf16 else torch.float32


def precision_name(dtype):
    """The --precision that means `dtype`."""
    return next(name for name, known in PRECISIONS.items() if known == dtype)


def device_name(device):
    """The device's own name, for the report."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    models = re.findall("model name\\s*: (.*)", cpu.read_text("utf-8")) if cpu.is_file() else []
    if device.type != "cpu" or not models:
        return device.type
    return f"{models[0]} ({processor().instructions}, {torch.get_num_threads()} threads)"


def cores():
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1))


def compile_blocks(model):
    """Compile the repeated blocks of `model` in place: one compilation serves all layers, and
    parameter names do not change."""
    if not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        raise UserError("--compile=True needs a C++ compiler such as g++; install one or omit it")
    if not Path(headers := sysconfig.get_path("include"), "Python.h").is_file():
        package = "python{}.{}-dev".format(*sys.version_info)
        raise UserError(f"--compile=True needs Python.h, which is not in {headers}: apt install "
                        f"{package} (dnf: {package}el), or use --compile=False")
    # DDP would cut each block into several graphs, at its buckets' ends; blocks are small enough.
    torch._dynamo.config.optimize_ddp = False
    for module in model.modules():
        if getattr(module, "repeated", False):
            module.compile()


def averaging(model, device):
    """`model` in DistributedDataParallel, which averages gradients over processes."""
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True, **{name: False})  # our buffers are constants


def peak_flops(machine):
    """FLOP/s of one device at best: from GPU_PEAKS, or measured for half a second."""
    for name, peak in GPU_PEAKS.items():
        if name in machine.name and machine.device.type == "cuda":
            return peak
    # Small squares stay in the cache (a fifth faster on a CPU), large ones keep many cores busy.
    squares = [torch.full((n, n), 0.5, device=machine.device, dtype=machine.dtype)
               for n in (512, 1024, 2048)]
    best, end = 0.0, time.perf_counter() + 0.5
    while time.perf_counter() < end:
        for a in squares:
            start = time.perf_counter()
            (a @ a)[0, 0].item()  # .item() waits for the product
            best = max(best, 2 * len(a) ** 3 / (time.perf_counter() - start))
    return best


def all_gather(tensor):
    """The tensors (n, ...) of all processes as one (ranks * n, ...), in the order of the ranks."""
    everyone = tensor.new_empty(dist.get_world_size() * len(tensor), *tensor.shape[1:])
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # before PyTorch 2.13
    gather(everyone, tensor.contiguous())
    return everyone


def release_free_memory():
    """Return freed memory to the system.

    glibc keeps it in fragments that batches of varying sizes do not fit: on a CPU an earlier demo's
    last stage grew to 4.1 GB; with this every few steps it peaked at 1.8 GB (docs/log.md).
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # a C library other than glibc
            ctypes.CDLL(None).malloc_trim(0)


def peak_memory_gb(device=None):
    """(GPU, host) peak memory of this process in GB (10^9 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, KiB on Linux
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    on_gpu = device is not None and device.type == "cuda"
    gpu = torch.cuda.max_memory_allocated(device) if on_gpu else 0
    return gpu / 1e9, host / 1e9
