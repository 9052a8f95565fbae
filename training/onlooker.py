"""A run's folder as all processes but the main one hold it."""

import contextlib
from typing import Any

from training.runs import Run


class Onlooker(Run):
    """Writes nothing: the main process does. What is read comes from there too, through `processes.from_main`."""

    def locked(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def _write_nothing(self, *_: Any) -> None:
        pass

    start = save_checkpoint = save_best = keep_weights = write_summary = _write_nothing
    append_metrics = restore_split = restore_metrics = note_hardware = _write_nothing
