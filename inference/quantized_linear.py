"""Linear layers for decoding on a CPU: packed or quantized weights.

A product of one row is memory-bound: weights of half the size take half the time. docs/log.md has
the measurements. relu=True fuses a ReLU into the product (4 % of a token; no bias then).

Shapes: N outputs, K inputs.
"""

import functools
import warnings

import torch
from torch import nn

from common.config import UserError
from common.device import pick_dtype, processor

FEW = 4  # rows up to which FBGEMM's fp16 weights are faster than oneDNN's fp32 or bf16 ones


def has_fbgemm(device):
    """Whether this PyTorch and this processor have FBGEMM's products (x86; not ARM)."""
    return device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines


class PackedLinear(nn.Module):
    """A Linear with fp32, bf16 or fp16 weights.

    Few rows use FBGEMM's fp16 product, in which x and sums are fp32. fp16 holds the values of bf16
    too; fp32 weights are split into their rounding to fp16 and the rounding error times 2**11:
    together as exact as fp32, and nearly twice as fast as fp32 products of one row, which reach
    only half of the memory bandwidth. Many rows use oneDNN's fp32 product, or where it is native
    its bf16 one.
    """

    def __init__(self, linear, relu=False, dtype=torch.float32):
        super().__init__()
        self.in_features, self.relu, self.many = linear.in_features, relu, None
        self.dtype, self.split, weight = dtype, dtype == torch.float32, linear.weight.to(dtype)
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        few = weight.float()
        if self.split:
            rounded = few.half().float()
            few = torch.cat((rounded, (few - rounded) * 2**11), dim=1)  # (N, 2 * K)
        self.few = torch.ops.quantized.linear_prepack_fp16(few, self.bias)
        if self.split or (dtype == torch.bfloat16 and processor().bf16):
            self.many = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def forward(self, x):
        if self.many is None or x.numel() <= FEW * self.in_features:
            x, ops = x.float(), torch.ops.quantized
            product = ops.linear_relu_dynamic_fp16 if self.relu else ops.linear_dynamic_fp16
            return product(torch.cat((x, x * 2**-11), dim=-1) if self.split else x, self.few)
        y = torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.many, None,
                                               "relu" if self.relu else "none", [], "")
        return y if self.bias is None else y + self.bias


class Int8Linear(nn.Module):
    """A Linear with int8 weights, one scale per output, and dynamic int8 quantization of x.

    Several rows are normalized by their maximum first, as they share one scale. Without VNNI,
    FBGEMM adds pairs of products in saturating int16; there the scale keeps the sum of two
    neighbouring weights of one sign within 128, which costs most rows half a bit.
    """

    def __init__(self, linear, relu=False):
        super().__init__()
        self.in_features, self.relu = linear.in_features, relu
        weight = linear.weight.detach().float()
        largest = weight.abs() if processor().vnni else torch.cat([
            part.clamp_min(0).unflatten(1, (-1, 2)).sum(-1) for part in (weight, -weight)], dim=1)
        scale = largest.amax(dim=1).clamp_min(1e-12) / 127  # (N,)
        zeros = torch.zeros(len(scale), dtype=torch.long)
        with warnings.catch_warnings():  # deprecated, but twice as fast as its replacement
            warnings.simplefilter("ignore")
            weight = torch.quantize_per_channel(weight, scale, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(weight, None)
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x):
        ops = torch.ops.quantized
        product = ops.linear_relu_dynamic if self.relu else ops.linear_dynamic
        if x.numel() == self.in_features:
            y = product(x, self.packed)
        else:
            largest = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12)
            y = product(x / largest, self.packed) * largest
        return y if self.bias is None else y + self.bias


def fastest_precision(device, precision="auto"):
    """What --precision=auto means for generation: the fastest type that costs under 0.01 nats per
    token. int8 on every x86 instruction set (docs/log.md), elsewhere the training precision."""
    return "int8" if precision == "auto" and has_fbgemm(device) else precision


def for_decoding(decoder, precision="auto"):
    """Convert `decoder` for fast decoding, in place; it cannot be trained or saved afterwards.

    precision: fp32, bf16, fp16, int8, or auto for the training precision, which scores use. On a
    CPU it is that of weights and products; norms, attention and residuals are fp32.
    """
    device = decoder.token_embedding.weight.device
    decoder.requires_grad_(False).eval()
    if not has_fbgemm(device):
        if precision == "int8":
            raise UserError("--precision=int8 needs an x86 CPU; use --precision=auto")
        return decoder.to(pick_dtype(device, precision))
    decoder.float()
    kind = Int8Linear if precision == "int8" else functools.partial(
        PackedLinear, dtype=pick_dtype(device, precision))
    # Without VNNI, 8-bit qkv weights cause half of the quantization error (docs/log.md).
    fp16 = functools.partial(PackedLinear, dtype=torch.float16)
    qkv_kind = fp16 if precision == "int8" and not processor().vnni else kind
    for block in decoder.blocks:
        attention, mlp = block.attention, block.mlp
        attention.qkv, attention.out = qkv_kind(attention.qkv), kind(attention.out)
        mlp.up, mlp.down, mlp.relu = kind(mlp.up, relu=True), kind(mlp.down), nn.Identity()
    decoder.head = kind(decoder.head)
    return decoder
