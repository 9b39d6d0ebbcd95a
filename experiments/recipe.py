"""Our recipe compared with the one this project started from, on any text; 1 to 2 hours on a CPU.

    python experiments/recipe.py books.jsonl          # trains all runs, then compares them
    python experiments/recipe.py                      # compares the runs that are there
    python eval.py compare out/recipe/*               # their loss curves in one plot

Writes docs/recipe.csv and prints after how many tokens ours reaches the final loss of the
reference. The validation documents come from the same files.
"""

import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (1, 2, 3)
RATES = (5e-4, 1e-3, 2e-3)  # for the reference; the best one is run with all seeds
TOKENS = 4096  # per step
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
    missing = [name for name in RUNS if not (ROOT / "out/recipe" / name).is_dir()]
    if missing:
        sys.exit(f"error: there is no out/recipe/{missing[0]}; give the files to train on")
    curves = {name: curve(name) for name in RUNS}
    with open(ROOT / "docs/recipe.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "tokens", "val_loss"])
        writer.writerows([name, *point] for name, points in curves.items() for point in points)
    compare(curves)


def python(*command):
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def curve(name):
    """[(tokens, validation loss)] of a run."""
    lines = (ROOT / "out/recipe" / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [((row["step"] + 1) * TOKENS, row["val_loss"]) for row in rows if "val_loss" in row]


def compare(curves):
    """Print when each run reaches the reference's final loss, in the mean of its seeds."""
    goal = statistics.mean(points[-1][1] for name, points in curves.items()
                           if name.startswith("reference_lr0.002"))
    print(f"final loss of the reference: {goal:.4f} after {800 * TOKENS:,} tokens")
    for name, points in curves.items():
        reached = next((tokens for tokens, loss in points if loss <= goal), None)
        when = f"reached after {reached:,} tokens" if reached else "not reached"
        print(f"{name}: {points[-1][1]:.4f} after {points[-1][0]:,} tokens; {when}")


if __name__ == "__main__":
    main()
