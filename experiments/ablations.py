"""What the decoder leaves out on purpose, and what it has: one change at a time, trained on text.

    python prepare.py text --files=books.jsonl --vocabulary=4096 --val_share=0.03 --out=data/recipe
    OMP_NUM_THREADS=1 python experiments/ablations.py 3x128 640 --seeds=1,2,3    # all variants
    OMP_NUM_THREADS=1 python experiments/ablations.py 2x96 640 base rms_norm swi_glu
    python experiments/ablations.py table
    python experiments/ablations.py plot 3x128 320    # docs/ablations.png, from out/trials
    python experiments/ablations.py sizes 3x128       # parameters, activations
    python experiments/ablations.py markdown          # the table of docs/ablations.md

Runs are those of experiments/recipe.py, with the recipe of configs/recipe: each is a row of
docs/ablations.csv. A variant replaces modules of a new model.GPT in a few lines; model.py has no
switch. Where a variant has fewer parameters than the base, its MLP is wider by as many.
"""

import json
import math
import operator
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
import recipe

from model import GPT, GPTConfig, init_weights, rotary_tables, rotate

recipe.RESULTS = recipe.ROOT / "docs/ablations.csv"


def blocks(change):
    """A variant that calls change(block, config) for each block."""
    def variant(net):
        for block in net.blocks:
            change(block, net.config)
        return net
    return variant


class ScaledRMSNorm(nn.RMSNorm):
    bias = None  # model.init_weights leaves norms alone


def rms_norm(net):
    for module in net.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, ScaledRMSNorm(child.normalized_shape, eps=1e-5))
    return net


def activation(function):
    def change(block, config):
        block.mlp.relu = function
    return blocks(change)


class SquaredReLU(nn.Module):
    def forward(self, x):
        return F.relu(x).square()


class SwiGLU(nn.Module):
    """Three matrices of width 8/3 C: as many parameters as two of 4 C (Shazeer 2020)."""

    def __init__(self, C):
        super().__init__()
        width = round(8 * C / 3)
        self.gate, self.up = nn.Linear(C, width, bias=False), nn.Linear(C, width, bias=False)
        self.down = nn.Linear(width, C, bias=False)
        self.apply(init_weights)
        nn.init.zeros_(self.down.weight)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def swi_glu(block, config):
    block.mlp = SwiGLU(config.n_embd)


def tied(net):
    """One table for both: as small as a head, and multiplied by sqrt(C) when looked up (Gemma)."""
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * self.embedding_dim**0.5
    net.token_embedding = Scaled(net.config.vocab_size, net.config.n_embd)
    nn.init.normal_(net.token_embedding.weight, std=net.config.n_embd**-0.5)
    net.head.weight = net.token_embedding.weight
    return net


class Attention(nn.Module):
    """model.Attention with other keys and values, written out where scores are changed."""

    def __init__(self, config, kv_heads=None, latent=0, qk_norm=False, positions="rotary"):
        super().__init__()
        C, self.H = config.n_embd, config.n_head
        self.D, self.K = C // self.H, kv_heads or self.H
        self.qk_norm, self.positions, kv = qk_norm, positions, 2 * self.K * (C // self.H)
        self.q, self.out = nn.Linear(C, C, bias=False), nn.Linear(C, C)
        self.kv = (nn.Linear(C, kv, bias=False) if not latent else nn.Sequential(
            nn.Linear(C, latent, bias=False), nn.LayerNorm(latent),
            nn.Linear(latent, kv, bias=False)))
        # Muon orthogonalises the matrices of keys and of values separately, as in model.Attention
        (self.kv[-1] if latent else self.kv).weight.stacked = 2
        # called an embedding, so that AdamW trains it
        self.distance_embedding = (nn.Parameter(torch.zeros(self.H, 32)) if positions == "t5"
                                   else None)
        self.apply(init_weights)
        nn.init.zeros_(self.out.weight)

    def forward(self, x, rotary, mask, slots):
        B, T, C = x.shape
        q = self.q(x).view(B, T, self.H, self.D)
        k, v = self.kv(x).view(B, T, 2, self.K, self.D).unbind(2)
        if self.qk_norm:
            q, k = F.rms_norm(q, (self.D,)), F.rms_norm(k, (self.D,))
        if self.positions == "rotary":
            cos, sin = (table.squeeze(-2) for table in rotary)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (part.repeat_interleave(self.H // self.K, 2) for part in (k, v))
        q, k, v = (part.transpose(1, 2).type_as(x) for part in (q, k, v))
        bias = None if self.distance_embedding is None else self.distances(T).type_as(x)
        y = F.scaled_dot_product_attention(q, k, v, bias, is_causal=bias is None)
        return self.out(y.transpose(1, 2).reshape(B, T, C))

    def distances(self, T):
        """(H, T, T): T5's learned bias of a distance, in 16 exact and 16 logarithmic steps."""
        distance = torch.arange(T)[:, None] - torch.arange(T)
        far = 16 + 16 * (distance.clamp_min(1) / 16).log() / math.log(128 / 16)
        step = torch.where(distance < 16, distance, far).clamp(0, 31).long()
        later = torch.zeros(T, T).masked_fill(distance < 0, float("-inf"))
        return self.distance_embedding[:, step] + later


def attention(saved=0.0, **options):
    """A variant with another Attention; saved: parameters of a block that the MLP gets, in C^2."""
    def change(block, config):
        C = config.n_embd
        block.attention = Attention(config, **{k: v(config) if callable(v) else v
                                               for k, v in options.items()})
        if saved:
            width = round((4 + saved / 2) * C)
            block.mlp.up, block.mlp.down = (nn.Linear(C, width, bias=False),
                                            nn.Linear(width, C, bias=False))
            block.mlp.apply(init_weights)
            nn.init.zeros_(block.mlp.down.weight)
    return blocks(change)


def learned_positions(net):
    """An embedding per position, added to the token's (GPT-2), and no rotation."""
    net = attention(positions="none")(net)
    net.position_embedding = nn.Embedding(net.config.max_positions, net.config.n_embd)
    nn.init.normal_(net.position_embedding.weight, std=0.02)
    hidden = net.hidden
    net.hidden = lambda x, *rest, **more: hidden(
        x + net.position_embedding.weight[: x.size(1)], *rest, **more)
    return net


def rope_theta(theta):
    def variant(net):
        c = net.config
        tables = rotary_tables(c.n_embd // c.n_head, c.max_positions + 1, theta)
        net.rotary_cos, net.rotary_sin = tables
        return net
    return variant


def output_std(std):
    def change(block, config):
        for layer in block.attention.out, block.mlp.down:
            nn.init.normal_(layer.weight, std=std)
    return blocks(change)


def quiet_embeddings(net):
    nn.init.normal_(net.token_embedding.weight, std=0.02)
    return net


def half_heads(config):
    return config.n_head // 2 or 1


VARIANTS = {  # name: (flags, variant)
    "base": ([], lambda net: net),
    "rms_norm": ([], rms_norm), "gelu": ([], activation(nn.GELU())),
    "squared_relu": ([], activation(SquaredReLU())), "swi_glu": ([], blocks(swi_glu)),
    "tied": ([], tied), "tied_lr_x0.1": (["--embedding_lr=0.01"], tied),
    "same_attention": ([], attention()),  # the class above: must equal base but for the last bits
    "gqa": ([], attention(1.0, kv_heads=half_heads)),  # half the heads of keys and values
    "mla": ([], attention(1.25, latent=lambda c: c.n_embd // 4)),  # of a quarter of the width
    "qk_norm": ([], attention(qk_norm=True)),
    "no_positions": ([], attention(positions="none")),
    "learned_positions": ([], learned_positions), "t5_positions": ([], attention(positions="t5")),
    "rope_theta_1000": ([], rope_theta(1e3)), "rope_theta_100": ([], rope_theta(100)),
    "outputs_0.02": ([], output_std(0.02)),  # instead of zero
    "embeddings_0.02": ([], quiet_embeddings),  # instead of 1, at the same rate
    "embeddings_0.02_lr_6e-3": (["--embedding_lr=0.006"], quiet_embeddings),
    "adamw": (["--optimizer=adamw", "--lr=4e-3"], lambda net: net),
    "adamw_2e-3": (["--optimizer=adamw", "--lr=2e-3"], lambda net: net),
    "adamw_8e-3": (["--optimizer=adamw", "--lr=8e-3"], lambda net: net),
}


def patch(variant):
    def patched(pretrain):
        pretrain.GPT = lambda config: variant(GPT(config))
    return patched


def sizes(size):
    """Print each variant's parameters, the bytes that its blocks keep for the gradient of 16 rows
    of 256 tokens in bf16, and the time of that forward and backward pass relative to the base: the
    median ratio of seven rounds over all variants."""
    layers, width = map(int, size.split("x"))
    ids, nets, times = torch.zeros(16, 256, dtype=torch.long), {}, {}
    for name, (_, variant) in VARIANTS.items():
        nets[name] = variant(GPT(GPTConfig(4096, layers, recipe.HEADS[width], width, 256)))

    def blocks_of(net, keep=lambda tensor: tensor):
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            return net.hidden(net.token_embedding(ids))

    for _ in range(8):
        for name, net in nets.items():
            began = time.perf_counter()
            blocks_of(net).float().sum().backward()
            times.setdefault(name, []).append(time.perf_counter() - began)
    for name, net in nets.items():
        found = {p.untyped_storage().data_ptr(): 0 for p in net.parameters()}

        def keep(tensor, found=found):
            storage = tensor.untyped_storage()
            found.setdefault(storage.data_ptr(), storage.nbytes())
            return tensor
        out = blocks_of(net, keep)
        del out
        ratios = map(operator.truediv, times[name][1:], times["base"][1:])
        print(f"{name:24s} {sum(p.numel() for p in net.parameters()):10,} parameters, "
              f"{sum(found.values()) / 1e6:6.1f} MB, {statistics.median(ratios):.2f}")


def markdown():
    """Print the table of docs/ablations.md: the loss of each variant relative to the base with the
    same seed, as a mean and for all seeds."""
    found = {}  # (size, variant) -> {seed: loss}
    for row in recipe.rows():
        found.setdefault((row["size"], row["trial"]), {})[row["seed"]] = float(row["val_loss"])
    sizes = list(dict.fromkeys(size for size, _ in found))
    print("| variant |", " | ".join(f"{size}: loss | seeds" for size in sizes), "|")
    print("|---" * (1 + 2 * len(sizes)) + "|")
    for variant in VARIANTS:
        cells = [f"`{variant}`"]
        for size in sizes:
            base, own = found.get((size, "base"), {}), found.get((size, variant), {})
            differences = [own[seed] - base[seed] for seed in sorted(own) if seed in base]
            if variant == "base" and base:
                cells += [f"{statistics.mean(base.values()):.3f}",
                          ", ".join(f"{loss:.3f}" for loss in base.values())]
            else:
                cells += ([f"{statistics.mean(differences):+.3f}",
                           ", ".join(f"{d:+.3f}" for d in differences)] if differences
                          else ["", ""])
        print("|", " | ".join(cells), "|")


def plot(size, steps):
    """Training losses minus those of the base with the same seed, over the steps: the mean over
    seeds."""
    import matplotlib.pyplot as plt
    curves = {}  # (variant, seed) -> {step: loss}
    for variant in VARIANTS:
        for path in recipe.ROOT.glob(f"out/trials/{size}_{steps}_{variant}_[0-9]_*/log.jsonl"):
            seed = path.parent.name.removeprefix(f"{size}_{steps}_{variant}_").split("_")[0]
            rows = map(json.loads, path.read_text().splitlines())
            curves[variant, seed] = {row["step"]: row["loss"] for row in rows if "loss" in row}
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained", sharey=True)
    for number, variant in enumerate(name for name in VARIANTS if name != "base"):
        both = [(curve, curves["base", seed]) for (name, seed), curve in curves.items()
                if name == variant and ("base", seed) in curves]
        if both:
            shared = sorted(set.intersection(*(set(c) & set(base) for c, base in both)))
            mean = [statistics.mean(c[s] - base[s] for c, base in both) for s in shared]
            axes[number % 2].plot(shared, mean, label=variant)
    for ax in axes:
        ax.axhline(0, color="black", lw=0.5)
        ax.set(xlabel="step", ylim=(-0.15, 0.4))
        ax.legend(fontsize=8)
    axes[0].set(ylabel="training loss minus that of the base, nats per token")
    figure.savefig(recipe.ROOT / "docs/ablations.png", dpi=90)


if __name__ == "__main__":
    if sys.argv[1] in ("plot", "sizes", "markdown"):
        sys.exit(globals()[sys.argv[1]](*sys.argv[2:]))
    recipe.TRIALS = {name: (flags, patch(variant)) for name, (flags, variant) in VARIANTS.items()}
    recipe.__file__ = __file__  # what a trial's own process runs
    recipe.main()
