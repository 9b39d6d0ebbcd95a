"""The vision side, one change at a time: projector, CLIP's layer, image tokens, what is trained.

    python prepare.py demo
    python experiments/vision_ablations.py parents            # a CLIP and a decoder, once
    python experiments/vision_ablations.py 240 --seeds=1,2    # all variants
    python experiments/vision_ablations.py table

The demo's data and settings, but images of 64 pixels, whose 4 x 4 patches can be pooled 4:1. All
variants start from one CLIP and one decoder; a run is vision_pretrain.py and as many steps of
vision_sft.py as said, and a row of docs/vision_ablations.csv: the validation loss of answers with
the correct image and with a mismatched one, and the share of exact answers.
"""

import csv
import importlib
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
import recipe
from recipe import ROOT, rows

import vision
from vision import VisionTower

RESULTS = recipe.RESULTS = ROOT / "docs/vision_ablations.csv"
HEAD = ("steps", "variant", "seed", "loss", "loss_mismatched", "exact", "cpu_seconds")
PARENTS = "out/vision_ablations"


def projector(layers):
    """Another number of linear layers, with GELU between them."""
    class Other(nn.Sequential):
        def __init__(self, clip_width, width):
            linears = [nn.Linear(width if i else clip_width, width) for i in range(layers)]
            for linear in linears:
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
                nn.init.zeros_(linear.bias)
            super().__init__(*[part for i, linear in enumerate(linears)
                               for part in ([nn.GELU()] * (i > 0) + [linear])])
            object.__setattr__(self, "linear_1", linears[0])  # whose type image_tokens asks for

    def patch():
        vision.Projector = Other
    return patch


def clip_layer(n_layers):
    """Features of another layer of CLIP; None: the last one."""
    def patch():
        VisionTower.patches = lambda self, pixels: self.encoder(
            self.pre_layrnorm(self.embeddings(pixels)), n_layers=n_layers)[:, 1:]
    return patch


def pooled(side):
    """Image tokens are means of side x side patches."""
    def patch():
        spec, patches = vision.image_spec, VisionTower.patches

        def means(self, pixels):
            x = patches(self, pixels)
            n = math.isqrt(x.size(1))
            x = x.mT.unflatten(2, (n, n))
            return F.avg_pool2d(x, side).flatten(2).mT
        VisionTower.patches = means
        vision.image_spec = lambda c: spec(c)._replace(n_patches=spec(c).n_patches // side**2)
    return patch


def trained(pattern):
    """What of the decoder vision_sft trains: weights whose names contain `pattern`; "": none."""
    def patch():
        import vision_sft
        make = vision_sft.make_optimizer

        def changed(model, cfg, *more, **options):
            for name, p in model.decoder.named_parameters():
                p.requires_grad_(bool(pattern) and pattern in name)
            return make(model, cfg, *more, **options)
        vision_sft.make_optimizer = changed
    return patch


VARIANTS = {
    "base": lambda: None, "projector_1": projector(1), "projector_3": projector(3),
    "clip_last": clip_layer(None), "clip_middle": clip_layer(2), "clip_first": clip_layer(1),
    "pooled_4": pooled(2), "pooled_16": pooled(4),
    "frozen": trained(""), "attention_only": trained("attention"),
}


def run_stage(name, seed, *flags):
    """Train a stage in this process; returns its last validation losses."""
    from train.run import Run
    found, record = {}, Run.record
    Run.record = lambda self, step, **losses: (found.update(losses), record(self, step, **losses))
    sys.argv = [f"{name}.py", str(ROOT / f"configs/demo/{name}.py"), "--eval_every=0",
                "--log_every=100", "--resume=False", f"--seed={seed}", *flags]
    importlib.import_module(name).main()
    Run.record = record
    return found


def one(steps, variant, seed):
    out, began = f"{PARENTS}/{variant}_{seed}", time.process_time()
    VARIANTS[variant]()
    run_stage("vision_pretrain", seed, f"--init_from={PARENTS}/sft", f"--out={out}/1",
              f"--clip={PARENTS}/clip_pretrain")
    losses = run_stage("vision_sft", seed, f"--init_from={out}/1", f"--out={out}/2",
                       f"--max_steps={steps}")
    seconds = time.process_time() - began
    from data import Chats
    from evals.validation import exact_answers
    from inference.conversation import open_for_chat
    model, tokenizer, _ = open_for_chat(f"{out}/2", torch.device("cpu"))
    marks = exact_answers(model, tokenizer, Chats("data/demo/scenes", "val"), 1000, "correct")[""]
    return (losses["val_loss"], losses["val_loss_mismatched_image"],
            statistics.mean(mark for mark, _ in marks), seconds)


def table():
    for variant in dict.fromkeys(row["variant"] for row in rows()):
        found = [row for row in rows() if row["variant"] == variant]
        print(f"{variant:16s}", len(found), *(
            f"{name} {statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
            for name in HEAD[3:] for values in [[float(row[name]) for row in found]]))


def main():
    if sys.argv[1] == "table":
        return table()
    if sys.argv[1] == "parents":
        for name, *flags in (("clip_pretrain", "--image_size=64"), ("pretrain",),
                             ("sft", f"--init_from={PARENTS}/pretrain")):
            subprocess.run([sys.executable, f"{name}.py", f"configs/demo/{name}.py",
                            f"--out={PARENTS}/{name}", *flags], cwd=ROOT, check=True)
        return None
    if sys.argv[1] == "one":
        steps, variant, seed = sys.argv[2:]
        figures = one(steps, variant, seed)
        new = not RESULTS.is_file()
        with open(RESULTS, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerows([HEAD] * new)
            writer.writerow([steps, variant, seed, *(f"{x:.4f}" for x in figures)])
        os._exit(0)
    steps, *names = [a for a in sys.argv[1:] if not a.startswith("--")]
    seeds = next((a[8:] for a in sys.argv if a.startswith("--seeds=")), "1").split(",")
    for seed in seeds:
        for variant in names or VARIANTS:
            if not any((r["steps"], r["variant"], r["seed"]) == (steps, variant, seed)
                       for r in rows()):
                subprocess.run([sys.executable, __file__, "one", steps, variant, seed], cwd=ROOT,
                               check=False)
    return None


if __name__ == "__main__":
    main()
