"""Lay runs side by side: figures, losses, scores and the settings that differ, with a plot.

    python eval.py compare out/small/pretrain out/other/pretrain --out=out/comparison

A run is the folder of a stage. Its scores are taken from an eval.json (eval.py --tasks --out) or
report.json in that folder. Writes report.md and report.html. The command is eval.py's; this module
has none of its own.
"""

from dataclasses import dataclass
from pathlib import Path

from common import checkpoint
from common.config import UserError, read_json
from common.report import code, table, write_report
from train import log

COLOURS = ("#2f81f7", "#d9822b", "#2da44e", "#c43d7a", "#8a63d2", "#14a0a0", "#a08a14", "#d1453b")
NOTHING = "–"


@dataclass
class Config:
    # --- output
    out: str = "out/comparison"  # folder for report.md, report.html and the plot


@dataclass
class Finished:
    """A run: its name in the tables, its newest checkpoint's config.json, log.jsonl and scores."""

    name: str
    info: dict
    rows: list
    scores: dict

    def facts(self):
        """What it did and cost, as {what: figure}."""
        info, m, each = self.info, self.info["metrics"], log.per_step(self.info["settings"])
        made = (info.get("origins") or [{}])[-1]
        unit = "img" if "batch_pairs" in info["settings"] else "tok"
        return {
            "stage": info["stage"], "steps": f"{info['step']:,}",
            "read": f"{info['step'] * each:,} {'pairs' if unit == 'img' else 'tokens'}",
            **dict(log.speeds(self.rows, unit)), "peak memory": log.memory(m),
            "wall time": log.duration(m["seconds"]), "price": log.price(m["dollars"]),
            **{name: made.get(name, NOTHING) for name in ("commit", "hardware")}}

    def losses(self):
        return {log.MEANING.get(name, name): f"{value:.4f}"
                for name, value in self.info["metrics"].items() if name not in log.COSTS}


def compare(folders, out):
    """Write report.md and report.html about the runs in `folders` into the folder `out`."""
    if len(folders) < 2:
        raise UserError("say which runs to compare, two or more: "
                        "python eval.py compare out/a out/b")
    if checkpoint.steps_in(out):
        raise UserError(f"--out={out} is a run, whose own report would be lost; choose another")
    runs = [finished(folder, name)
            for folder, name in zip(folders, names_of(folders), strict=True)]
    columns = [run.name for run in runs]
    sections = {"Losses": [*plot(runs), side_by_side("held-out", columns,
                                                     [run.losses() for run in runs])],
                "Cost": [side_by_side("what", columns, [run.facts() for run in runs])]}
    if any(run.scores for run in runs):
        sections["Scores"] = [side_by_side("score", columns, [run.scores for run in runs])]
    settings = [{name: str(value) or "(empty)" for name, value in run.info["settings"].items()
                 if name not in ("out", "resume")} for run in runs]
    names = dict.fromkeys(name for found in settings for name in found)
    differ = [name for name in names if len({found.get(name) for found in settings}) > 1]
    settings = [{name: found[name] for name in differ if name in found} for found in settings]
    sections["Settings that differ"] = [side_by_side("setting", columns, settings) if differ
                                        else "None."]
    made = [part for run in runs for part in run.info.get("origins", [])[-1:]]
    if made:
        sections["Commands"] = [code(log.multiline(part["command"])) for part in made]
    try:
        write_report(out, "Runs side by side", ", ".join(map(str, folders)), sections)
    except OSError as error:
        raise UserError(f"cannot write into --out={out}: {error.strerror}") from None
    print(f"{Path(out) / 'report.html'} and report.md compare {len(runs)} runs")


def names_of(folders):
    """Short names: the folders' own, or, where those are alike, the paths as they were given."""
    names = [Path(folder).resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def finished(folder, name):
    """The Finished run in a folder; UserError if it is none."""
    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder} to compare")
    found = checkpoint.steps_in(folder)
    if not found:
        raise UserError(f"{folder} is no run: it has no step_* folder with a checkpoint")
    newest = list(found.values())[-1]
    info = read_json(newest / "config.json")
    if not {"settings", "metrics", "stage", "step"} <= info.keys() or not info["metrics"]:
        raise UserError(f"{newest} was not trained here, so there is nothing to compare")
    digest = checkpoint.file_sum(newest / "manifest.json")
    return Finished(name, info, log.read_rows(folder), scores_in(Path(folder), digest))


def scores_in(folder, digest):
    """{score: figure with its error, chance and checkpoint if it is another one} of a run."""
    scores = {}
    if (folder / "report.json").is_file():
        found = read_json(folder / "report.json")
        for name, value in found.items():
            if isinstance(value, (int, float)) and not name.endswith("_error"):
                error = found.get(f"{name}_error")
                scores[name] = f"{value:.4g}" + (f" ± {error:.2g}" if error is not None else "")
    if (folder / "eval.json").is_file():
        found = read_json(folder / "eval.json")
        other = "" if found.get("sha256") == digest else ", of another checkpoint"
        for task, result in found.get("tasks", {}).items():
            for label, (value, error) in result["scores"].items():
                scores[f"{task}/{label}"] = f"{value:.4f} ± {error:.4f}{other}"
                if result.get("chance") is not None and label.startswith("acc"):
                    scores[f"{task} by guessing"] = f"{result['chance']:.4f}"
    return scores


def side_by_side(what, columns, figures):
    """A table with a column for each {name: figure}."""
    names = dict.fromkeys(name for found in figures for name in found)
    return table([what, *columns],
                 [[name, *(found.get(name, NOTHING) for found in figures)] for name in names])


def plot(runs):
    """The losses by what was read until then."""
    lines = []
    for i, run in enumerate(runs):
        each, colour = log.per_step(run.info["settings"]), COLOURS[i % len(COLOURS)]
        for name, look in (("loss", {"alpha": 0.35}), ("val_loss", {"marker": "o"})):
            points = [((row["step"] + 1) * each, row[name]) for row in run.rows if name in row]
            label = "_" * (name == "loss") + run.name  # the legend leaves out what begins with _
            lines += [(label, points, {"color": colour, "markersize": 4, **look})] if points else []
    units = {"pairs" if "batch_pairs" in run.info["settings"] else "tokens" for run in runs}
    xlabel, alt = " or ".join(sorted(units)), "Dots: held-out loss. Faint: training loss."
    return [log.curves("loss.png", lines, xlabel, alt), alt] if lines else []
