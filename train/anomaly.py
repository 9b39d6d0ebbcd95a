"""The anomaly guard: steps with a non-finite or outlier loss or gradient norm are skipped.

One bad batch can undo an hour of training. The decision is made on the device from figures that are
the same in every process, so all skip alike and the host need not wait. The rule of deviations is
OLMo's (Groeneveld et al. 2024), except that a gradient that needs no clipping is always accepted.
"""

import torch

from common.config import UserError

WINDOW = 128  # recent steps whose mean and deviation count
MIN_STEPS = 32  # in the first, only what is not finite is skipped
DEVIATIONS = 6.0  # standard deviations above the mean that make an outlier
LEAST_DEVIATION = 1e-3  # as a fraction of the mean; nearly constant values set no limit
MAX_IN_A_ROW = 20  # skipped steps that end a run; fp16 needs 16 to find its scale


class Guard:
    """Decides which steps are skipped; part of a checkpoint, so that resuming is exact."""

    def __init__(self, device, grad_clip=0.0):
        """grad_clip: gradient norms up to this are accepted, however unusual."""
        self.accepted = torch.tensor([float("-inf"), grad_clip], device=device)
        self.n = 0  # steps seen
        self.recent = torch.zeros(2, WINDOW, device=device)  # their losses and gradient norms
        self.in_a_row = torch.zeros((), device=device)
        self.judged = []  # since the last `messages`: (step, tensor of skip, loss, norm, means)

    def anomalous(self, step, loss, norm):
        """Whether to skip `step`: a bool tensor. loss, norm: tensors, of all processes together."""
        now, n = torch.stack((loss.float(), norm.float())), min(self.n, WINDOW)
        past = self.recent[:, :n]
        mean = past.mean(dim=1) if n else torch.zeros_like(now)
        limit = torch.full_like(now, float("inf"))
        if n >= MIN_STEPS:
            deviation = past.std(dim=1)
            limit = torch.where(deviation > LEAST_DEVIATION * mean.abs(), torch.maximum(
                mean + DEVIATIONS * deviation, self.accepted), limit)
        finite = torch.isfinite(now)
        skip = ~finite.all() | (now > limit).any()
        # Outliers are recorded as the limit: a single one hardly changes the statistics, but if the
        # following steps are like it, they are accepted after a few.
        self.recent[:, self.n % WINDOW] = torch.where(finite, torch.minimum(now, limit), mean)
        self.n += 1
        self.in_a_row = torch.where(skip, self.in_a_row + 1, 0.0)
        self.judged.append((step, torch.cat((skip[None], now, mean))))
        return skip

    def messages(self, rows_of):
        """A line for each step skipped since the last call, with rows_of(step). Waits for a GPU."""
        if not self.judged:
            return []
        steps, figures = zip(*self.judged, strict=True)
        self.judged = []
        return [f"step {step} skipped: loss {loss:.4g} (mean {mean_loss:.4g}), gradient norm "
                f"{norm:.4g} (mean {mean_norm:.4g}), {rows_of(step)}"
                for step, (skip, loss, norm, mean_loss, mean_norm) in
                zip(steps, torch.stack(figures).tolist(), strict=True) if skip]

    def check(self):
        """UserError if too many steps in a row were skipped."""
        if self.in_a_row >= MAX_IN_A_ROW:
            raise UserError(
                f"training diverged: the last {self.in_a_row:.0f} steps were skipped. Look at the "
                "rows named above, lower the learning rates, or try --precision=fp32; the command "
                "resumes from the newest checkpoint, or the one before if you delete its folder")

    def state_dict(self):
        return {"n": self.n, "recent": self.recent, "in_a_row": self.in_a_row}

    def load_state_dict(self, state):
        self.n = state["n"]
        self.recent.copy_(state["recent"])
        self.in_a_row.copy_(state["in_a_row"])
