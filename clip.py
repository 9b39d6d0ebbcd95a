"""CLIP: image and text encoders with a shared embedding space (Radford et al. 2021).

Parameters are named as in `transformers.CLIPModel`, so `openai/clip-vit-large-patch14` loads here
unchanged and models trained here open there (tests/test_clip.py).

Shapes: B batch, P patches, S pixels, T text positions, C width, E shared embedding.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from common.device import all_gather
from common.images import MEAN, STD
from model import attend, compute_dtype, init_weights


@dataclass
class CLIPConfig:
    """The defaults are ViT-L/14 at 224 pixels."""

    image_size: int = 224
    patch_size: int = 14
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    context: int = 77  # longest caption in tokens
    vocab_size: int = 49408
    end_id: int = 49407  # a text's features are those of the first token with this id
    embed_dim: int = 768
    activation: str = "quick_gelu"  # OpenAI's; "gelu" is a little faster to train
    fit: str = "pad"  # how an image becomes a square: "pad" (LLaVA) or "crop" (CLIP)

    @property
    def n_patches(self):
        return (self.image_size // self.patch_size) ** 2


class SelfAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, causal):
        projections = (self.q_proj, self.k_proj, self.v_proj)  # three weights by name, one product
        weight, bias = (torch.cat([getattr(p, name) for p in projections])
                        for name in ("weight", "bias"))
        qkv = F.linear(x, weight, bias).unflatten(-1, (3, self.heads, -1))
        y = attend(*qkv.permute(2, 0, 3, 1, 4), causal=causal)  # each (B, H, T, D)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width, activation):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.quick = activation == "quick_gelu"

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))


class Layer(nn.Module):
    repeated = True  # identical layers, so one compilation serves all

    def __init__(self, width, heads, activation):
        super().__init__()
        self.self_attn = SelfAttention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = FeedForward(width, activation)
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x, causal=False):
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, width, n_layers, heads, activation):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads, activation) for _ in range(n_layers))

    def forward(self, x, causal=False, n_layers=None):
        """Through the first n_layers, or all; -1: all but the last."""
        x = x.to(compute_dtype(x))
        for layer in self.layers[:n_layers]:
            x = layer(x, causal)
        return x


class VisionEmbeddings(nn.Module):
    """Patches by a strided convolution, a class token first, learned positions."""

    def __init__(self, c):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(c.vision_width))
        self.patch_embedding = nn.Conv2d(3, c.vision_width, c.patch_size, c.patch_size, bias=False)
        self.position_embedding = nn.Embedding(c.n_patches + 1, c.vision_width)

    def forward(self, pixels):
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, P, C)
        first = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        return torch.cat((first, patches), dim=1) + self.position_embedding.weight


class VisionTower(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embeddings = VisionEmbeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c.vision_width)  # the spelling of the original
        self.encoder = Encoder(c.vision_width, c.vision_layers, c.vision_heads, c.activation)
        self.post_layernorm = nn.LayerNorm(c.vision_width)

    def forward(self, pixels):
        """Normalised pixels (B, 3, S, S) -> features of the class token (B, C)."""
        x = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return self.post_layernorm(x[:, 0])

    def patches(self, pixels):
        """Patch features (B, P, C) of the second-last layer, the ones LLaVA uses."""
        return self.encoder(self.pre_layrnorm(self.embeddings(pixels)), n_layers=-1)[:, 1:]


class TextEmbeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.token_embedding = nn.Embedding(c.vocab_size, c.text_width)
        self.position_embedding = nn.Embedding(c.context, c.text_width)

    def forward(self, ids):
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.size(1)]


class TextTower(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.end_id = c.end_id
        self.embeddings = TextEmbeddings(c)
        self.encoder = Encoder(c.text_width, c.text_layers, c.text_heads, c.activation)
        self.final_layer_norm = nn.LayerNorm(c.text_width)

    def forward(self, ids):
        """Ids (B, T), each row with an end id -> features (B, C) at the first end id."""
        x = self.encoder(self.embeddings(ids), causal=True)
        ends = (ids == self.end_id).int().argmax(-1)
        return self.final_layer_norm(x[torch.arange(len(x), device=x.device), ends])


class CLIP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision_model = VisionTower(config)
        self.text_model = TextTower(config)
        self.visual_projection = nn.Linear(config.vision_width, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(config.text_width, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.apply(init_weights)
        grid = self.vision_model.embeddings.position_embedding.weight
        with torch.no_grad():
            grid[1:] = sine_grid(config.image_size // config.patch_size, config.vision_width)

    def image_features(self, pixels):
        """(B, 3, S, S) -> unit vectors (B, E)."""
        return F.normalize(self.visual_projection(self.vision_model(pixels)).float(), dim=-1)

    def text_features(self, ids):
        """(B, T) -> unit vectors (B, E)."""
        return F.normalize(self.text_projection(self.text_model(ids)).float(), dim=-1)

    def scale(self):
        """The factor from cosine to logit."""
        return self.logit_scale.exp()

    @torch.no_grad()
    def limit_scale(self):
        """After a step: a scale of 1 to 100, as in the paper. A limit inside the graph would leave
        no gradient to come back by."""
        self.logit_scale.clamp_(0, math.log(100))

    def forward(self, pixels, ids):
        """Images (B, 3, S, S), captions (B, T) -> unit vectors (B, E) of both, and the scale."""
        return self.image_features(pixels), self.text_features(ids), self.scale()

    def flops(self, batch):
        """FLOP of training on a data.Batch of pairs, as in GPT.flops; the pixels have no gradient,
        and what micro-batches compute twice is not counted."""
        c, (B, T) = self.config, batch.ids.shape
        layers = encoder_flops(c.vision_layers, c.vision_width, c.n_patches + 1)
        layers += encoder_flops(c.text_layers, c.text_width, T)
        projections = 2 * c.embed_dim * (c.vision_width + c.text_width)
        return B * (3 * (layers + projections) + 2 * patch_flops(c))


def encoder_flops(n_layers, C, T):
    """FLOP of a forward pass through so many layers of width C, for T positions."""
    return n_layers * (24 * C**2 * T + 4 * C * T**2)


def patch_flops(c):
    """FLOP of cutting an image into patches (CLIPConfig), forward."""
    return c.n_patches * 2 * 3 * c.patch_size**2 * c.vision_width


def sine_grid(n, width):
    """(n * n, width) sines and cosines of a patch's row and column, the initial position
    embedding (Beyer et al. 2022, "Better plain ViT baselines"). The amplitude of 2 keeps a patch's
    position decodable from its features, which the decoder needs (docs/log.md)."""
    frequencies = 100.0 ** -torch.linspace(0, 1, width // 4)
    angles = torch.arange(n)[:, None] * frequencies  # (n, width / 4)
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)  # (n, width / 2)
    rows, columns = waves[:, None].expand(n, n, -1), waves[None].expand(n, n, -1)
    return 2.0 * torch.cat((rows, columns), dim=-1).flatten(0, 1)


class Gather(torch.autograd.Function):
    """All processes' rows, in rank order; gradients of the local rows are summed over processes."""

    @staticmethod
    def forward(ctx, rows):
        return all_gather(rows)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(rows):
    """(B, ...) of this process -> (B * world size, ...)."""
    return Gather.apply(rows) if dist.is_initialized() and dist.get_world_size() > 1 else rows


def contrast(images, texts, scale, keys, gather=gather):
    """This process's share of the contrastive loss in nats, averaged over all processes' pairs.

    images, texts (B, E): unit vectors. keys (B,) int64: captions with equal keys are identical, so
    their images count as positives for each other and share the target evenly. gather: collects the
    rows of all processes; in validation, where all have the same rows, it returns its argument.
    """
    with torch.autocast(images.device.type, enabled=False):  # bf16 rounds logits near 100 to 0.5
        same = (keys[:, None] == gather(keys)).float()  # (B, B of all processes)
        targets = same / same.sum(-1, keepdim=True)
        to_texts = F.cross_entropy(scale * images @ gather(texts).T, targets, reduction="sum")
        to_images = F.cross_entropy(scale * texts @ gather(images).T, targets, reduction="sum")
        return (to_texts + to_images) / (2 * same.size(1))


def feature_pulls(model, batches, machine):
    """For each micro-batch (data.Batch), a function from CLIP.forward's output to the micro-batch's
    share of the full batch's contrastive loss, with the exact full-batch gradient.

    Every pair is a negative for every other, also across micro-batches. So the features of all are
    computed first without a graph, then the loss and its gradient with respect to each feature. In
    the loop each micro-batch is computed again with a graph and backpropagates its part of that
    gradient, in the memory of one micro-batch (Gao et al. 2021, "GradCache").
    """
    n = len(batches)
    if n == 1:
        return [lambda features: contrast(*features, batches[0].keys)]
    with torch.no_grad(), machine.autocast():
        parts = [model(normalise(batch.pixels), batch.ids) for batch in batches]
    images, texts = (torch.cat(part) for part in list(zip(*parts, strict=True))[:2])
    leaves = [leaf.requires_grad_() for leaf in (images, texts, parts[0][2])]
    loss = contrast(*leaves, torch.cat([batch.keys for batch in batches]))
    by_images, by_texts, by_scale = torch.autograd.grad(loss, leaves)
    gradients = zip(by_images.chunk(n), by_texts.chunk(n), [by_scale / n] * n, strict=True)
    return [functools.partial(pulled, gradient, loss.detach() / n) for gradient in gradients]


def pulled(gradient, value, features):
    """A scalar equal to `value` whose gradient with respect to the features is `gradient`."""
    pull = sum((feature * g).sum() for feature, g in zip(features, gradient, strict=True))
    return value + (pull - pull.detach())


def caption_ids(tokenizer, captions, context):
    """Captions in the form that CLIP was trained on, as one tensor (captions, T)."""
    rows = [torch.tensor([tokenizer.end_of_text, *tokenizer.encode(text)[: context - 2],
                          tokenizer.end]) for text in captions]
    return pad_sequence(rows, batch_first=True, padding_value=tokenizer.end)


def normalise(pixels):
    """uint8 pixels (B, S, S, 3) -> (B, 3, S, S), by CLIP's mean and standard deviation."""
    mean, std = mean_and_std(pixels.device)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


@functools.cache
def mean_and_std(device):
    """MEAN and STD as tensors, created once per device: copying to a GPU blocks the host."""
    with torch.inference_mode(False):
        return torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)
