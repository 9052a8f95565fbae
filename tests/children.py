"""Launches a trial in processes of its own, which a test may stop, kill or hinder."""

import contextlib
import functools
import io
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
from pathlib import Path

import torch

from training import launch

# Each child is forked from a process that has imported what takes seconds to import.
PROCESSES = multiprocessing.get_context("forkserver")
PRELOADED = ["torch._dynamo", "training.launch", "training.sweep", "pytest", "albumentations", "tests.conftest"]
PROCESSES.set_forkserver_preload(PRELOADED)


def launch_in_child(trial, sabotage=None, *flags):
    """The trial as a script starts it, in a process of its own after sabotage(); its exit code and what it said.

    flags: further ones of the command line, which else leaves all options but places at their defaults.
    """
    ours, its = PROCESSES.Pipe()
    process = PROCESSES.Process(target=_child, args=(trial, sabotage, flags, its))
    process.start()
    its.close()
    try:
        output = ours.recv()
    except EOFError:  # killed
        output = ""
    process.join()
    return process.exitcode, output


def _child(trial, sabotage, flags, connection):
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    options = trial.options
    sys.argv = ["train.py", f"--data-dir={options.data_dir}", f"--runs-dir={options.runs_dir}", "--device=cpu"]
    sys.argv += [f"--{flag}" for flag in ("resume", "overwrite") if getattr(options, flag)]
    sys.argv += flags
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            if sabotage:
                sabotage()
            launch(trial)
    finally:
        connection.send(output.getvalue())


def run_together(n, work, *args):
    """Calls work(*args) in n processes, as torchrun starts them: exit code, output and result of each.

    After an error there is no result.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as place:
        free.bind(("localhost", 0))
        where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        free.close()
        folders = [Path(place) / str(rank) for rank in range(n)]
        members = []
        for rank, folder in enumerate(folders):
            folder.mkdir()
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
            environment = where | {name: str(value) for name, value in ranks.items()}
            members.append(PROCESSES.Process(target=_member, args=(environment, folder, work, args)))
            members[-1].start()
        for member in members:
            member.join()
        results = [folder / "result" for folder in folders]
        return [
            (
                member.exitcode,
                (folder / "output").read_text(),
                pickle.loads(path.read_bytes()) if path.exists() else None,
            )
            for member, folder, path in zip(members, folders, results, strict=True)
        ]


def _member(environment, folder, work, args):
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    with (folder / "output").open("w") as output:  # a file: such a process may end without Python's last words
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    result = work(*args)
    (folder / "result").write_bytes(pickle.dumps(result))


def kill(*args):
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
