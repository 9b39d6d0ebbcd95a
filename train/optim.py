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
from common.device import all_gather, pick_dtype
from train.recipe import fill_rates


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for parameters that are matrices.

    A weight with the attribute `stacked` holds so many matrices one above the other (q, k and v),
    which are orthogonalised separately. As in PyTorch's optimizers, `found_inf` (a tensor, 1 or 0)
    cancels a step without making the host wait.
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
                self._step_together(params, shape, stacked, group)

    def _step_together(self, params, shape, stacked, group):
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta, grads = [self.state[p]["momentum"] for p in params], [p.grad for p in params]
        lr = torch.full((), group["lr"], device=grads[0].device)
        if self.found_inf is not None:
            skip = self.found_inf.bool()
            grads = [torch.where(skip, m, g) for m, g in zip(momenta, grads, strict=True)]
            lr = torch.where(skip, 0.0, lr)
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
        updates = torch.stack(nesterov).view(-1, shape[0] // stacked, math.prod(shape[1:]))
        updates = orthogonalise_distributed(updates, self.dtype)
        rows, columns = updates.shape[-2:]
        updates = updates.reshape(len(params), *shape) * (-lr * max(1, rows / columns) ** 0.5)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, list(updates.unbind()))


def orthogonalise(matrices, dtype, steps=5):
    """(N, rows, columns) -> roughly the nearest orthogonal matrices: singular values near 1.
    Products are in `dtype`."""
    a, b, c = 3.4445, -4.7750, 2.0315  # Keller Jordan's, for the steepest slope at zero
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
    return all_gather(mine)[: len(matrices)]


class Optimizers:
    """Muon and AdamW, used like one optimizer. Each group has its peak learning rate as initial_lr,
    as in PyTorch's schedulers. dtype: of Muon's products; fp32 without Muon."""

    def __init__(self, members):
        self.members = members
        self.dtype = next((m.dtype for m in members if isinstance(m, Muon)), torch.float32)

    def set_lr(self, factor):
        """Set every learning rate to `factor` (lr_factor) times its peak."""
        for member in self.members:
            for group in member.param_groups:
                group["lr"] = group["initial_lr"] * factor

    def step(self, skip):
        """Update the weights unless `skip`, a bool tensor that the host does not read."""
        for member in self.members:
            member.found_inf, member.dtype = skip.float(), self.dtype
            member.step()

    def zero_grad(self):
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def state_dict(self):
        return {"members": [member.state_dict() for member in self.members]}

    def load_state_dict(self, state):
        """Settings such as weight decay are those of this run, not of the saved one."""
        groups = [member["param_groups"] for member in self.state_dict()["members"]]
        saved = [member["param_groups"] for member in state["members"]]
        if [[g["params"] for g in m] for m in groups] != [[g["params"] for g in m] for m in saved]:
            raise UserError("the optimizer of the checkpoint trained other weights: set "
                            "--optimizer as it was, or start over in another --out")
        for member, own, found in zip(self.members, groups, state["members"], strict=True):
            member.load_state_dict({"state": found["state"], "param_groups": own})


def make_optimizer(model, cfg, factors=None, new=True):
    """Optimizers for the parameters of `model` that require a gradient.

    Fills in the rates of cfg that are left to the rules (recipe.fill_rates; new: whether the
    weights are). Weight decay applies to matrices that multiply, not to embeddings, norms and
    biases, unless cfg.decay is "all". factors: {prefix of names: factor of their learning rates}.
    """
    fill_rates(cfg, getattr(model.config, "n_embd", 0) or model.config.text_width, new)
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
            lr *= factors[prefix]
            group = dict(params=params, lr=lr, initial_lr=lr, weight_decay=decay)
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
