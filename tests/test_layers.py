"""Packages build on each other in one order; nothing imports upward (docs/extending.md)."""

import ast
from pathlib import Path

import pytest

from training.config import ROOT

ORDER = ["models", "training", "analysis", "interpretability", "tools", "benchmarks"]
UPWARD = {
    ("models/pretrained.py", "training"),  # these two open stored runs
    ("models/timm_models.py", "training"),
    ("interpretability/common/live.py", "tools"),  # the browser's page runs the model as ONNX
}


def imported(file: Path) -> set[str]:
    """First parts of all that the file imports, wherever the import stands."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", ORDER)
def test_imports_lead_down(package):
    above = {*ORDER[ORDER.index(package) + 1 :], "plans", "reproduce", "tests"}
    files = sorted((ROOT / package).rglob("*.py"))
    found = {
        (file.relative_to(ROOT).as_posix(), name)
        for file in files
        for name in imported(file)
        if name in above or name.startswith("train_")
    }
    assert files and found == {(file, name) for file, name in UPWARD if file.startswith(f"{package}/")}
