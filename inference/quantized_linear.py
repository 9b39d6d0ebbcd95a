"""Linear layers for decoding: weights packed or quantized for products with few rows.

A product with one row reads every weight once, so half the bytes take half the time (docs/log.md).
relu: the layer ends with a ReLU (and has no bias).

Shapes: N outputs, K inputs.
"""

import functools
import warnings

import torch
from torch import nn

from common.config import UserError
from common.device import pick_dtype, processor
from model import MLP

FEW = 4  # rows for which FBGEMM's 16-bit weights are faster than oneDNN's in fp32 or bf16


class PackedLinear(nn.Module):
    """A Linear with its weight in oneDNN's blocked layout, and for few rows also as the sum of two
    fp16 numbers.

    FBGEMM's product with fp16 weights, converted to fp32 when read, runs at memory speed; fp32
    products with one row (MKL's, oneDNN's) at half of it. The second number is the rounding error
    of the first, times 2**11: together they are exact to half a unit in fp32's last place.
    """

    def __init__(self, linear, relu=False):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, self.bias = linear.weight.detach(), linear.bias
        self.relu, self.few = relu, None
        self.many = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        if weight.dtype == torch.float32 and HalfLinear.works(weight.device):
            rounded = weight.half().float()
            both = torch.cat((rounded, (weight - rounded) * 2**11), dim=1)  # (N, 2 * K)
            self.few = torch.ops.quantized.linear_prepack_fp16(both, self.bias)

    def forward(self, x):
        if self.few is not None and x.numel() <= FEW * self.in_features:
            return half_product(torch.cat((x, x * 2**-11), dim=-1), self.few, self.relu)
        return packed_product(x, self.many, self.bias, self.relu)

    @staticmethod
    def works(device, dtype):
        """Whether this PyTorch and processor support it."""
        ops = torch.ops.mkldnn
        return (device.type == "cpu" and torch.backends.mkldnn.is_available()
                and hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")
                and (dtype == torch.float32
                     or (dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported())))


class HalfLinear(nn.Module):
    """A Linear with 16-bit weights (fp16, or rounded to bf16), fp32 inputs and fp32 sums.

    FBGEMM's product with fp16 weights; fp16 represents bf16 values exactly down to 6e-8. On a
    processor with bf16 products, many rows use oneDNN's, with results in bf16.
    """

    def __init__(self, linear, relu=False, dtype=torch.float16):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, self.relu, self.many = linear.weight.detach().to(dtype), relu, None
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.few = torch.ops.quantized.linear_prepack_fp16(weight.float(), self.bias)
        if dtype == torch.bfloat16 and processor().bf16:
            self.many = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def forward(self, x):
        if self.many is None or x.numel() <= FEW * self.in_features:
            return half_product(x.float(), self.few, self.relu)
        y = packed_product(x.to(torch.bfloat16), self.many, None, self.relu)
        return y if self.bias is None else y + self.bias

    @staticmethod
    def works(device):
        """Whether this PyTorch and processor support it."""
        return (device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines
                and hasattr(torch.ops.quantized, "linear_dynamic_fp16"))


def half_product(x, packed, relu):
    ops = torch.ops.quantized
    return (ops.linear_relu_dynamic_fp16 if relu else ops.linear_dynamic_fp16)(x, packed)


def packed_product(x, packed, bias, relu):
    then = "relu" if relu else "none"
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, then, [], "")


class Int8Linear(nn.Module):
    """A Linear with 8-bit weights: integers from -127 to 127 and a scale per output.

    PyTorch's dynamically quantized product: x is also rounded to 8 bits, by its range. Rows are
    first scaled to one range, so that a large row does not cost the others precision. Without VNNI
    two neighbouring products are added in 16 bits, which saturate; there the sum of two neighbours
    of one sign is kept within 128, so that it stays within 255 * 128. For most rows that costs half
    a bit (7-bit weights would cost one: docs/log.md).
    """

    def __init__(self, linear, relu=False):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        largest = weight.abs() if processor().vnni else torch.cat([
            part.clamp_min(0).unflatten(1, (-1, 2)).sum(-1) for part in (weight, -weight)], dim=1)
        scale = largest.amax(dim=1).clamp_min(1e-12) / 127  # (N,)
        zeros = torch.zeros(len(scale), dtype=torch.long)
        with warnings.catch_warnings():  # deprecated, but twice as fast as its successor
            warnings.simplefilter("ignore")
            weight = torch.quantize_per_channel(weight, scale, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(weight, None)
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.relu = relu

    def forward(self, x):
        if x.numel() == self.in_features:
            y = self.product(x)
        else:
            largest = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12)
            y = self.product(x / largest) * largest
        return y if self.bias is None else y + self.bias

    def product(self, x):
        ops = torch.ops.quantized
        return (ops.linear_relu_dynamic if self.relu else ops.linear_dynamic)(x, self.packed)

    @staticmethod
    def works(device):
        """Whether this PyTorch and processor support it."""
        return (device.type == "cpu" and torch.backends.quantized.engine != "none"
                and hasattr(torch, "quantize_per_channel"))


def fastest_precision(device):
    """The precision that decodes fastest on a device and costs a model less than 0.01 nats.

    On x86 that is int8: a token takes 0.7 of the time of 16 bits (docs/log.md). Devices that were
    not measured use the training precision.
    """
    if HalfLinear.works(device) and Int8Linear.works(device):
        return "int8"
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names[pick_dtype(device)]


def for_decoding(decoder, precision="auto"):
    """Convert `decoder` for fast decoding, in place; it cannot be trained or saved afterwards.

    precision: fp32, bf16, fp16, int8, or auto for the device's training precision, in which scores
    are computed. On a CPU it applies to weights and products; norms, attention and the residual
    stream are fp32. UserError if the device does not support int8.
    """
    device = decoder.token_embedding.weight.device
    if precision == "int8":
        if not Int8Linear.works(device):
            raise UserError("--precision=int8 is for CPUs whose PyTorch has 8-bit products; use "
                            "--precision=auto")
        kind, dtype = Int8Linear, torch.float32
    else:
        dtype = pick_dtype(device, precision)
        kind = PackedLinear if PackedLinear.works(device, dtype) else None
        if dtype != torch.float32 and HalfLinear.works(device):
            kind, dtype = functools.partial(HalfLinear, dtype=dtype), torch.float32
    decoder.to(dtype).requires_grad_(False).eval()
    if precision == "int8" and not processor().vnni and HalfLinear.works(device):
        # These weights, a quarter of a block's, cause half of the error of 8 bits, which is larger
        # without VNNI (docs/log.md).
        for block in decoder.blocks:
            block.attention.qkv = HalfLinear(block.attention.qkv)
    if kind:
        replace(decoder, kind)
    return decoder


def replace(module, kind):
    """Replace every Linear below `module` by kind(linear), fused with a ReLU that follows."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, kind(child))
        elif isinstance(child, MLP):
            child.up, child.down = kind(child.up, relu=True), kind(child.down)
            child.relu = nn.Identity()
        else:
            replace(child, kind)
