"""Linear layers that only decode: weights laid out, or rounded, for products with few rows.

With one row a product reads every weight once and uses it once, so a weight of half the size takes
half the time. docs/log.md has the figures. relu: they end with a ReLU (no bias then).

Letters for shapes: N outputs, K inputs.
"""

import warnings

import torch
from torch import nn

from common.config import UserError
from common.distributed import pick_dtype
from model import MLP


class PackedLinear(nn.Module):
    """A Linear whose weight is stored in the blocks that oneDNN multiplies by."""

    def __init__(self, linear, relu=False):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self.then = linear.bias, "relu" if relu else "none"
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, self.then, [], "")

    @staticmethod
    def works(device, dtype):
        """Whether this PyTorch and this processor have it."""
        ops = torch.ops.mkldnn
        return (device.type == "cpu" and torch.backends.mkldnn.is_available()
                and hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")
                and (dtype == torch.float32
                     or (dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported())))


class HalfLinear(nn.Module):
    """A Linear with weights in bf16, for x in fp32, kept twice: for one row and for several.

    One row takes FBGEMM's product with fp16 weights, which is a quarter faster there than oneDNN's
    with bf16; what bf16 holds fp16 holds, too, down to 6e-8. Several rows come out in bf16.
    """

    def __init__(self, linear, relu=False):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().bfloat16()
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.then = "relu" if relu else "none"
        self.one = torch.ops.quantized.linear_prepack_fp16(weight.float(), self.bias)
        self.several = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def forward(self, x):
        if x.numel() == x.size(-1):
            if self.then == "relu":
                return torch.ops.quantized.linear_relu_dynamic_fp16(x, self.one)
            return torch.ops.quantized.linear_dynamic_fp16(x, self.one)
        x = x.to(torch.bfloat16)
        y = torch.ops.mkldnn._linear_pointwise(x, self.several, None, self.then, [], "")
        return y if self.bias is None else y + self.bias

    @staticmethod
    def works(device):
        """Whether this PyTorch and this processor have both products."""
        return (PackedLinear.works(device, torch.bfloat16) and "fbgemm" in
                torch.backends.quantized.supported_engines
                and hasattr(torch.ops.quantized, "linear_dynamic_fp16"))


class Int8Linear(nn.Module):
    """A Linear with weights of 8 bits: integers of -127 to 127, and a scale for each output.

    PyTorch's dynamically quantised product: x is rounded to 8 bits, too, by the range of the values
    in it. Rows are brought to one range first, so that a large one leaves the others their digits.
    """

    def __init__(self, linear, relu=False):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp_min(1e-12) / 127  # (N,)
        zeros = torch.zeros(len(scale), dtype=torch.long)
        with warnings.catch_warnings():  # deprecated, but twice as fast as what is not: docs/log.md
            warnings.simplefilter("ignore")
            weight = torch.quantize_per_channel(weight, scale, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(weight, None)
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.relu = relu
        # Without VNNI, sums of two products of 8 bits can leave 16 bits.
        self.seven_bits = not torch.cpu._is_vnni_supported()

    def forward(self, x):
        if x.numel() == self.in_features:
            y = self.product(x)
        else:
            largest = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12)
            y = self.product(x / largest) * largest
        return y if self.bias is None else y + self.bias

    def product(self, x):
        if self.relu:
            return torch.ops.quantized.linear_relu_dynamic(x, self.packed, self.seven_bits)
        return torch.ops.quantized.linear_dynamic(x, self.packed, self.seven_bits)

    @staticmethod
    def works(device):
        """Whether this PyTorch and this processor have it."""
        return (device.type == "cpu" and torch.backends.quantized.engine != "none"
                and hasattr(torch, "quantize_per_channel"))


def for_decoding(decoder, precision="auto"):
    """Make `decoder` fast at decoding, in place; it cannot be trained or saved afterwards.

    precision: fp32, bf16, fp16, int8, or auto for what the device is for. On a CPU bf16 and int8
    are those of the products; norms, attention and what goes from block to block are fp32.
    """
    device = decoder.token_embedding.weight.device
    if precision == "int8":
        if not Int8Linear.works(device):
            raise UserError("--precision=int8 is for CPUs whose PyTorch has 8-bit products; say "
                            "--precision=auto")
        kind, dtype = Int8Linear, torch.float32
    else:
        dtype = pick_dtype(device, precision)
        kind = PackedLinear if PackedLinear.works(device, dtype) else None
        if dtype == torch.bfloat16 and HalfLinear.works(device):
            kind, dtype = HalfLinear, torch.float32
    decoder.to(dtype).requires_grad_(False).eval()
    if kind:
        replace(decoder, kind)
    return decoder


def replace(module, kind):
    """Put kind(linear) in the place of every Linear below `module`, a ReLU behind it inside."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, kind(child))
        elif isinstance(child, MLP):
            child.up, child.down = kind(child.up, relu=True), kind(child.down)
            child.relu = nn.Identity()
        else:
            replace(child, kind)
