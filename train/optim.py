"""Muon for matrices, AdamW for the rest, the learning-rate schedule, and which weight goes where.

Muon (Keller Jordan, 2024) replaces a matrix's momentum by the nearest orthogonal matrix, found by a
few Newton-Schulz steps in the type that the device multiplies natively. `torch.optim.Muon` handles
matrices one by one; a small model has dozens of equal shape, so this one stacks them and multiplies
once.
"""

import math

import torch
import torch.distributed as dist

from common.config import UserError
from common.device import pick_dtype
from train.fsdp import gathered, is_sharded, local, row_range, sharded_as


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for parameters that are matrices.

    A weight with the attribute `stacked` holds so many matrices one above the other (q, k and v),
    which are orthogonalised separately; a sharded weight is gathered. As in PyTorch's optimizers,
    `found_inf` (a tensor, 1 or 0) cancels a step without the host having to wait for it.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = pick_dtype(self.param_groups[0]["params"][0].device)  # of its products
        self.found_inf = None

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}  # (shape, stacked) -> parameters
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault((p.shape, getattr(p, "stacked", 1)), []).append(p)
            for (shape, stacked), params in by_shape.items():
                # If sharded, few at a time: all of them gathered may not fit.
                n = dist.get_world_size() if is_sharded(params[0]) else len(params)
                for start in range(0, len(params), n):
                    self._step_together(params[start : start + n], shape, stacked, group)

    def _step_together(self, params, shape, stacked, group):
        momenta = [local(self._momentum(p)) for p in params]
        grads = [local(p.grad) for p in params]
        lr = torch.full((), group["lr"], device=grads[0].device)
        if self.found_inf is not None:
            skip = self.found_inf.bool()
            grads = [torch.where(skip, m, g) for m, g in zip(momenta, grads, strict=True)]
            lr = torch.where(skip, 0.0, lr)
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
        if is_sharded(params[0]):
            small = self.dtype if self.dtype == torch.bfloat16 else torch.float32  # fp16 overflows
            pairs = zip(params, nesterov, strict=True)
            nesterov = [gathered(sharded_as(p, update.to(small))) for p, update in pairs]
        updates = torch.stack(nesterov).view(-1, shape[0] // stacked, math.prod(shape[1:]))
        updates = orthogonalise_distributed(updates, self.dtype)
        rows, columns = updates.shape[-2:]
        updates = updates.view(len(params), *shape)[:, slice(*row_range(params[0]))]
        updates = updates * (-lr * max(1, rows / columns) ** 0.5)
        weights = [local(p) for p in params]
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_add_(weights, list(updates.unbind()))

    def _momentum(self, p):
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        return state["momentum"]


def orthogonalise(matrices, dtype, steps=5):
    """(N, rows, columns) -> roughly the nearest orthogonal matrices: singular values near 1.

    Products are in `dtype`. The quintic's coefficients are Keller Jordan's, chosen for the steepest
    slope at zero.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    norms = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    x = torch.mul(matrices, 1 / (norms + 1e-7), out=matrices.new_empty(matrices.shape, dtype=dtype))
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def orthogonalise_distributed(matrices, dtype):
    """orthogonalise; each process computes its share of the matrices, and all gather the result."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks == 1:
        return orthogonalise(matrices, dtype)
    share = -(-len(matrices) // ranks)
    first = dist.get_rank() * share
    mine = torch.zeros_like(matrices[:1], dtype=dtype).repeat(share, 1, 1)
    part = matrices[first : first + share]
    mine[: len(part)] = orthogonalise(part, dtype)
    everyone = mine.new_empty(ranks * share, *matrices.shape[1:])
    dist.all_gather(list(everyone.chunk(ranks)), mine)
    return everyone[: len(matrices)]


class Optimizers:
    """Muon and AdamW, used like one optimizer."""

    def __init__(self, members):
        self.members = members
        self.peaks = [[group["lr"] for group in m.param_groups] for m in members]

    @property
    def dtype(self):
        """The type of Muon's products; fp32 without Muon."""
        return next((m.dtype for m in self.members if isinstance(m, Muon)), torch.float32)

    @dtype.setter
    def dtype(self, dtype):
        for member in self.members:
            member.dtype = dtype

    def set_lr(self, factor):
        """Set every learning rate to `factor` times its peak."""
        for member, peaks in zip(self.members, self.peaks, strict=True):
            for group, peak in zip(member.param_groups, peaks, strict=True):
                group["lr"] = peak * factor

    def step(self, skip):
        """Take a step unless `skip`, a bool tensor: the host need not know its value."""
        for member in self.members:
            member.found_inf = skip.float()
            member.step()

    def zero_grad(self):
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def replace(self, new):
        """Train the parameters new[p] instead of p; before the first step."""
        for member in self.members:
            for group in member.param_groups:
                group["params"] = [new[p] for p in group["params"]]

    def state_dict(self):
        """The states of all members; of sharded parameters only this process's rows."""
        found = []
        for member in self.members:
            state = member.state_dict()
            state["state"] = {i: {name: local(value) for name, value in entry.items()}
                              for i, entry in state["state"].items()}
            found.append(state)
        return {"members": found}

    def load_state_dict(self, states):
        """Load a list of `state_dict`s: one, or those of all shards in their order. This process
        takes the rows that it keeps now, however many shards there were.

        Settings such as weight decay are not loaded: this run's hold.
        """
        groups = [member["param_groups"] for member in self.state_dict()["members"]]
        saved = [member["param_groups"] for member in states[0]["members"]]
        if [[g["params"] for g in m] for m in groups] != [[g["params"] for g in m] for m in saved]:
            raise UserError("the optimizer of the checkpoint trained other weights: set "
                            "--optimizer as it was, or start over in another --out")
        for i, member in enumerate(self.members):
            shards = [state["members"][i]["state"] for state in states]
            params = [p for group in member.param_groups for p in group["params"]]
            state = {n: {name: own_rows([shard[n][name] for shard in shards], params[n])
                         for name in entry} for n, entry in shards[0].items()}
            member.load_state_dict({"state": state, "param_groups": groups[i]})


def own_rows(parts, p):
    """This process's rows of a tensor in `parts`, one above the other; sharded as `p`."""
    if parts[0].ndim == 0:  # a number of steps: the same in all
        return parts[0].clone()
    first, end = row_range(p)
    found, start = [], 0
    for part in parts:  # memory-mapped: only the rows taken are read
        found.append(part[max(0, first - start) : max(0, end - start)])
        start += len(part)
    return sharded_as(p, torch.cat(found).to(p.device))


def make_optimizer(model, cfg, factors=None):
    """Optimizers for the parameters of `model` that require a gradient.

    Weight decay is for matrices that multiply; embeddings, norms and biases go without, unless
    cfg.decay is "all". factors: {prefix of names: factor of their learning rates}.
    """
    factors = {"": 1, **(factors or {})}
    decay_rest = cfg.weight_decay if cfg.decay == "all" else 0.0
    kinds = {"muon": (cfg.muon_lr, cfg.weight_decay),
             "embedding": (cfg.embedding_lr or cfg.lr, decay_rest), "vector": (cfg.lr, decay_rest),
             "matrix": (cfg.lr, cfg.weight_decay)}
    groups = {(kind, prefix): [] for kind in kinds for prefix in factors}
    for name, p in model.named_parameters():
        if p.requires_grad:
            prefix = max((prefix for prefix in factors if name.startswith(prefix)), key=len)
            groups[kind_of(name, p, cfg.optimizer), prefix].append(p)
    muon, adamw = [], []
    for (kind, prefix), params in groups.items():
        if params:
            lr, decay = kinds[kind]
            group = dict(params=params, lr=lr * factors[prefix], weight_decay=decay)
            (muon if kind == "muon" else adamw).append(group)
    members = [Muon(muon, cfg.muon_lr, cfg.momentum)] if muon else []
    if adamw:
        betas = (cfg.beta1, cfg.beta2)
        members.append(torch.optim.AdamW(adamw, lr=cfg.lr, betas=betas, fused=True))
    return Optimizers(members)


def kind_of(name, p, optimizer):
    """What a parameter is: Muon's, or AdamW's as an embedding, a matrix, or a vector or scalar."""
    if p.ndim < 2:
        return "vector"
    if "embedding" in name and "patch_embedding" not in name:  # looked up, not multiplied
        return "embedding"
    # The decoder's output matrix has a row for each token, so it is AdamW's.
    return "muon" if optimizer == "muon" and not name.endswith("head.weight") else "matrix"


def lr_factor(cfg, step):
    """The learning rate at `step`, as a fraction of its peak: warmup, constant, decay."""
    warmup, cooldown = cfg.warmup * cfg.max_steps, cfg.cooldown * cfg.max_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - (cfg.max_steps - cooldown)) / max(cooldown, 1)
    if done <= 0:
        return 1.0
    shape = (1 - done) if cfg.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return cfg.final_lr + (1 - cfg.final_lr) * shape
