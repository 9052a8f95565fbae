"""Ctrl-C at any moment, also during the imports: one line, no traceback. Imported before everything else."""

import sys

_show_traceback = sys.excepthook


def _excepthook(kind, error, traceback) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("error: stopped", file=sys.stderr)
    else:
        _show_traceback(kind, error, traceback)


sys.excepthook = _excepthook
