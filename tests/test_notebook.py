"""The quickstart notebook runs from first to last cell: on a tiny model here, on SmolLM2 among the slow tests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "quickstart.ipynb"
WRITTEN = ["run/metrics.jsonl", "adapter/adapter_model.safetensors", "merged/model.safetensors", "gguf/model.Q8_0.gguf"]


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: Any) -> dict[str, Any]:
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def executed(folder: Path, **parameters: Any) -> dict[str, Any]:
    """The code cells after a run in `folder`, with other values given at the end of the cell tagged "parameters"."""
    notebook = read()
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert parameters.keys() <= set(re.findall(r"^(\w+) = ", cell.source, re.MULTILINE))
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return code_cells(notebook)


def printed(cell: Any) -> str:
    """What a cell printed to standard output."""
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def assert_ran(cells: dict[str, Any], folder: Path) -> None:
    """Every cell ran, the loss was drawn, the answers were measured, and everything was written."""
    assert [cell.execution_count for cell in cells.values()] == [*range(1, len(cells) + 1)]
    assert any("image/png" in output.get("data", {}) for output in cells["plot"].outputs)
    assert "in the loss" in printed(cells["mask"])
    assert held_out_loss(cells["after"]) > 0
    assert all((folder / "out" / name).stat().st_size for name in WRITTEN)


def held_out_loss(cell: Any) -> float:
    (loss,) = re.findall(r"^loss (\S+), exactly right \S+% \+- \S+%$", printed(cell), re.MULTILINE)
    return float(loss)


def test_it_is_committed_without_outputs():
    nbformat.validate(read())
    assert all(cell.execution_count is None and not cell.outputs for cell in code_cells(read()).values())


@pytest.mark.slow
def test_on_a_tiny_model(tiny_hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # for the kernel's jax: it compiles in half the time
    cells = executed(tmp_path, train_items=8, held_out_items=2, model_path=str(tiny_hf_dir), output_dir="out")
    assert_ran(cells, tmp_path)


@pytest.mark.slow
def test_on_smollm2(smollm2_gguf: Path, tmp_path: Path):
    """A few steps already bring the held-out loss down."""
    cells = executed(tmp_path, train_items=40, held_out_items=5, model_path=str(smollm2_gguf), output_dir="out")
    assert_ran(cells, tmp_path)
    assert held_out_loss(cells["after"]) < held_out_loss(cells["before"])
