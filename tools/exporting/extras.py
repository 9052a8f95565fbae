"""Packages that only exports need."""

import importlib
from types import ModuleType

from training.config import UserError

PIP_LINE = "pip install -r requirements-export.txt"


def need(name: str, purpose: str) -> ModuleType:
    """Imports an optional package. Raises UserError with the pip line if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = (error.name or name).partition(".")[0]
        raise UserError(f"{purpose} needs {missing}, which is not installed: {PIP_LINE}") from None
