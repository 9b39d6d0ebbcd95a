"""Sharding by FSDP2 (--shard): every process keeps a part of the rows of each weight, gradient and
optimizer state, for models that do not fit one GPU.

A block's weights are gathered before it runs and freed after it; gradients are reduced to the
process that keeps their rows. Parts are of complete rows, as even as possible, in order of ranks.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from common.config import UserError


def shard(model, machine):
    """Shard `model` in place; returns {old parameter: new parameter} for its optimizer.

    Every process must hold the same weights.
    """
    if machine.dtype == torch.float16:
        raise UserError("--shard=full does not work with fp16; use --precision=bf16 or fp32")
    if any(p.ndim == 0 for p in model.parameters()):
        raise UserError("--shard=full is not for this stage: one of its weights is a single "
                        "number, which cannot be divided; leave --shard=none")
    # A process whose rows have no image does not run CLIP, and would keep the others waiting for
    # its part of it. CLIP is small and frozen, so it is not sharded.
    tower = getattr(model, "vision_tower", nn.Module())
    excluded = set(tower.modules())
    dtype = None if machine.dtype == torch.float32 else machine.dtype
    settings = dict(
        mesh=init_device_mesh(machine.device.type, (machine.ranks,)),
        ignored_params=set(tower.parameters()),
        # bf16 gradients are summed in fp32, as without sharding
        mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    before = dict(model.named_parameters())
    for module in list(model.modules()):
        if getattr(module, "repeated", False) and module not in excluded:
            fully_shard(module, **settings)
    fully_shard(model, **settings)
    after = dict(model.named_parameters())
    for name, p in after.items():
        if hasattr(before[name], "stacked"):
            p.stacked = before[name].stacked
    return {before[name]: p for name, p in after.items()}


def is_sharded(tensor):
    return isinstance(tensor, DTensor)


def local(tensor):
    """This process's rows of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def gathered(tensor):
    """All rows of a sharded tensor, a collective operation; any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def sharded_as(p, rows):
    """The tensor, sharded as `p`, of which this process has `rows`; `rows` if p is not sharded."""
    if not is_sharded(p):
        return rows
    return DTensor.from_local(rows, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())


def row_range(p):
    """(first, last + 1) of the rows of `p` that this process keeps."""
    if not is_sharded(p):
        return 0, len(p)
    size = -(-len(p) // p.device_mesh.size())
    first = min(len(p), size * p.device_mesh.get_local_rank())
    return first, min(len(p), first + size)


def gathered_weights(model, keep):
    """The complete state dict of `model` where `keep`, else {}: a collective operation.

    Sharded weights are returned on the CPU: all of them together may not fit the GPU.
    """
    found = {}
    for name, tensor in model.state_dict().items():
        tensor = gathered(tensor).cpu() if is_sharded(tensor) else tensor
        if keep:
            found[name] = tensor
    return found
