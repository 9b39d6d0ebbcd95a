"""docs/results.md: its shortest run gives what it says, and its tables are those of the curves."""

import csv
import re

import pytest
from conftest import ROOT, log_rows, run

TEXT = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
RESULTS = ROOT / "docs" / "results"


def section(title):
    return TEXT.split(f"## {title}\n")[1].split("\n## ")[0]


def table(title):
    """The rows of a section's table as lists of cells."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in section(title).splitlines() if line.startswith("|")]
    return rows[2:]


def curve(name):
    """The rows of a CSV file: {column: figure, or "" where there is none}."""
    with open(RESULTS / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_shortest_run_gives_what_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line in section("In a minute").replace("\\\n", " ").splitlines():
        if line.startswith("python "):
            _, script, *flags = line.replace("configs/", f"{ROOT}/configs/").split()
            result = run(script, *flags)
            assert result.status == 0, result.err
    found = {row["step"] + 1: row["val_loss"]
             for row in log_rows("out/tiny/pretrain") if "val_loss" in row}
    assert found == {int(step): pytest.approx(float(expected), abs=float(tolerance))
                     for step, expected, tolerance in table("In a minute")}


def test_the_page_and_its_curves_agree():
    assert {path.name for path in RESULTS.glob("*.csv")} == set(re.findall(r"\w+\.csv", TEXT))
    losses = {row["step"]: row["val_loss"] for row in curve("tiny_pretrain.csv")}
    for step, expected, _ in table("In a minute"):
        assert float(losses[str(int(step) - 1)]) == pytest.approx(float(expected), abs=6e-4)
    for stage, name, expected, _ in table("The demo"):
        *_, last = [row[name] for row in curve(f"demo_{stage}.csv") if row[name]]
        assert float(last) == pytest.approx(float(expected), abs=6e-4)
