"""The tour notebook: its stored outputs are those of a complete run, and the nightly run executes it again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
TOUR = ROOT / "examples" / "tour.ipynb"


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_stored_outputs_are_of_one_complete_run() -> None:
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}, "no errors"
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}, "no warnings"
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert TOUR.stat().st_size < 300_000
    assert str(ROOT) not in TOUR.read_text()


@pytest.mark.nightly
@pytest.mark.filterwarnings("default")  # those of the notebook machinery
def test_it_runs() -> None:
    """An error in any cell, failed assertions of the notebook included, raises."""
    notebook = nbformat.read(TOUR, as_version=4)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT), "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    client = nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(TOUR.parent)}})
    client.execute(env=environment)
    text = "".join(output.get("text", "") for cell in code_cells(notebook) for output in cell.outputs)
    assert "frozen encoder" in text
    assert "0 dense" in text
