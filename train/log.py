"""What a run leaves to read: printed lines, log.jsonl, and its report card (common/report.py)."""

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

from common.checkpoint import file_sum
from common.config import UserError, read_json
from common.report import Code, Notes, Page, Picture, Samples, Table

GREY = "#808080"  # of a plot's letters and axes: it can be read on white and on black
UNITS = {"tok": "tokens", "img": "pairs of picture and caption"}
COSTS = ("seconds", "dollars", "tflop", "peak_gpu_gb", "peak_rss_gb")  # metrics that score nothing
MEANING = {"loss": "training loss", "val_loss": "held-out loss",
           "val_other_picture": "held-out loss, with another chat's picture",
           "val_no_picture": "held-out loss, without a picture",
           "val_text_loss": "held-out loss on chats about text",
           "choice32": "right caption chosen of 32", "zero_shot": "right class by its name alone"}


class Log:
    """The figures of one run. Only the main process prints and writes."""

    def __init__(self, folder, enabled=True, tracker="none", settings=None):
        self.folder, self.enabled = Path(folder), enabled
        self.rows, self.behind = [], False  # behind: whether some are not on the disk
        self.tracker = open_tracker(tracker, folder, settings) if enabled else None

    def resume(self, step):
        """Keep what was logged before `step`; the rest will be logged again."""
        if not self.enabled:
            return
        self.rows = [row for row in read_rows(self.folder) if row["step"] <= step]
        try:
            self._write_anew()
        except OSError as error:
            raise UserError(f"--out={self.folder} cannot be written into: {error.strerror}; choose "
                            "another, or put that right") from None

    def _write_anew(self):
        """Write all rows; what is there stays until that is done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = self.folder / ".log.jsonl"
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(self.folder / "log.jsonl")

    def say(self, text):
        """Print one line, from the main process only; nothing of an empty one."""
        if self.enabled and text:
            print(text, flush=True)

    def add(self, step, figures):
        """Append one row to log.jsonl, of those figures that are numbers."""
        if not self.enabled:
            return
        figures = {name: value for name, value in figures.items() if math.isfinite(value)}
        row = {"step": step, **{name: round(value, 6) for name, value in figures.items()}}
        self.rows.append(row)
        try:
            if self.behind or not (self.folder / "log.jsonl").is_file():
                self._write_anew()
            else:
                with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            self.behind = False
        except OSError as error:  # the rows are kept here: training is worth going on
            if not self.behind:
                self.say(f"cannot write {self.folder / 'log.jsonl'}: {error.strerror}; going on, "
                         "the next row tries again")
            self.behind = True
        if self.tracker:
            self.tracker.log(figures, step=step)


def read_rows(folder):
    """The rows of a run's log.jsonl; none where there is none."""
    path, rows = Path(folder) / "log.jsonl", []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:  # the last line of a killed run may be cut short
                break
    return rows


def commit():
    """The commit of this code, or "unknown" outside a checkout."""
    here = Path(__file__).parent
    command = ["git", "-C", here, "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # no git here
        return "unknown"
    return result.stdout.strip() or "unknown"


def open_tracker(name, folder, settings):
    """trackio or wandb, which share their interface; None when off."""
    if name == "none":
        return None
    try:
        module = __import__(name)
    except ImportError:
        raise UserError(f"--tracker={name} needs a package: pip install {name}") from None
    return module.init(project="nanogpt-vision", name=str(folder), config=settings)


# ------------------------------------------------------------------------------------ report card


def origin(machine, step):
    """Command, commit, hardware and software of this process, which begins with `step`."""
    words = [os.path.basename(sys.executable), *sys.argv]
    if machine.ranks > 1:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", machine.ranks))
        nodes = machine.ranks // here
        words = ["torchrun", "--standalone" if nodes == 1 else f"--nnodes={nodes}",
                 f"--nproc_per_node={here}", *sys.argv]
    cuda = f", CUDA {torch.version.cuda}" if machine.device.type == "cuda" else ""
    return {
        "step": step, "command": shlex.join(words), "commit": commit(),
        "hardware": f"{machine.ranks} x {machine.name}, {str(machine.dtype)[6:]}",
        "software": f"Python {platform.python_version()}, PyTorch {torch.__version__}{cuda}, "
                    f"{platform.platform()}",
    }  # fmt: skip


def with_origin(origins, machine, step, max_steps):
    """The starts of a run: those before, and this one, unless it is the same command once more on
    the same machine, or comes when all is done."""
    now = origin(machine, step)
    again = origins and {**now, "step": 0} == {**origins[-1], "step": 0}
    return origins if origins and (again or step >= max_steps) else [*origins, now]


def write_report(run, samples, data):
    """The report card of a Run; see stage_page."""
    try:
        stage_page(run, samples, data).write(run.folder)
    except (OSError, UserError) as error:  # the training is done and saved nevertheless
        run.log.say(f"there is no report: {error}")


def stage_page(run, samples, data):
    """The report card (Page) of a Run that has done all its steps.

    samples: of report.Sample; data: the folders that it read.
    """
    m, rows, steps = run.metrics, run.log.rows, max(run.first_step, run.cfg.max_steps)
    each, hourly = per_step(run.settings), run.settings["dollars_per_hour"]
    rate = f"a device costs ${money(hourly)} an hour" if hourly else "--dollars_per_hour"
    amount = f"{steps * each:,} {UNITS[run.unit]}"
    lead = f"{steps:,} steps on {amount} in {duration(m['seconds'])}"
    lead += f" for {price(m['dollars'])}." if m["dollars"] else "."
    lead += f" Held-out loss {m['val_loss']:.4f}." if "val_loss" in m else ""
    sections = {"Losses": [loss_curves(rows), losses(rows)]} if rows else {}
    if samples:
        sections["Samples"] = [Samples(samples)]
    sections["Cost"] = [Table(["what", "figure"], [
        ["steps", f"{steps:,}"],
        ["tokens" if run.unit == "tok" else "pairs",
         f"{amount} ({steps:,} steps of {each:,})"],
        *speeds(rows, run.unit),
        ["arithmetic", f"{m['tflop']:,.4g} TFLOP"],
        ["peak memory", f"{memory(m)}, of the first process"],
        ["wall time", duration(m["seconds"])],
        ["price", f"{price(m['dollars'])} ({rate})"],
    ])]
    if run.info.get("lineage"):
        own = {"stage": run.stage, "step": steps, "metrics": m}
        sections["Lineage"] = [lineage_table([*run.info["lineage"], own])]
    sections["Data"] = [data_table(folder) for folder in data if folder]
    sections["Data"] += [Notes(run.notes)] if run.notes else []
    sections["How it was made"] = [block for part in run.origins for block in made_by(part)]
    sections["Settings"] = [settings_table(run.settings, type(run.cfg))]
    return Page(f"{run.stage}: {run.folder}", lead, sections)


def per_step(settings):
    """Tokens, or for CLIP pairs, of a step in the whole job."""
    return settings.get("batch_tokens") or settings.get("batch_pairs") or 0


def loss_curves(rows):
    """Training loss as a line, every held-out loss as dots."""
    lines = []
    for name in dict.fromkeys(name for row in rows for name in row):
        points = [(row["step"] + 1, row[name]) for row in rows if name in row]
        if name == "loss" or name.startswith("val_"):
            few = name != "loss" or len(points) < 20
            look = {"marker": "o", "markersize": 3} if few else {}
            lines.append((MEANING.get(name, name), points, look))
    return curves("loss.png", lines, "step", "loss curves")


def curves(name, lines, xlabel, alt):
    """A Picture of lines: (label, [(x, y)], what matplotlib should know) each."""
    import matplotlib
    from matplotlib.figure import Figure  # the object interface never needs a screen
    from matplotlib.ticker import EngFormatter

    colours = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    look = dict.fromkeys(colours, GREY) | {"font.size": 11, "legend.frameon": False}
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.add_subplot(xlabel=xlabel, ylabel="loss (nats)")
        for label, points, how in lines:
            axes.plot(*zip(*points, strict=True), label=label, **{"linewidth": 1.4, **how})
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        figure.legend(loc="outside upper left", ncols=2, fontsize=10)
        file = io.BytesIO()
        figure.savefig(file, dpi=120, transparent=True)
    return Picture(name, file.getvalue(), alt)


def losses(rows):
    """Where each loss and score began and ended."""
    names = dict.fromkeys(name for row in rows for name in row if name in MEANING)
    found = {name: [(row["step"] + 1, row[name]) for row in rows if name in row] for name in names}
    return Table(["loss or score", "first", "at step", "last"],
                 [[MEANING[name], f"{points[0][1]:.4f}", f"{points[0][0]:,}",
                   f"{points[-1][1]:.4f}"] for name, points in found.items()])


def speeds(rows, unit):
    """Speed and MFU, the median of what was logged: a first step that compiles counts little."""
    found = [row for row in rows if f"{unit}_per_s" in row]
    if not found:
        return []
    rate, mfu = (statistics.median(row[name] for row in found) for name in (f"{unit}_per_s", "mfu"))
    return [["median speed", f"{rate:,.0f} {unit}/s"], ["MFU", f"{mfu:.1%}"]]


def duration(seconds):
    """In the unit that one would say it in."""
    for unit, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.0f} seconds"


def price(dollars):
    return f"${money(dollars)}" if dollars else "no price set"


def money(dollars):
    return f"{dollars:,.{2 if dollars >= 1 or not dollars else 4}f}"


def memory(metrics):
    gpu = f"{metrics['peak_gpu_gb']:.2f} GB GPU, " if metrics["peak_gpu_gb"] else ""
    return f"{gpu}{metrics['peak_rss_gb']:.2f} GB host"


def lineage_table(stages):
    """What each stage took, and all together; one that was made elsewhere has no figures."""
    rows, costs = [], {"tflop": ("TFLOP", 1), "seconds": ("min", 60), "dollars": ("$", 1)}
    for stage in stages:
        m = stage["metrics"]
        loss = f"{m['val_loss']:.4f}" if "val_loss" in m else "–"
        rows.append([stage["stage"], f"{stage['step']:,}", loss,
                     *(cost_cell(name, m[name] / unit) if name in m else "–"
                       for name, (_, unit) in costs.items())])
    totals = {name: sum(stage["metrics"].get(name, 0) for stage in stages) for name in costs}
    rows.append(["all", "–", "–", *(cost_cell(name, totals[name] / unit)
                                    for name, (_, unit) in costs.items())])
    return Table(["stage", "steps", "held-out loss", *(head for head, _ in costs.values())], rows,
                 total=True)


def cost_cell(name, value):
    return money(value) if name == "dollars" else f"{value:,.1f}"


def data_table(folder):
    """A data folder's fingerprint, the sha256 of the file that lists the sha256 of all others, and
    its counts."""
    known = [Path(folder) / name for name in ("manifest.json", "shards.json")]  # the hub's lists
    path = next((path for path in known if path.is_file()), None)
    if path is None:
        return Table(["data", folder], [["fingerprint", "none: it has no manifest.json"]])
    rows, content = [[f"sha256 of {path.name}", file_sum(path)]], read_json(path)
    if path.name == "shards.json":
        content = content["files"] if isinstance(content, dict) else content
        content = {"bytes": sum(entry["size"] for entry in content), "sha256": content}
    for name, value in content.items():
        if name == "sha256":
            rows.append(["files", f"{len(value):,}"])
        elif name == "left_out":
            reasons = [f"{found['rows']} {reason}" for reason, found in value.items()]
            rows += [["left out", ", ".join(reasons)]] if reasons else []
        elif isinstance(value, dict):
            rows.append([name, ", ".join(f"{key} {some}" for key, some in value.items())])
        elif name not in ("tokenizer", "seal"):
            rows.append([name, f"{value:,}" if isinstance(value, int) else value])
    return Table(["data", folder], rows)


def made_by(part):
    """The blocks about one start of a run."""
    first = [["from step", f"{part['step']:,}"]] if part["step"] else []
    facts = [[name, part[name]] for name in ("commit", "hardware", "software")]
    return [Code(laid_out(part["command"])), Table(["what", "which"], first + facts)]


def laid_out(command):
    """A long command with a flag a line, as a shell takes it."""
    if len(command) <= 72:
        return command
    lines = [[]]
    for word in shlex.split(command):
        lines += [[]] if word.startswith("--") and lines[-1] else []
        lines[-1].append(word)
    return " \\\n  ".join(map(shlex.join, lines))


def settings_table(settings, config_class):
    """All settings, those first that are not what they are if one says nothing."""
    defaults = {setting.name: setting.default for setting in dataclasses.fields(config_class)}
    changed, usual = [], []
    for name, value in settings.items():
        row, default = [name, str(value) or "(empty)"], defaults.get(name, "")
        if value == default:
            usual.append([*row, ""])
        else:
            changed.append([*row, str(default) or "(empty)"])
    return Table(["setting", "value", "default, where it is another"], changed + usual)
