"""Sharding (PyTorch's FSDP2): every process keeps a share of the rows of every weight, and of its
gradient and optimizer state, for models that do not fit one GPU.

A block's weights are gathered just before it runs and let go after it; gradients are summed to the
process that keeps their rows. Shares are of whole rows, as even as can be, in order of processes.
"""

import os

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from common.config import UserError


def shard(model, kind, machine):
    """Shard `model` in place; returns {old parameter: new parameter} for its optimizer.

    kind: "full", over all processes, or "hybrid", inside each node, which saves traffic between
    nodes. Every process must hold the same weights.
    """
    if machine.dtype == torch.float16:
        raise UserError(f"--shard={kind} does not go with fp16; use --precision=bf16 or fp32")
    if any(p.ndim == 0 for p in model.parameters()):
        raise UserError(f"--shard={kind} is not for this stage: one of its weights is a single "
                        "number, which cannot be divided; leave --shard=none")
    # A process whose rows have no picture does not run CLIP, and would leave the others waiting for
    # its share of it. CLIP is small and frozen, so it stays whole.
    tower = getattr(model, "vision_tower", None)
    own = set(tower.modules()) if tower is not None else set()
    # fp32 sums of bf16 gradients, as without sharding
    settings = dict(
        mesh=mesh_of(kind, machine),
        mp_policy=MixedPrecisionPolicy(
            param_dtype=None if machine.dtype == torch.float32 else machine.dtype,
            reduce_dtype=torch.float32),
        ignored_params=set(tower.parameters()) if tower is not None else None,
    )
    before = dict(model.named_parameters())
    for module in list(model.modules()):
        if getattr(module, "repeated", False) and module not in own:
            fully_shard(module, **settings)
    fully_shard(model, **settings)
    after = dict(model.named_parameters())
    for name, p in after.items():
        if hasattr(before[name], "stacked"):
            p.stacked = before[name].stacked
    return {before[name]: p for name, p in after.items()}


def mesh_of(kind, machine):
    """The processes in a row, or in rows of one node each."""
    ranks = machine.ranks
    if kind == "full":
        return init_device_mesh(machine.device.type, (ranks,))
    inside = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if ranks % inside:
        raise UserError(f"--shard=hybrid needs as many processes on every node: {inside} on this "
                        f"one do not divide {ranks}")
    shape, names = (ranks // inside, inside), ("replicate", "shard")
    return init_device_mesh(machine.device.type, shape, mesh_dim_names=names)


def unshard(model):
    """Make a sharded `model` an ordinary one again, in fp32 and whole in every process."""
    for module in list(model.modules()):
        if isinstance(module, FSDPModule):
            module.reshard()
    for module in list(model.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            if is_sharded(p):
                plain = nn.Parameter(p.detach().full_tensor(), requires_grad=p.requires_grad)
                module.register_parameter(name, plain)
        # The only hooks in this project are FSDP's.
        for hooks in (module._forward_pre_hooks, module._forward_hooks,
                      module._state_dict_pre_hooks, module._load_state_dict_pre_hooks):
            hooks.clear()
        if isinstance(module, FSDPModule):
            module._compiled_call_impl = None  # it was compiled with the hooks
            module.__class__ = type(module).__bases__[1]  # (FSDPModule, the class it was)


def is_sharded(tensor):
    return isinstance(tensor, DTensor)


def local(tensor):
    """This process's rows of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor):
    """All rows of a sharded tensor, gathered: every process must ask. Others as they are."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def like(rows, p):
    """The tensor sharded as `p` of which this process has these `rows`; `rows` if p is whole."""
    if not is_sharded(p):
        return rows
    return DTensor.from_local(rows, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())


def share_of(p):
    """(first, last + 1) of the rows of `p` that this process keeps."""
    if not is_sharded(p):
        return 0, len(p)
    n = p.device_mesh.size(p.device_mesh.ndim - 1)
    size = -(-len(p) // n)
    first = min(len(p), size * p.device_mesh.get_local_rank(p.device_mesh.ndim - 1))
    return first, min(len(p), first + size)


def number_of_shard(model):
    """The number of the share that this process writes into a checkpoint; None if another one on
    another node keeps the same and writes it."""
    mesh = next(p for p in model.parameters() if is_sharded(p)).device_mesh
    *outside, inside = mesh.get_coordinate()
    return None if any(outside) else inside


def whole_weights(model, keep):
    """The state dict of `model`, whole, where `keep`; every process must ask. What was sharded is
    on the CPU: all of it together may not fit the GPU."""
    found = {}
    for name, tensor in model.state_dict().items():
        tensor = whole(tensor).cpu() if is_sharded(tensor) else tensor
        if keep:
            found[name] = tensor
    return found
