"""Counts the floating-point operations of a training step while it runs.

PyTorch's counter sees every matrix product, forward and backward, also those of the optimizer and
inside model.HeadLoss. Here it learns the operations that it lacks (PyTorch 2.13).
"""

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

aten = torch.ops.aten
ALIKE = {  # operations that it does not know: others with the same arguments and as many FLOP
    aten.addmm_: aten.addmm,
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        aten._scaled_dot_product_flash_attention_backward,
}


def flop_counter():
    """A context whose get_total_flops() counts what runs inside, but nothing in compiled code."""
    for missing, known in ALIKE.items():
        flop_registry.setdefault(missing, flop_registry[known])
    return FlopCounterMode(display=False)
