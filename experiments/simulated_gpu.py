"""A CUDA device that computes shapes only, and what tests count on it. Import before PyTorch.

PyTorch's fake tensors have shapes, dtypes and devices, but no values. simulated_gpu.cpp, loaded
before PyTorch, lets a PyTorch without CUDA run autograd and CUDA's autocast with them. What
kernels compute, streams, capture rules and NCCL cannot be seen: runs/gpu_check.sh tests those.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent


def load_device():
    """Compile simulated_gpu.cpp, once per version of it and of PyTorch, and load it."""
    assert "torch" not in sys.modules
    spec, source = importlib.util.find_spec("torch"), HERE / "simulated_gpu.cpp"
    base = Path(spec.submodule_search_locations[0])
    key = source.read_bytes() + (base / "version.py").read_bytes() + str(base).encode()
    library = Path(tempfile.gettempdir()) / f"simulated_{hashlib.sha256(key).hexdigest()[:16]}.so"
    if not library.exists():
        new = library.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{base}/include",
                        str(source), "-o", str(new), f"-L{base}/lib", "-lc10", "-ltorch_cpu"],
                       check=True)
        new.replace(library)
    for path in (base / "lib/libc10.so", base / "lib/libtorch_cpu.so", library):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


load_device()
sys.path.insert(0, str(HERE.parent))
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch._subclasses import fake_tensor  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

from common import checkpoint  # noqa: E402
from train import async_save, loader  # noqa: E402

fake_tensor.CONSTANT_NUMEL_LIMIT = 0  # no value is known, that of torch.tensor(0) neither
FREE = {"_unsafe_view", "_reshape_alias", "empty", "empty_like", "empty_strided", "new_empty",
        "type_as", "to", "contiguous"}  # where they copy, _to_copy or clone is counted


def on_gpu(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor) and t.is_cuda]


class Watch(TorchDispatchMode):
    """Counts operations on the device, the bytes that they access and those that are allocated;
    an operation for which the host waits is an error, except within `waiting()`."""

    def __init__(self):
        super().__init__()
        self.may_wait, self.live, self.now = True, {}, 0
        self.restart()

    def restart(self):
        self.operations, self.traffic, self.peak = Counter(), 0, self.now

    @contextlib.contextmanager
    def waiting(self, allowed=True):
        before, self.may_wait = self.may_wait, allowed
        try:
            yield
        finally:
            self.may_wait = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, tensors = func._schema.name.split("::")[1], on_gpu((args, kwargs))
        if name == "_local_scalar_dense" and tensors:
            return self.value(func, tensors[0])
        if name == "_varlen_attn" and torch.cuda.get_device_capability() < (8, 0):
            raise RuntimeError("the kernel needs Ampere")
        out = func(*args, **kwargs)
        found = on_gpu(out)
        copies = name in ("_to_copy", "copy_") and not (
            kwargs.get("non_blocking") or (name == "copy_" and True in args[2:]))
        if copies and tensors and not found:
            self.value(None, tensors[0])
        if found and not func.is_view and name not in FREE:
            self.operations[name] += 1
            self.traffic += sum(t.numel() * t.element_size() for t in (*tensors, *found))
        for tensor in found:
            self.hold(tensor)
        return out

    def value(self, func, tensor):
        """What the host reads from the device."""
        if not self.may_wait:
            raise AssertionError("the host waits for the device inside a step")
        try:
            return func(tensor) if func else None
        except fake_tensor.DataDependentOutputException:
            return 1.0 if tensor.dtype.is_floating_point else 0

    def hold(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.live:
            self.live[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.release, storage._cdata)

    def release(self, key):
        self.now -= self.live.pop(key)


class Kernels(TorchFunctionMode):
    """Functions that a PyTorch without CUDA cannot dispatch for the device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "generator"}
        if func is F.scaled_dot_product_attention and args[0].is_cuda:
            return attention(*args, **kwargs)
        if func is torch.Tensor.tolist and args[0].is_cuda:
            flat = [value.item() for value in args[0].flatten()]
            return torch.tensor(flat).view(args[0].shape).tolist() if args[0].dim() else flat[0]
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.allclose and args[0].is_cuda:
            return True
        return func(*args, **kwargs)


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    """The kernel that a GPU takes: flash without a mask in half precision, else efficient."""
    ops = torch.ops.aten
    assert q.dtype == k.dtype == v.dtype
    if attn_mask is None and q.element_size() == 2 and torch.cuda.get_device_capability() >= (8, 0):
        return ops._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = q.new_zeros(attn_mask.shape).masked_fill_(~attn_mask, float("-inf"))
        if attn_mask.size(-1) % 8:  # as PyTorch does, for the kernel's alignment
            attn_mask = F.pad(attn_mask, (0, -attn_mask.size(-1) % 8))[..., : attn_mask.size(-1)]
        attn_mask = attn_mask.expand(*q.shape[:3], k.size(2))
    learns = torch.is_grad_enabled() and q.requires_grad
    return ops._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, learns, 0.0, is_causal)[0]


class Inline:
    """A ThreadPoolExecutor whose jobs run at once: fake tensors belong to their thread."""

    def __init__(self, _n=1):
        pass

    def submit(self, function, *args, **kwargs):
        with WATCH.waiting():
            result = function(*args, **kwargs)
        return type("Done", (), dict(result=lambda self: result, done=lambda self: True,
                                     exception=lambda self: None))()


class Graph:
    """Stands for torch.cuda.CUDAGraph."""

    def replay(self):
        pass


WATCH, CAPTURED = Watch(), []  # (current device, mode) of every capture


def simulate(capability):
    """Make PyTorch and the project believe in a GPU of this capability, like (9, 0)."""
    cuda, current = torch.cuda, [0]
    patches = dict(
        is_available=lambda: True, device_count=lambda: 2, current_device=lambda: current[0],
        set_device=lambda device: current.__setitem__(0, torch.device(device).index
                                                      if not isinstance(device, int) else device),
        get_device_name=lambda *_: "simulated GPU", get_device_capability=lambda *_: capability,
        is_bf16_supported=lambda *_, **__: capability >= (8, 0), synchronize=lambda *_: None,
        max_memory_allocated=lambda *_: WATCH.peak, CUDAGraph=Graph, _lazy_init=lambda: None,
        current_stream=lambda *_: Stream(), Stream=lambda *_: Stream(),
        stream=lambda _: contextlib.nullcontext(), graph=capture, device=device_context(current))
    for name, value in patches.items():
        setattr(cuda, name, value)
    cuda.amp.common.amp_definitely_not_available = lambda: False
    fake_tensor.FakeTensorMode.avoid_device_init = True  # not decided by is_available
    torch.nn.Module.to = moved
    async_save.ThreadPoolExecutor = loader.ThreadPoolExecutor = Inline
    generator = torch.Generator
    torch.Generator = lambda device: generator()
    torch.set_rng_state = lambda state: None  # it was saved without values
    read = checkpoint.read
    checkpoint.read = lambda *args, **kwargs: with_values(read, *args, **kwargs)
    start = async_save.Saver.start
    async_save.Saver.start = lambda self, write, *args: save_zeros(start, self, write, args)


class Stream:
    def wait_stream(self, other):
        pass


def device_context(current):
    @contextlib.contextmanager
    def device(wanted):
        before, current[0] = current[0], torch.device(wanted).index
        yield
        current[0] = before

    return device


def capture(graph, stream=None, capture_error_mode="global"):
    CAPTURED.append((torch.cuda.current_device(), capture_error_mode))
    WATCH.restart()  # what is counted afterwards is what a graph replays
    return WATCH.waiting(False)


def moved(module, *args, **kwargs):
    """Module.to, which for fake tensors has to make new parameters."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, old in table.items():
                if old is None:
                    continue
                new = old.detach().to(device or old.device,
                                      dtype if old.is_floating_point() else None)
                if table is part._parameters:
                    new = torch.nn.Parameter(new, old.requires_grad)
                    if hasattr(old, "stacked"):
                        new.stacked = old.stacked
                table[name] = new
    return module


def save_zeros(start, saver, write, args):
    """Saver.start, with zeros instead of fake tensors."""
    def real(value):
        fake = isinstance(value, fake_tensor.FakeTensor)
        return torch.zeros(value.shape, dtype=value.dtype) if fake else value

    with_values(lambda: start(saver, write, *tree_map(real, args)))


def with_values(function, *args, **kwargs):
    """function(...), whose new tensors are not fake."""
    with fake_tensor.unset_fake_temporarily():
        return function(*args, **kwargs)
