"""notebooks/nanogpt_vision.ipynb runs from its first cell to its last, in the smallest settings."""

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_the_notebook_runs_and_is_committed_without_outputs(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "notebooks/nanogpt_vision.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    for name, value in ("QUICK", "1"), ("NOTEBOOK_WORK", str(tmp_path)):
        monkeypatch.setenv(name, value)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3",
                            resources={"metadata": {"path": str(ROOT)}}).execute()
    said = str([cell.get("outputs") for cell in notebook.cells])
    assert "model:" in said and "val_loss_mismatched_image" in said
