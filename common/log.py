"""What a run leaves to read: printed lines, log.jsonl, loss.png and report.md."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from common.config import UserError
from common.distributed import peak_memory_gb


class Log:
    """The figures of one run. Only the main process prints and writes."""

    def __init__(self, folder, enabled=True, tracker="none", settings=None):
        self.folder, self.enabled = Path(folder), enabled
        self.rows, self.started = [], time.time()
        self.tracker = open_tracker(tracker, folder, settings) if enabled else None

    def resume(self, step):
        """Keep what was logged before `step`; the rest will be logged again."""
        if not self.enabled:
            return
        path = self.folder / "log.jsonl"
        rows = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    rows.append(json.loads(line))
                except ValueError:  # the last line of a killed run may be cut short
                    break
        self.rows = [row for row in rows if row["step"] <= step]
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")

    def say(self, text):
        """Print one line, from the main process only; nothing of an empty one."""
        if self.enabled and text:
            print(text, flush=True)

    def add(self, step, figures):
        """Append one row to log.jsonl."""
        if not self.enabled:
            return
        row = {"step": step, **{name: round(value, 6) for name, value in figures.items()}}
        self.rows.append(row)
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.tracker:
            self.tracker.log(figures, step=step)

    def plot(self):
        """Draw loss.png from the rows: training loss as a line, validation as dots."""
        if not self.enabled:
            return
        from matplotlib.figure import Figure  # the object interface never needs a screen

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        for name, style in (("loss", "-"), ("val_loss", "o-")):
            points = [(row["step"], row[name]) for row in self.rows if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=name, linewidth=1, markersize=3)
        axes.set(xlabel="step", ylabel="loss (nats)", title=self.folder.name)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(self.folder / "loss.png", dpi=110)

    def report(self, stage, machine, settings, figures, samples, notes=()):
        """Write report.md: command, commit, machine, figures, curve, notes, samples."""
        if not self.enabled:
            return
        gpu_gb, host_gb = peak_memory_gb(machine.device)
        facts = {
            "command": " ".join([os.path.basename(sys.executable), *sys.argv]),
            "commit": commit(),
            "machine": f"{machine.ranks} x {machine.name}, {str(machine.dtype)[6:]}",
            "software": f"Python {platform.python_version()}, PyTorch {torch.__version__}",
            "peak memory": f"{gpu_gb:.2f} GB GPU, {host_gb:.2f} GB host, per process",
            **figures,
        }
        lines = [f"# {stage}: {self.folder}", "", "| what | figure |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in facts.items()]
        lines += ["", "![loss](loss.png)", ""]
        if notes:
            lines += ["## Data", "", *(f"- {note}" for note in notes), ""]
        if samples:
            lines += ["## Samples", ""]
            for sample in samples:
                lines += ["```", sample.replace("```", "'''"), "```", ""]
        lines += ["## Settings", "", "| setting | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in settings.items()]
        (self.folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


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
