"""Fault injection can be stopped like any other script."""

from collections import Counter
from types import SimpleNamespace

import pytest

from tools import storm


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_ctrl_c_during_a_try_is_no_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(storm, "fit", interrupt)
    trial = SimpleNamespace(experiment=lambda *args, **options: None)
    with pytest.raises(KeyboardInterrupt):
        storm.Storm.end_of_resume(trial, tmp_path / "trial" / "seed0")


def test_ctrl_c_shows_what_was_found_so_far(monkeypatch, capsys):
    found = SimpleNamespace(ends=Counter({("mix", storm.FAULT): 2}), faults=["mix, config.json: why"], damage=interrupt)
    monkeypatch.setattr(storm, "Storm", lambda *args: found)
    with pytest.raises(KeyboardInterrupt):
        storm.main(storm.Options(minutes=1))
    shown = capsys.readouterr()
    assert "mix, config.json: why" in shown.err and "1 rounds" in shown.out and "mix" in shown.out
