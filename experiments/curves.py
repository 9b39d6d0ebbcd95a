"""The curves of finished runs as CSV files, one per run.

    python experiments/curves.py docs/results out/demo/*pretrain out/demo/*sft

One row per step with logged figures, one column per figure; docs/results.md says which of them
another machine should reproduce.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.config import UserError, run_main
from train.log import read_rows

EXCLUDED = ("ms", "mfu", "dollars", "tok_per_s", "img_per_s")  # depend on the machine


def main():
    if len(sys.argv) < 3:
        raise UserError("give a folder and runs: experiments/curves.py docs/results out/demo/*sft")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for run in map(Path, sys.argv[2:]):
        rows = {}
        for row in read_rows(run):
            rows.setdefault(row["step"], {}).update(
                (name, value) for name, value in row.items() if name not in EXCLUDED)
        if not rows:
            raise UserError(f"{run} is not a run: it has no log.jsonl with figures")
        path = folder / f"{run.parent.name}_{run.name}.csv"
        names = dict.fromkeys(name for row in rows.values() for name in row)
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows.values())
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    run_main(main)
