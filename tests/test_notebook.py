"""The notebook of first steps runs from its first cell to its last."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "configs" / "notebooks" / "first_steps.ipynb"
SHORT = "--graph.nodes 2 --train.epochs 2 --distillation.start 1 --run.threads 1 --run.engine loop"


@pytest.mark.slow
def test_first_steps(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("IDKD_NOTEBOOK_ARGUMENTS", SHORT)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    texts = [output.text for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output]
    assert texts[-1].startswith("ring_digits")
    assert "heavy_ball" in texts[-1]
    assert (tmp_path / "runs/heavy_ball/latest/summary.json").exists()


def test_no_outputs_are_stored():
    pytest.importorskip("nbformat")
    import nbformat

    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
