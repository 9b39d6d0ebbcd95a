"""Counts the floating-point operations of a training step while it runs.

PyTorch's counter sees every matrix product, forward and backward, also in optimizers and in
model.HeadLoss. The operations that PyTorch 2.13 does not count are added here.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

aten = torch.ops.aten
SAME_COST = {  # missing operations: others with the same arguments and as many FLOP
    aten.addmm_: aten.addmm,
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        aten._scaled_dot_product_flash_attention_backward,
}


def flop_counter():
    """A context whose get_total_flops() counts what runs inside, except compiled code."""
    for missing, known in SAME_COST.items():
        flop_registry.setdefault(missing, flop_registry[known])
    return FlopCounterMode(display=False)
