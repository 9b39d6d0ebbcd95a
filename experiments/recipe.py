"""Our recipe against the one this project started from, on any text, in an hour or two of a CPU.

    python experiments/recipe.py books.jsonl          # trains what is not there yet, then compares
    python experiments/recipe.py                      # compares what is there

Writes docs/recipe.csv, docs/recipe.png and says how many tokens ours needs to reach the loss at
which the reference ends. The validation documents are drawn from the same files.
"""

import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (1, 2, 3)
RATES = (5e-4, 1e-3, 2e-3)  # for the reference; the best one gets all seeds
TOKENS = 4096  # a step
RUNS = {
    **{f"reference_lr{rate:g}_seed1": ("recipe_reference", f"--lr={rate}", f"--embedding_lr={rate}",
                                       "--seed=1") for rate in RATES},
    **{f"reference_lr0.002_seed{seed}": ("recipe_reference", f"--seed={seed}") for seed in SEEDS},
    **{f"ours_seed{seed}": ("recipe", f"--seed={seed}") for seed in SEEDS},
}


def main():
    if len(sys.argv) > 1:
        python("prepare.py", "text", f"--files={','.join(sys.argv[1:])}", "--vocabulary=4096",
               "--val_share=0.03", "--out=data/recipe")
        for name, (config, *flags) in RUNS.items():
            python("pretrain.py", f"configs/{config}/pretrain.py", f"--out=out/recipe/{name}",
                   *flags)
    curves = {name: curve(name) for name in RUNS if (ROOT / "out/recipe" / name).is_dir()}
    if len(curves) < len(RUNS):
        sys.exit("error: not all runs are there; say which files to train on")
    write(curves)
    draw(curves)
    compare(curves)


def python(*command):
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def curve(name):
    """[(tokens, validation loss)] of a run."""
    lines = (ROOT / "out/recipe" / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [((row["step"] + 1) * TOKENS, row["val_loss"]) for row in rows if "val_loss" in row]


def write(curves):
    with open(ROOT / "docs/recipe.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "tokens", "val_loss"])
        for name, points in curves.items():
            writer.writerows([name, *point] for point in points)


def draw(curves):
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        ours, best = name.startswith("ours"), "lr0.002" in name
        label = name.rsplit("_seed", 1)[0] if name.endswith("seed1") else None
        colour = "tab:red" if ours else "tab:blue" if best else "tab:gray"
        style = "--" if "lr0.0005" in name else "-"
        axes.plot([tokens / 1e6 for tokens, _ in points], [loss for _, loss in points], style,
                  color=colour, label=label, linewidth=1)
    axes.axhline(end(curves, "reference_lr0.002"), color="tab:blue", linewidth=0.5, linestyle=":")
    axes.set(xlabel="training tokens (millions)", ylabel="validation loss (nats)", ylim=(4.2, 6))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(ROOT / "docs/recipe.png", dpi=110)


def end(curves, prefix):
    """The mean over seeds of the loss at which the runs of this name end."""
    return statistics.mean(points[-1][1] for name, points in curves.items()
                           if name.startswith(prefix))


def compare(curves):
    goal = end(curves, "reference_lr0.002")
    print(f"the reference ends at {goal:.4f} after {800 * TOKENS:,} tokens")
    for name, points in curves.items():
        reached = next((tokens for tokens, loss in points if loss <= goal), None)
        when = f"there after {reached:,} tokens" if reached else "never there"
        print(f"{name}: ends at {points[-1][1]:.4f} after {points[-1][0]:,} tokens; {when}")


if __name__ == "__main__":
    main()
