"""The curves of finished runs as CSV files, one a run: python experiments/curves.py FOLDER
out/demo/*/

A row a step at which something was logged, a column a figure; docs/results.md shows what of them
should come out alike on another machine.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.config import UserError, run_main
from train.log import read_rows

LEFT_OUT = ("ms", "mfu", "dollars")  # of the machine, not of the run


def main():
    if len(sys.argv) < 3:
        raise UserError("give a folder and runs: experiments/curves.py docs/results out/demo/*/")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for run in map(Path, sys.argv[2:]):
        rows = merged(read_rows(run))
        if not rows:
            raise UserError(f"{run} is no run: it has no log.jsonl with figures")
        path = folder / f"{run.parent.name}_{run.name}.csv"
        write(path, rows)
        print(f"{path}: {len(rows)} rows")


def merged(rows):
    """The rows of log.jsonl with one row a step."""
    by_step = {}
    for row in rows:
        kept = {name: value for name, value in row.items()
                if name not in LEFT_OUT and not name.endswith("_per_s")}
        by_step.setdefault(row["step"], {}).update(kept)
    return list(by_step.values())


def write(path, rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    run_main(main)
