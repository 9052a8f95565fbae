"""Output that cannot stop a training: closed pipes, full disks, characters that the terminal cannot show."""

import os
import sys
from pathlib import Path
from typing import Any


def prepare_streams() -> None:
    """Makes stdout and stderr replace what they cannot encode, and makes stdout survive a closed or full target."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if not isinstance(sys.stdout, _Survivor):
        sys.stdout = _Survivor(sys.stdout)


class _Survivor:
    """A text stream that goes silent at the first failed write, as after `... | head -1`."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._silence()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._silence()

    def _silence(self) -> None:
        """Points the file descriptor at nothing, so that what is buffered can be flushed at exit."""
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        except (OSError, ValueError):
            self._stream = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
