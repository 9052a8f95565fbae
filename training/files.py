"""Files and folders that are whole or not there."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from training.config import UserError


def unwritable(folder: Path) -> str:
    """Why files cannot be made in this folder, which need not exist yet; empty if they can."""
    place = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not place.is_dir():
        return f"{place} is a file"
    return "" if os.access(place, os.W_OK | os.X_OK) else f"no permission to write to {place}"


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[None]:
    """Inside, the new folder is filled; it is removed again after an error or Ctrl-C."""
    try:
        yield
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Inside, a temporary path beside it with the same suffix, to write to; at the end it takes the path's place.

    After an error, such as a full disk, whatever was at the path before is still there. Of two processes that write the
    file at once, the last one's stays. Makes the folder. Raises UserError if the file system refuses.
    """
    partial = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path} cannot be written ({reason}): free space there, or name another folder") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
