"""Linear layers that only decode: weights laid out, or rounded, for products with few rows.

With one row a product reads every weight once and uses it once, so a weight of half the size takes
half the time. docs/log.md has the figures. relu: they end with a ReLU (no bias then).

Letters for shapes: N outputs, K inputs.
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
    """A Linear whose weight is stored in the blocks that oneDNN multiplies by, and for few rows
    once more, in two fp16 numbers that add up to it.

    FBGEMM's product with fp16 weights, converted to fp32 as they are read, runs at the speed of the
    memory; fp32 products of one row (MKL's, oneDNN's) reach half of it. The second number is what
    rounding to the first left, times 2**11: together they are within half a unit of fp32's last
    place.
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
        """Whether this PyTorch and this processor have it."""
        ops = torch.ops.mkldnn
        return (device.type == "cpu" and torch.backends.mkldnn.is_available()
                and hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")
                and (dtype == torch.float32
                     or (dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported())))


class HalfLinear(nn.Module):
    """A Linear with weights of 16 bits, fp16 or rounded to bf16, for x and sums in fp32.

    It is FBGEMM's product with fp16 weights; what bf16 holds fp16 holds, too, down to 6e-8. Where
    the processor has bf16 products, many rows of bf16 weights take oneDNN's and come out in bf16.
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
        """Whether this PyTorch and this processor have it."""
        return (device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines
                and hasattr(torch.ops.quantized, "linear_dynamic_fp16"))


def half_product(x, packed, relu):
    ops = torch.ops.quantized
    return (ops.linear_relu_dynamic_fp16 if relu else ops.linear_dynamic_fp16)(x, packed)


def packed_product(x, packed, bias, relu):
    then = "relu" if relu else "none"
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, then, [], "")


class Int8Linear(nn.Module):
    """A Linear with weights of 8 bits: integers of -127 to 127, and a scale for each output.

    PyTorch's dynamically quantised product: x is rounded to 8 bits, too, by the range of the values
    in it. Rows are brought to one range first, so that a large one leaves the others their digits.
    Without VNNI the products of two neighbours are added in 16 bits, which saturate. There the sum
    of two neighbours of one sign is kept within 128, so that none leaves 255 * 128; of most rows
    that takes half a bit (7 bits for each weight would take a whole one: docs/log.md).
    """

    def __init__(self, linear, relu=False):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        largest = weight.abs() if processor().vnni else torch.cat([
            part.clamp_min(0).unflatten(1, (-1, 2)).sum(-1) for part in (weight, -weight)], dim=1)
        scale = largest.amax(dim=1).clamp_min(1e-12) / 127  # (N,)
        zeros = torch.zeros(len(scale), dtype=torch.long)
        with warnings.catch_warnings():  # deprecated, but twice as fast as what is not: docs/log.md
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
        """Whether this PyTorch and this processor have it."""
        return (device.type == "cpu" and torch.backends.quantized.engine != "none"
                and hasattr(torch, "quantize_per_channel"))


def fastest_precision(device):
    """The precision that decodes fastest on a device and costs a model under 0.01 nats.

    On every instruction set of x86 that is int8: a token takes 0.7 of the time with 16 bits, and
    many rows less (docs/log.md). What was not measured stays with the type of training.
    """
    if HalfLinear.works(device) and Int8Linear.works(device):
        return "int8"
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names[pick_dtype(device)]


def for_decoding(decoder, precision="auto"):
    """Make `decoder` fast at decoding, in place; it cannot be trained or saved afterwards.

    precision: fp32, bf16, fp16, int8, or auto for what the device trains in, with which scores are
    made. On a CPU they are the weights' and the products'; norms, attention and what goes from
    block to block are fp32.
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
        if dtype != torch.float32 and HalfLinear.works(device):
            kind, dtype = functools.partial(HalfLinear, dtype=dtype), torch.float32
    decoder.to(dtype).requires_grad_(False).eval()
    if precision == "int8" and not processor().vnni and HalfLinear.works(device):
        # Half of what 8 bits cost comes from these weights, a quarter of a block's, and without
        # VNNI the bits are not quite 8 (docs/log.md).
        for block in decoder.blocks:
            block.attention.qkv = HalfLinear(block.attention.qkv)
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
