"""The published protocol gives the losses of the golden record; `python tests/golden.py` compares the last digits."""

import json

import pytest

from tests.golden import CONFIGURATIONS, RECORD, configurations, measure, measure_scripts

# First steps that are alike on every CPU, where BatchNorm over one or two pixels magnifies rounding: CPUs with AVX2 and
# with AVX-512 differ by 2e-2 in the second step of ResNet34-UNet; convolutions of small maps as products differ from
# the recorded ones by 1e-3 in the fourth of MobileNetV2 (tests/test_small_maps.py compares both in float64).
SAME = {"train_mobilenetv2_cifar100.py": 3, "train_resnet34_unet.py": 1, "train_resnet50_unet.py": 1}


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text())


def test_the_configuration_of_every_script_is_the_recorded_one():
    """But for fields younger than the record, whose defaults change nothing."""
    recorded, now = json.loads(CONFIGURATIONS.read_text()), configurations()
    assert recorded.keys() == now.keys(), "run `python tests/golden.py --add` for a new script"
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
        same = SAME.get(script, len(losses))
        assert measured[script][:same] == pytest.approx(losses[:same], rel=5e-3 if "net" in script else 1e-4), script
        assert measured[script][same:] == pytest.approx(losses[same:], rel=0.1), script
    assert measured.keys() == record["first_losses"].keys(), "run `python tests/golden.py --add` for a new script"
