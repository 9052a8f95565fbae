"""The published protocol gives the losses of the golden record; `python tests/golden.py` compares the last digits."""

import json

import pytest
from golden import RECORD, measure


def test_the_losses_are_those_of_the_golden_record():
    measured, record = measure(), json.loads(RECORD.read_text())
    assert measured.keys() == record.keys()
    for name, run in record.items():
        for column, numbers in run["numbers"].items():
            assert measured[name]["numbers"][column] == pytest.approx(numbers, rel=1e-4), (name, column)
