"""What a run leaves to read: printed lines, log.jsonl, and its report (common/report.py)."""

import contextlib
import dataclasses
import io
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from common.atomic import append_rows, writing
from common.checkpoint import file_sum
from common.config import UserError, read_json
from common.report import ReportImage, code, lineage_table, sample_blocks, table, write_report

UNITS = {"tok": "tokens", "img": "image-caption pairs"}
COSTS = ("seconds", "dollars", "tflop", "peak_gpu_gb", "peak_rss_gb")  # metrics that are not scores
MEANING = {"loss": "training loss", "val_loss": "validation loss",
           "val_loss_mismatched_image": "validation loss, mismatched image",
           "val_loss_text_only": "validation loss, no image",
           "val_text_loss": "validation loss, text-only chats",
           "choice32": "accuracy of choosing among 32 captions", "zero_shot": "zero-shot accuracy"}


class Log:
    """The metrics of one run. Only the main process prints and writes."""

    def __init__(self, folder, enabled=True):
        self.folder, self.enabled = Path(folder), enabled
        self.rows, self.behind, self.tracker = [], False, None  # behind: not all are on the disk

    def track(self, tracker, settings):
        """Show the metrics of a run with these settings in a tracker too."""
        if self.enabled and tracker != "none":  # trackio or wandb, which share their interface
            try:
                module = __import__(tracker)
            except ImportError:
                raise UserError(f"--tracker={tracker}: first pip install {tracker}") from None
            self.tracker = module.init(project="nanogpt-vision", name=str(self.folder),
                                       config=settings)

    def resume(self, step):
        """Keep the rows up to `step`; those after it will be logged again."""
        if self.enabled:
            with writing(self.folder, "--out="):
                self.rows = [row for row in read_rows(self.folder) if row["step"] <= step]
                self._rewrite()

    def _rewrite(self):
        """Replace log.jsonl by one with all rows."""
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.folder / ".log.jsonl"
        new.unlink(missing_ok=True)
        append_rows(new, self.rows)
        new.replace(self.folder / "log.jsonl")

    def say(self, text):
        """Print one line, from the main process only; an empty one is not printed."""
        if self.enabled and text:
            print(text, flush=True)

    def add(self, step, metrics):
        """Append the finite ones of some metrics to log.jsonl as one row."""
        if not self.enabled:
            return
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self.rows.append({"step": step} | {name: round(x, 6) for name, x in metrics.items()})
        path = self.folder / "log.jsonl"
        try:
            if self.behind or not path.is_file():
                self._rewrite()
            else:
                append_rows(path, self.rows[-1:])
            self.behind = False
        except OSError as error:  # the rows are kept in memory: training continues
            if not self.behind:
                self.say(f"cannot write {path}: {error.strerror}; training continues, the next row "
                         "tries again")
            self.behind = True
        if self.tracker:
            self.tracker.log(metrics, step=step)


def read_rows(folder):
    """The rows of a run's log.jsonl up to a damaged one; [] if there is no such file."""
    path, rows = Path(folder) / "log.jsonl", []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            rows.append({"step": row["step"]} | row)
        except (ValueError, KeyError, TypeError):  # a kill may cut the last line
            break
    return rows


def with_origin(origins, machine, step, max_steps):
    """The starts of a run (command, commit, hardware, software), with this one at `step` unless it
    repeats the last command on the same machine or has no steps to do."""
    command = [os.path.basename(sys.executable), *sys.argv]
    if machine.ranks > 1:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", machine.ranks))
        nodes = machine.ranks // here
        command = ["torchrun", "--standalone" if nodes == 1 else f"--nnodes={nodes}",
                   f"--nproc_per_node={here}", *sys.argv]
    commit, cuda = "", f", CUDA {torch.version.cuda}" if machine.device.type == "cuda" else ""
    with contextlib.suppress(OSError):  # git is not installed
        commit = subprocess.run(
            ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"],
            capture_output=True, text=True, check=False).stdout.strip()
    now = {
        "step": step, "command": shlex.join(command), "commit": commit or "unknown",
        "hardware": f"{machine.ranks} x {machine.name}, {str(machine.dtype)[6:]}",
        "software": f"Python {platform.python_version()}, PyTorch {torch.__version__}{cuda}, "
                    f"{platform.platform()}",
    }  # fmt: skip
    again = origins and {**now, "step": 0} == {**origins[-1], "step": 0}
    return origins if origins and (again or step >= max_steps) else [*origins, now]


def report_run(run, samples, data):
    """Write the report of a finished Run. samples: see sample_blocks; data: its data folders."""
    m, steps = run.metrics, max(run.first_step, run.cfg.max_steps)
    amount = f"{steps * per_step(run.settings):,} {UNITS[run.unit]}"
    lead = f"{steps:,} steps on {amount} in {duration(m['seconds'])}"
    lead += f" for {price(m['dollars'])}." if m["dollars"] else "."
    lead += f" Validation loss {m['val_loss']:.4f}." if "val_loss" in m else ""
    try:
        write_report(run.folder, f"{run.stage}: {run.folder}", lead,
                     report_sections(run, steps, amount, samples, data))
    except (OSError, UserError) as error:  # the checkpoint is saved nevertheless
        run.log.say(f"there is no report: {error}")


def report_sections(run, steps, amount, samples, data):
    """{heading: blocks} of a run's report, as write_report takes them."""
    m, rows, hourly = run.metrics, run.log.rows, run.settings["dollars_per_hour"]
    rate = f"at {price(hourly)} per device and hour" if hourly else "--dollars_per_hour"
    sections = {"Losses": [loss_curves(rows)] if rows else []}
    sections["Losses"].append(table(["loss or score", "last"], losses(m).items()))
    if samples:
        sections["Samples"] = sample_blocks(samples)
    sections["Cost"] = [table(["cost", "value"], [
        ["steps", f"{steps:,}"],
        ["tokens" if run.unit == "tok" else "pairs",
         f"{amount} ({steps:,} steps of {per_step(run.settings):,})"],
        *speeds(rows, run.unit),
        ["arithmetic", f"{m['tflop']:,.4g} TFLOP"],
        ["peak memory", f"{memory(m)}, main process"],
        ["wall time", duration(m["seconds"])],
        ["price", f"{price(m['dollars'])} ({rate})"],
    ])]
    if run.info.get("lineage"):
        own = {"stage": run.stage, "step": steps, "metrics": m}
        sections["Lineage"] = [lineage_table([*run.info["lineage"], own])]
    sections["Data"] = [*(data_table(folder) for folder in data if folder),
                        code("\n".join(run.notes))]
    sections["Provenance"] = [block for part in run.origins for block in (
        code(part["command"]),
        table(["from step", f"{part['step']:,}"],
              [[name, part[name]] for name in ("commit", "hardware", "software")]))]
    defaults = {field.name: field.default for field in dataclasses.fields(run.cfg)}
    sections["Settings"] = [table(["setting", "value", "default"], [
        [name, value, defaults.get(name, "")] for name, value in run.settings.items()
        if value != defaults.get(name)])]
    return sections


def per_step(settings):
    """Tokens, or for CLIP pairs, per step of the whole job."""
    return settings.get("batch_tokens") or settings.get("batch_pairs") or 0


def loss_curves(rows):
    """Training loss as a line, validation losses as dots."""
    lines = []
    for name in dict.fromkeys(name for row in rows for name in row):
        if name == "loss" or name.startswith("val_"):
            points = [(row["step"] + 1, row[name]) for row in rows if name in row]
            dots = name != "loss" or len(points) < 20
            style = {"marker": "o", "markersize": 3} if dots else {}
            lines.append((MEANING.get(name, name), points, style))
    return curves("loss.png", lines, "step", "loss curves")


def curves(name, lines, xlabel, alt):
    """A ReportImage of some lines, each (label, [(x, y)], style of matplotlib)."""
    from matplotlib.figure import Figure  # needs no display

    figure, file = Figure(figsize=(6.4, 4.2), layout="constrained"), io.BytesIO()
    axes = figure.add_subplot(xlabel=xlabel, ylabel="loss (nats)")
    for label, points, style in lines:
        axes.plot(*zip(*points, strict=True), label=label, **{"linewidth": 1.4, **style})
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper left", ncols=2)
    figure.savefig(file, dpi=120)
    return ReportImage(name, file.getvalue(), alt)


def losses(metrics):
    """{name: text} of the losses and scores among the metrics of a checkpoint."""
    return {MEANING.get(name, name): f"{value:.4f}" for name, value in metrics.items()
            if name not in COSTS}


def speeds(rows, unit):
    """Median speed and MFU, so that a slow first step counts little."""
    names = f"{unit}_per_s", "mfu"
    found = [row for row in rows if row.keys() >= {*names}]
    if not found:
        return []
    rate, mfu = (statistics.median(row[name] for row in found) for name in names)
    return [["median speed", f"{rate:,.0f} {unit}/s"], ["MFU", f"{mfu:.1%}"]]


def duration(seconds):
    for unit, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.0f} seconds"


def price(dollars):
    return f"${dollars:,.{2 if dollars >= 1 else 4}f}" if dollars else "no price set"


def memory(metrics):
    gpu = f"{metrics['peak_gpu_gb']:.2f} GB GPU, " if metrics["peak_gpu_gb"] else ""
    return f"{gpu}{metrics['peak_rss_gb']:.2f} GB host"


def data_table(folder):
    """A data folder's fingerprint, which is the sha256 of its list of files, and its counts."""
    names = ("manifest.json", "shards.json")  # the latter of a folder that streams from the hub
    path = next((path for name in names if (path := Path(folder) / name).is_file()), None)
    if path is None:
        return table(["data", folder], [["fingerprint", "none: it has no manifest.json"]])
    rows, content = [[f"sha256 of {path.name}", file_sum(path)]], read_json(path)
    content = content if path.name == "manifest.json" else {}
    left_out = content.pop("left_out", {})
    content["left out"] = {reason: found["rows"] for reason, found in left_out.items()}
    for name, value in content.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {count}" for key, count in value.items())
        if value and name not in ("tokenizer", "seal", "sha256"):
            rows.append([name, f"{value:,}" if isinstance(value, int) else value])
    return table(["data", folder], rows)
