"""How several processes end together: the first to end early says why, and all end with its exit code.

A process may wait for the others inside PyTorch, where Python cannot interrupt it. So each has a thread that looks for
an announced end in the store through which the processes found each other, and ends its process.
"""

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, NoReturn

from training.command_line import INTERRUPTED

if TYPE_CHECKING:
    from torch.distributed import Store

END, LEFT = "early end", "processes at their early end"  # keys in the store
LOOK = 0.1  # seconds between two looks for an announced end
PATIENCE = 1  # seconds for a process to end by itself: one that waits inside PyTorch cannot
ALL = 5  # seconds for all to hear of the end


class Watch:
    """Looks for the early end of another process, and announces that of this one."""

    def __init__(self, store: "Store", rank: int, n_processes: int):
        self.store = store.clone()  # a connection of its own, which nothing blocks
        self.n_processes, self.holds_store = n_processes, rank == 0  # if torchrun does not
        self.ending = threading.Event()  # the main thread has it in hand
        self.code: int | None = None  # the exit code of all, once announced
        self.is_first = False
        threading.Thread(target=self._look, daemon=True).start()

    def stop(self) -> None:
        self.ending.set()

    def announce(self, code: int) -> bool:
        """Whether this process is the first to end early."""
        self.ending.set()
        if self.code is None:
            mine = f"{code} {os.urandom(8).hex()}"
            try:
                agreed = self.store.compare_set(END, "", mine).decode()
            except RuntimeError:  # the process that holds the store is gone
                agreed = "1"
            self.code, self.is_first = int(agreed.partition(" ")[0]), agreed == mine
        return self.is_first

    def end(self, error: BaseException) -> NoReturn:
        """Ends this process after an error, with the exit code of the first to end."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        code = 1
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        elif isinstance(error, KeyboardInterrupt):
            code = INTERRUPTED
        if self.announce(code) and not isinstance(error, SystemExit | KeyboardInterrupt):  # those have said why
            self._report(error)
        self._leave()

    def _report(self, error: BaseException) -> None:
        if _has_lost_another(error):
            print(
                "error: another process of this run has ended unexpectedly. Add --resume to continue", file=sys.stderr
            )
        else:
            traceback.print_exception(error)

    def _look(self) -> None:
        while not self.ending.wait(LOOK):
            with contextlib.suppress(RuntimeError):
                if not self.store.check([END]):
                    continue
            if self.ending.is_set():
                return
            _thread.interrupt_main()  # heard unless the main thread waits inside PyTorch
            if not self.ending.wait(PATIENCE):
                self.announce(1)
                self._leave()

    def _leave(self) -> NoReturn:
        """Ends the process at once, when all know of the end: torchrun kills those that do not follow the first."""
        with contextlib.suppress(RuntimeError):
            self.store.add(LEFT, 1)
            ends = time.monotonic() + ALL
            while self.store.add(LEFT, 0) < self.n_processes and time.monotonic() < ends:
                time.sleep(LOOK / 5)
            if self.holds_store:
                time.sleep(LOOK)  # the others read it a last time
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(self.code)  # not sys.exit: PyTorch would wait for the others


def _has_lost_another(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone."""
    names = {each.__name__ for each in type(error).__mro__}
    return "DistError" in names or (isinstance(error, RuntimeError) and "gloo" in str(error))
