"""docs/results.md: its shortest run gives what it says, and its tables are those of the curves."""

import csv
import re
import shlex

import pytest
from conftest import ROOT, log_rows, run

TEXT = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
RESULTS = ROOT / "docs" / "results"


def section(title):
    return TEXT.split(f"## {title}\n")[1].split("\n## ")[0]


def commands(text):
    """The command lines of a section, each as (script, flags)."""
    blocks = "".join(re.findall(r"```\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in blocks.splitlines() if line.startswith("python ")]


def table(text):
    """The rows of a section's table as lists of cells."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in text.splitlines() if line.startswith("|")]
    return rows[2:]


def curve(name):
    """{(step, figure): value} of a CSV file."""
    with open(RESULTS / name, encoding="utf-8", newline="") as file:
        return {(int(row["step"]), figure): float(value) for row in csv.DictReader(file)
                for figure, value in row.items() if figure != "step" and value}


@pytest.mark.slow
def test_the_shortest_run_gives_what_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = section("In a minute")
    for script, *flags in commands(text):
        flags = [str(ROOT / flag) if flag.startswith("configs/") else flag for flag in flags]
        result = run(script, *flags)
        assert result.status == 0, result.err
    found = {(row["step"], "val_loss"): row["val_loss"]
             for row in log_rows("out/tiny/pretrain") if "val_loss" in row}
    for step, expected, tolerance in table(text):
        assert found.pop((int(step) - 1, "val_loss")) == pytest.approx(
            float(expected), abs=float(tolerance))
    assert not found


def test_the_page_and_its_curves_agree():
    values = curve("tiny_pretrain.csv")
    for step, expected, _ in table(section("In a minute")):
        assert values[int(step) - 1, "val_loss"] == pytest.approx(float(expected), abs=6e-4)
    for stage, name, expected, _ in table(section("The demo")):
        values = curve(f"demo_{stage}.csv")
        last = max(step for step, figure in values if figure == name)
        assert values[last, name] == pytest.approx(float(expected), abs=6e-4)


def test_every_curve_is_named_on_the_page():
    assert {path.name for path in RESULTS.glob("*.csv")} == set(re.findall(r"\w+\.csv", TEXT))
