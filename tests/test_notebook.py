"""The notebook runs from its first cell to its last, on a tiny base, and ends with a picture of its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"
SMALL = """
BASE = {base!r}
OUT = "runs/notebook"
ROUNDS, TRAIN_ROWS, TEST_ROWS = 2, 4, 4
MODEL = {{"dtype": "float32", "precision": "fp32"}}
"""
CHECKED_HERE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import checked_here
from flexperts.export import exporting
exporting.verify = checked_here.verify
"""
"""The kernel checks the exported folder; tests/export has the check in a fresh process."""


def outputs(notebook: Any, kind: str) -> list[Any]:
    return [
        its["data"][kind]
        for cell in notebook.cells
        for its in cell.get("outputs", ())
        if kind in its.get("data", ())
    ]


def test_the_notebook_runs_and_draws_its_results(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbclient = pytest.importorskip("nbclient", reason="the extra dev brings it")
    import nbformat

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    names = [line.partition("=")[0] for line in parameters.source.splitlines()]
    assert names == [line.partition("=")[0] for line in SMALL.split("\n")[1:-1]]
    parameters.source = SMALL.format(base=str(tiny_base))
    [saving] = [
        cell for cell in notebook.cells if "model.save_pretrained(" in cell.source and cell.cell_type == "code"
    ]
    saving.source = CHECKED_HERE + saving.source
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()

    [picture] = outputs(notebook, "image/png")
    assert len(picture) > 5000
    texts = outputs(notebook, "text/plain")
    assert any("Run('runs/notebook': flex on tiny, 2 rounds; clients clinic, help_desk" in text for text in texts)
    assert any("flex personalized" in text for text in texts)  # the table of scores, shown as in a terminal
    said = "".join(its.get("text", "") for cell in notebook.cells for its in cell.get("outputs", ()))
    assert "PersonalModel('help_desk', personalized" in said
    assert "Warning" not in said
    assert "Traceback" not in said


def test_the_notebook_that_is_committed_shows_its_results() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert [1 for cell in cells for its in cell.get("outputs", ()) if "image/png" in its.get("data", ())] == [1]
    assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code")
