"""The published protocol gives the losses of the golden record; `python tests/golden.py` compares the last digits."""

import json

import pytest

from tests.golden import CONFIGURATIONS, RECORD, configurations, measure, measure_scripts


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text())


def test_the_configuration_of_every_script_is_the_recorded_one():
    """But for fields younger than the record, whose defaults change nothing."""
    recorded, now = json.loads(CONFIGURATIONS.read_text()), configurations()
    assert {script: {key: now[script].get(key) for key in recorded.get(script, ())} for script in now} == recorded


def test_the_losses_are_those_of_the_golden_record(record):
    measured = measure()
    assert measured.keys() == record["runs"].keys()
    for name, run in record["runs"].items():
        for column, numbers in run["numbers"].items():
            assert measured[name]["numbers"][column] == pytest.approx(numbers, rel=1e-4), (name, column)


def test_the_first_losses_of_every_script_are_those_of_the_golden_record(record):
    measured = measure_scripts()
    assert record["first_losses"].keys() <= measured.keys(), "a script is missing"
    for script, losses in record["first_losses"].items():
        # BatchNorm over few pixels magnifies rounding
        assert measured[script] == pytest.approx(losses, rel=5e-3 if "net" in script else 1e-4), script
    assert measured.keys() == record["first_losses"].keys(), "run `python tests/golden.py --add` for a new script"
