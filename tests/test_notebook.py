"""The notebook runs from its first cell to its last, and is kept without output."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from models.pretrained import pretrained_names

TOUR = Path(__file__).resolve().parents[1] / "notebooks" / "tour.ipynb"


@pytest.fixture
def tour():
    return nbformat.read(TOUR, as_version=4)


def test_output_is_cleared(tour):
    nbformat.validate(tour)
    cells = [cell for cell in tour.cells if cell.cell_type == "code"]
    assert len(cells) >= 6 and not any(cell.outputs or cell.execution_count for cell in cells)


def test_the_model_that_it_opens_is_there(tour):
    (name,) = re.findall(r'pretrained_folders\(\)\.get\("(.+?)"\)', "".join(cell.source for cell in tour.cells))
    assert name in pretrained_names()


def test_every_cell_runs(tour, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VISION_BDH_DATA", str(tmp_path))  # there is no CIFAR-10
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    (setup,) = [cell for cell in tour.cells if "EPOCHS = 10" in cell.source]
    assert 'RUNS_DIR = ROOT / "runs" / "tour"' in setup.source
    setup.source = setup.source.replace("EPOCHS = 10", "EPOCHS = 1")
    setup.source = setup.source.replace('RUNS_DIR = ROOT / "runs" / "tour"', f"RUNS_DIR = Path({str(tmp_path)!r})")
    NotebookClient(
        tour, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(TOUR.parent)}}
    ).execute()
    cells = [cell for cell in tour.cells if cell.cell_type == "code"]
    pictures = ["image/png" in output.get("data", {}) for cell in cells for output in cell.outputs]
    assert sum(pictures) == 4  # classify, attention, neurons, train
    said = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert "parameters" in said and "active at the last level" in said
    assert len(list(tmp_path.rglob("summary.json"))) >= 1
