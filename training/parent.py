"""A run started by a sweep ends with the sweep, whatever ended that: closed terminal, kill -9, a crash.

The sweep holds the write end of a pipe that is the run's standard input. When the sweep is gone, the system closes it,
on every platform; the run reads the end of the file and interrupts itself as Ctrl-C would.
"""

import os
import signal
import threading
import time

WATCH = "VISION_BDH_ENDS_WITH_STDIN"  # environment variable, set by training.schedule for the runs it starts
PATIENCE = 60  # seconds until a run that does not heed the interrupt is ended without it


def end_with_parent() -> None:
    """Watches standard input in a thread, if the process was started by a sweep."""
    if os.environ.pop(WATCH, None):  # processes started from here are not watched
        threading.Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    while os.read(0, 1):  # not sys.stdin.buffer, whose lock Python waits for at exit, and then aborts
        pass
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(PATIENCE)
    os._exit(130)


def heed_interrupts() -> None:
    """In a new process: background processes of a shell ignore SIGINT, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
