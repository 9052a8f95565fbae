"""What every script beside train_*.py does with its command line."""

import sys
from collections.abc import Callable

import tyro

from training.config import UserError


def run_script(main: Callable, description: str) -> None:
    """Calls main with arguments from the command line, the fields of a config being flags of their own name.

    Leaves the process with exit code 1 and one message where main raises UserError or a file cannot be read or written,
    2 where a flag is wrong.
    """
    try:
        tyro.cli(main, description=description, config=(tyro.conf.OmitArgPrefixes,))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
