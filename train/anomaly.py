"""Steps that would do harm: not finite, or far out of what the last steps were like.

One bad batch can undo an hour. Whether a step is one is decided on the device, with figures that
are the same in every process, so that all skip it alike and the host need not wait. The rule of the
deviations is OLMo's (Groeneveld et al. 2024); here a gradient that needs no clipping is no harm.
"""

import torch

from common.config import UserError

WINDOW = 128  # steps that say what is usual
LEAST = 32  # so many before anything can be unusual
DEVIATIONS = 6.0  # how many standard deviations above the mean
IN_A_ROW = 20  # skipped steps that end a run; fp16 needs 16 to find its scale
NAMED = 64  # so many skipped steps are named after a while


class Guard:
    """Which steps are skipped. `state_dict` goes into checkpoints, so that resuming is exact."""

    def __init__(self, device, harmless=0.0):
        """harmless: a gradient norm up to which a step is taken, however large that is for it."""
        self.harmless = torch.tensor([float("-inf"), harmless], device=device)
        self.n = 0  # steps seen
        self.recent = torch.zeros(2, WINDOW, device=device)  # their losses and gradient norms
        self.in_a_row = torch.zeros((), device=device)
        self.begin()

    def begin(self):
        """Forget which steps were skipped; they were told."""
        device = self.recent.device
        self.count = torch.zeros((), device=device)
        self.skipped = torch.zeros(NAMED + 1, 5, device=device)  # step, its figures, what is usual

    def unusual(self, step, loss, norm):
        """Whether to skip `step`: a tensor of one bool. loss, norm: of the whole job, tensors."""
        now, n = torch.stack((loss.float(), norm.float())), min(self.n, WINDOW)
        past = self.recent[:, :n]
        mean = past.mean(dim=1) if n else torch.zeros_like(now)
        limit = torch.full_like(now, float("inf"))
        if n >= LEAST:
            limit = torch.maximum(mean + DEVIATIONS * past.std(dim=1), self.harmless)
        finite = torch.isfinite(now)
        bad = ~finite.all() | (now > limit).any()
        # What is far out counts as just at the limit: the next is still judged, but if all that
        # comes is like this, a few steps make it usual.
        usual = torch.where(finite, torch.minimum(now, limit), mean)
        self.recent[:, self.n % WINDOW] = usual
        self.n += 1
        self.in_a_row = torch.where(bad, self.in_a_row + 1, 0.0)
        row = torch.cat((torch.full_like(now[:1], step), now, mean))
        place = torch.where(bad, self.count.clamp_max(NAMED - 1), NAMED).long()
        self.skipped.index_copy_(0, place[None], row[None])
        self.count += bad
        return bad

    def told(self, where):
        """Lines about the steps that were skipped since the last call; where(step) ends them, with
        the rows that were read. Waits for the device."""
        lines = []
        count = int(self.count)
        for step, loss, norm, usual, normal in self.skipped[: min(count, NAMED)].tolist():
            lines.append(f"step {step:.0f} changed nothing: loss {loss:.4g} (usually {usual:.4g}),"
                         f" gradient norm {norm:.4g} (usually {normal:.4g}){where(int(step))}")
        if count > NAMED:
            lines.append(f"and {count - NAMED} steps more")
        self.begin()
        return lines

    def check(self):
        """UserError if too many steps in a row were skipped."""
        if self.in_a_row >= IN_A_ROW:
            raise UserError(
                f"the last {self.in_a_row:.0f} steps changed nothing, so this run has come apart: "
                "look at the rows named above, lower the learning rates (--lr, --muon_lr), or try "
                "--precision=fp32; the same command goes on from the newest checkpoint, and "
                "without that one's folder from the one before")

    def state_dict(self):
        return {"n": self.n, "recent": self.recent, "in_a_row": self.in_a_row}

    def load_state_dict(self, state):
        self.n = state["n"]
        self.recent.copy_(state["recent"])
        self.in_a_row.copy_(state["in_a_row"])
