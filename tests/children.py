"""Launches a trial in a process of its own, which a test may stop, kill or hinder."""

import contextlib
import functools
import io
import multiprocessing
import os
import signal
import sys

import torch

from training import launch

# Each child is forked from a process that has imported what takes seconds to import.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch._dynamo", "training.launch", "training.sweep", "pytest"])


def launch_in_child(trial, sabotage=None):
    """The trial as a script starts it, in a process of its own after sabotage(); its exit code and what it said."""
    ours, its = PROCESSES.Pipe()
    process = PROCESSES.Process(target=_child, args=(trial, sabotage, its))
    process.start()
    its.close()
    try:
        output = ours.recv()
    except EOFError:  # killed
        output = ""
    process.join()
    return process.exitcode, output


def _child(trial, sabotage, connection):
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    options = trial.options
    sys.argv = ["train.py", f"--data-dir={options.data_dir}", f"--runs-dir={options.runs_dir}", "--device=cpu"]
    sys.argv += [f"--{flag}" for flag in ("resume", "overwrite") if getattr(options, flag)]
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            if sabotage:
                sabotage()
            launch(trial)
    finally:
        connection.send(output.getvalue())


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def nth(n, action):
    """A function that calls action(*args) in its n-th call, from 1."""
    calls = iter(range(1, 10**9))

    def count(*args, **kwargs):
        if next(calls) == n:
            action(*args, **kwargs)

    return count


def before(owner, name, hook):
    """Calls hook with the arguments of owner.name before each call of it."""
    real = getattr(owner, name)

    @functools.wraps(real)
    def hooked(*args, **kwargs):
        hook(*args, **kwargs)
        return real(*args, **kwargs)

    setattr(owner, name, hooked)
