"""Compare runs: cost, losses, scores and the settings that differ, with a plot.

    python experiments/compare_runs.py out/small/pretrain out/other/pretrain --out=out/comparison

A run is the output folder of a stage. Its scores are those of its newest checkpoint in an eval.json
(eval.py --tasks --out) or report.json in that folder. Writes report.md and report.html.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import checkpoint
from common.atomic import check_output, writing
from common.config import UserError, parse, read_json, run_main
from common.report import code, found_scores, score_texts, table, write_report
from train import log

MISSING = "–"


@dataclass
class Config:
    # --- output
    out: str = "out/comparison"  # folder for report.md, report.html and the plot


def compare(folders, out):
    """Write report.md and report.html about the runs in `folders` into the folder `out`."""
    if len(folders) < 2:
        raise UserError("name two or more runs to compare, like out/a out/b")
    infos, logs, runs = zip(*(read_run(Path(folder)) for folder in folders), strict=True)
    check_output(out, "--out=", folder=True)
    if checkpoint.steps_in(out):
        raise UserError(f"--out={out} is a run, whose own report would be lost; choose another")
    names = [Path(folder).resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = list(map(str, folders))
    sections = {}
    for title in runs[0]:
        columns = [run[title] for run in runs]
        labels = dict.fromkeys(label for column in columns for label in column)
        rows = [[label, *(column.get(label, MISSING) for column in columns)] for label in labels]
        if title == "Settings that differ":
            rows = [row for row in rows if len(set(row[1:])) > 1]
        sections[title] = [table([title.lower().split()[0], *names], rows) if rows else "None."]
    sections["Losses"] = [*plot(names, infos, logs), *sections["Losses"]]
    commands = [start["command"] for info in infos for start in info.get("origins", [])[-1:]]
    if commands:
        sections["Commands"] = [code(command) for command in commands]
    with writing(out, "--out="):
        write_report(out, "Comparison of runs", ", ".join(map(str, folders)), sections)
    print(f"{Path(out) / 'report.html'} and report.md compare {len(runs)} runs")


def read_run(folder):
    """(config.json, rows of log.jsonl, {title of a table: {label: text}}) of a finished run."""
    steps = checkpoint.steps_in(folder)
    if not steps:
        raise UserError(f"{folder} is not a run: it has no step_* folder with a checkpoint")
    newest, rows = list(steps.values())[-1], log.read_rows(folder)
    info = read_json(newest / "config.json")
    if not {"settings", "metrics", "stage", "step"} <= info.keys() or not info["metrics"]:
        raise UserError(f"{newest} was not trained here, so there is nothing to compare")
    metrics, settings, starts = info["metrics"], info["settings"], info.get("origins") or [{}]
    unit, data = ("img", "pairs") if "batch_pairs" in settings else ("tok", "tokens")
    return info, rows, {
        "Losses": log.losses(metrics),
        "Cost": {
            "stage": info["stage"], "steps": f"{info['step']:,}",
            "read": f"{info['step'] * log.per_step(settings):,} {data}",
            **dict(log.speeds(rows, unit)), "peak memory": log.memory(metrics),
            "wall time": log.duration(metrics["seconds"]), "price": log.price(metrics["dollars"]),
            **{name: starts[-1].get(name, MISSING) for name in ("commit", "hardware")}},
        "Scores": scores_of(folder, checkpoint.file_sum(newest / "manifest.json")),
        "Settings that differ": {name: str(value) or "(empty)" for name, value in settings.items()
                                 if name not in ("out", "resume")}}


def scores_of(folder, digest):
    """{name: "value ± error"} of the checkpoint whose manifest has the sha256 `digest`."""
    scores = score_texts(found_scores(folder / "report.json", digest))
    for task, result in found_scores(folder / "eval.json", digest).get("tasks", {}).items():
        for label, (value, error) in result["scores"].items():
            scores[f"{task}/{label}"] = f"{value:.4f} ± {error:.4f}"
    return scores


def plot(names, infos, logs):
    """The losses by tokens or pairs of training."""
    lines, units = [], set()
    for i, (name, info, rows) in enumerate(zip(names, infos, logs, strict=True)):
        units.add("pairs" if "batch_pairs" in info["settings"] else "tokens")
        for loss, style in (("loss", {"alpha": 0.35}), ("val_loss", {"marker": "o"})):
            points = [((row["step"] + 1) * log.per_step(info["settings"]), row[loss])
                      for row in rows if loss in row]
            label = f"_{name}" if loss == "loss" else name  # the legend omits _
            if points:
                lines.append((label, points, {"color": f"C{i}", "markersize": 4, **style}))
    alt = "Dots: validation loss. Faint: training loss."
    return [log.curves("loss.png", lines, " or ".join(sorted(units)), alt), alt] if lines else []


def main():
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    compare(names, parse(Config, sys.argv[1 + len(names):], "RUN RUN ...").out)


if __name__ == "__main__":
    run_main(main)
