"""A run's folder is held by the process that trains the run."""

import contextlib
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import filelock

from training.config import UserError
from training.stored import first_line

LOCK = "lock"
LONGEST_NAME = 255  # bytes, in common file systems


class LockedFolder:
    """A folder that one process at a time may hold."""

    def __init__(self, folder: Path):
        self.folder = folder

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run for this process. Raises UserError if another process trains it.

        The lock is the operating system's, so that it ends with the process, whatever ends that. Where the file system
        has no such locks, the file itself is the lock: after a crash, the next process on the same host takes it over.
        Folders are made if needed, and removed again if nothing else came into them.
        """
        path, name = self.folder / LOCK, self.folder.parent.name
        if len(name.encode()) > LONGEST_NAME:
            raise UserError(f"{name} is too long for a folder name: give a shorter one with --name")
        try:
            missing = [each for each in self.folder.parents if not each.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(path, timeout=0)
            with warnings.catch_warnings(action="ignore"):  # that the file system has no locks of its own
                lock.acquire()
        except filelock.Timeout:
            time.sleep(0.3)  # a process that has only just taken the lock writes its name next
            raise UserError(
                f"{self.folder} is being trained by another process ({self.holder()}): wait for it, stop it, or choose "
                f"another folder with --name. If there is no such process any more, delete {path}"
            ) from None
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written ({first_line(error)}): choose another place with --runs-dir"
            ) from None
        try:
            with contextlib.suppress(OSError, ValueError):
                _sign(path)
            yield
        finally:
            with contextlib.suppress(OSError):
                if [each.name for each in self.folder.iterdir()] == [LOCK]:
                    path.unlink()
                    for each in (self.folder, *missing):
                        each.rmdir()
            lock.release()

    def holder(self) -> str:
        """Who trains the run, and since when."""
        try:
            text = (self.folder / LOCK).read_text(encoding="utf-8")
        except (OSError, ValueError):
            return "unknown"
        process, *rest = text.splitlines() or [""]
        return f"process {process} on {rest[0]}" if process.isdecimal() and rest else text or "unknown"

    def is_locked(self) -> bool:
        """Whether a process trains the run now."""
        path = self.folder / LOCK
        if not path.exists():
            return False
        try:
            with warnings.catch_warnings(action="ignore"), filelock.FileLock(path, timeout=0):
                return False
        except filelock.Timeout:
            return True
        except OSError:
            return False


def _sign(path: Path) -> None:
    """Writes into the lock which process holds it, unless filelock has: such a file is the lock itself."""
    if path.read_text(encoding="utf-8").partition("\n")[0] != str(os.getpid()):
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        path.write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}", encoding="utf-8")
