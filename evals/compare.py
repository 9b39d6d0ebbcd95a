"""Compare runs: cost, losses, scores and the settings that differ, with a plot.

    python eval.py compare out/small/pretrain out/other/pretrain --out=out/comparison

A run is the output folder of a stage. Its scores are those of an eval.json (eval.py --tasks --out)
or report.json in that folder. Writes report.md and report.html.
"""

from dataclasses import dataclass
from pathlib import Path

from common import checkpoint
from common.config import UserError, read_json
from common.report import code, score_texts, table, write_report
from train import log

COLOURS = ("#2f81f7", "#d9822b", "#2da44e", "#c43d7a", "#8a63d2", "#14a0a0", "#a08a14", "#d1453b")
MISSING = "–"


@dataclass
class Config:
    # --- output
    out: str = "out/comparison"  # folder for report.md, report.html and the plot


@dataclass
class FinishedRun:
    """A run's config.json, the rows of its log.jsonl, and a column {row: text} of each table."""

    info: dict
    rows: list
    columns: dict  # of "Losses", "Cost", "Scores", "Settings that differ"


def compare(folders, out):
    """Write report.md and report.html about the runs in `folders` into the folder `out`."""
    if len(folders) < 2:
        raise UserError("name two or more runs to compare: python eval.py compare out/a out/b")
    if checkpoint.steps_in(out):
        raise UserError(f"--out={out} is a run, whose own report would be lost; choose another")
    names = [Path(folder).resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = list(map(str, folders))
    runs = [read_run(Path(folder)) for folder in folders]
    sections = {}
    for title in runs[0].columns:
        columns = [run.columns[title] for run in runs]
        labels = dict.fromkeys(label for column in columns for label in column)
        rows = [[label, *(column.get(label, MISSING) for column in columns)] for label in labels]
        if title == "Settings that differ":
            rows = [row for row in rows if len(set(row[1:])) > 1]
        sections[title] = [table([title.lower().split()[0], *names], rows) if rows else "None."]
    sections["Losses"] = [*plot(names, runs), *sections["Losses"]]
    commands = [start["command"] for run in runs for start in run.info.get("origins", [])[-1:]]
    if commands:
        sections["Commands"] = [code(command) for command in commands]
    try:
        write_report(out, "Comparison of runs", ", ".join(map(str, folders)), sections)
    except OSError as error:
        raise UserError(f"cannot write into --out={out}: {error.strerror}") from None
    print(f"{Path(out) / 'report.html'} and report.md compare {len(runs)} runs")


def read_run(folder):
    """The FinishedRun in a folder; UserError if there is none."""
    steps = checkpoint.steps_in(folder)
    if not steps:
        raise UserError(f"{folder} is not a run: it has no step_* folder with a checkpoint")
    newest, rows = list(steps.values())[-1], log.read_rows(folder)
    info = read_json(newest / "config.json")
    if not {"settings", "metrics", "stage", "step"} <= info.keys() or not info["metrics"]:
        raise UserError(f"{newest} was not trained here, so there is nothing to compare")
    losses = log.losses(info["metrics"])
    settings = {name: str(value) or "(empty)" for name, value in info["settings"].items()
                if name not in ("out", "resume")}
    digest = checkpoint.file_sum(newest / "manifest.json")
    return FinishedRun(info, rows, {
        "Losses": losses, "Cost": costs_of(info, rows), "Scores": scores_of(folder, digest),
        "Settings that differ": settings})


def costs_of(info, rows):
    metrics, start = info["metrics"], (info.get("origins") or [{}])[-1]
    unit = "img" if "batch_pairs" in info["settings"] else "tok"
    n = info["step"] * log.per_step(info["settings"])
    return {
        "stage": info["stage"], "steps": f"{info['step']:,}",
        "read": f"{n:,} {'pairs' if unit == 'img' else 'tokens'}",
        **dict(log.speeds(rows, unit)), "peak memory": log.memory(metrics),
        "wall time": log.duration(metrics["seconds"]), "price": log.price(metrics["dollars"]),
        **{name: start.get(name, MISSING) for name in ("commit", "hardware")}}


def scores_of(folder, digest):
    """Scores with their errors; those of a checkpoint with another digest say so."""
    scores = {}
    if (folder / "report.json").is_file():
        scores |= score_texts(read_json(folder / "report.json"))
    if (folder / "eval.json").is_file():
        found = read_json(folder / "eval.json")
        other = "" if found.get("sha256") == digest else ", of another checkpoint"
        for task, result in found.get("tasks", {}).items():
            for label, (value, error) in result["scores"].items():
                scores[f"{task}/{label}"] = f"{value:.4f} ± {error:.4f}{other}"
    return scores


def plot(names, runs):
    """The losses by tokens or pairs of training."""
    lines, units = [], set()
    for name, run, colour in zip(names, runs, COLOURS * len(runs), strict=False):
        units.add("pairs" if "batch_pairs" in run.info["settings"] else "tokens")
        for loss, style in (("loss", {"alpha": 0.35}), ("val_loss", {"marker": "o"})):
            points = [((row["step"] + 1) * log.per_step(run.info["settings"]), row[loss])
                      for row in run.rows if loss in row]
            label = f"_{name}" if loss == "loss" else name  # the legend omits _
            if points:
                lines.append((label, points, {"color": colour, "markersize": 4, **style}))
    alt = "Dots: validation loss. Faint: training loss."
    return [log.curves("loss.png", lines, " or ".join(sorted(units)), alt), alt] if lines else []
