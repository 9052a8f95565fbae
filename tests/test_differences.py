"""What the documents say of two or more rows, against differences worked out here."""

import numpy as np
import pytest

from analysis.claims import claims_markdown
from analysis.differences import DIFFERENCES, HOLDS, OPEN, OPPOSITE, measure_differences
from analysis.published import NOT_RUN, TOO_FEW, claims_of, read_published, read_results
from tests.claimed_runs import T_975, write_seeds

STATED = [5.68, 1.30, 1.28, 0.02, 4.46, 4.91, 4.91 - 5.68, 6.72, 72.68 - 72.51]  # in the documents' own words
V2_AS_RUN = "--residual post --warmup-steps 1000"


def measured(results, says, setting="as documented"):
    claims = claims_of(read_results(results), read_published())
    (found,) = [
        each for each in measure_differences(claims) if each.difference.says == says and each.setting in (setting, "")
    ]
    return found


def test_published_differences_are_those_that_the_documents_state(tmp_path):
    found = list(measure_differences(claims_of([], read_published())))
    assert {each.difference for each in found} == set(DIFFERENCES) and {each.verdict for each in found} == {NOT_RUN}
    by_statement = {each.difference: each.published for each in found}
    assert [by_statement[each] for each in DIFFERENCES] == pytest.approx(STATED)
    both = [each.setting for each in found if each.difference.says == "v2 is better than v1"]
    assert both == ["as documented", "as the code ran"]
    assert [each.setting for each in found if "ten epochs" in each.difference.says] == [""]


@pytest.mark.parametrize(
    ("v2", "verdict"),
    [([0.82, 0.83, 0.81], HOLDS), ([0.77, 0.79, 0.74], OPEN), ([0.72, 0.73, 0.71], OPPOSITE), ([0.82, 0.83], TOO_FEW)],
)
def test_seeds_are_paired_and_the_interval_decides(tmp_path, v2, verdict):
    vit = [0.76, 0.765, 0.75, 0.99]  # the last one has no partner
    write_seeds(tmp_path, v2, "train_v2_cifar10.py")
    write_seeds(tmp_path, [0.9] * 3, "train_v2_cifar10.py", V2_AS_RUN)
    write_seeds(tmp_path, vit, "train_vit_tiny_cifar10.py")
    found = measured(tmp_path, "v2 is better than ViT-Tiny")
    expected = np.array(v2) - vit[: len(v2)]
    assert found.values.tolist() == pytest.approx(expected) and found.verdict == verdict
    half = T_975[len(v2)] * expected.std(ddof=1) / np.sqrt(len(v2))
    assert found.interval == pytest.approx((expected.mean(), expected.mean() - half, expected.mean() + half))
    as_run = measured(tmp_path, "v2 is better than ViT-Tiny", "as the code ran")
    assert as_run.values.tolist() == pytest.approx(0.9 - np.array(vit[:3])) and as_run.verdict == HOLDS


def test_runs_of_different_precision_are_not_paired(tmp_path):
    """Each row has most seeds in another precision; only bf16 has three seeds of both."""
    write_seeds(tmp_path, [0.90, 0.91, 0.92], "train_v2_cifar10.py", "--precision bf16")
    write_seeds(tmp_path, [0.60, 0.61, 0.62, 0.63, 0.64], "train_v2_cifar10.py", "--precision float32")
    write_seeds(tmp_path, [0.80] * 4, "train_v1_cifar10.py", "--precision bf16")
    write_seeds(tmp_path, [0.50] * 2, "train_v1_cifar10.py", "--precision float32")
    found = measured(tmp_path, "v2 is better than v1")
    assert found.values.tolist() == pytest.approx([0.10, 0.11, 0.12]) and found.precision == "bf16"
    assert "| +11.00 (bf16) |" in claims_markdown(read_results(tmp_path), tmp_path)[1]
    write_seeds(tmp_path, [0.7], "train_vit_tiny_cifar10.py", "--precision tf32")
    assert measured(tmp_path, "v2 is better than ViT-Tiny").verdict == NOT_RUN  # no precision has both


def test_four_rows_and_the_table(tmp_path):
    tests = {"v2_cifar10": [0.82, 0.83, 0.82], "vit_tiny_cifar10": [0.76, 0.76, 0.75]}
    tests |= {"v2_cifar100": [0.51, 0.52, 0.51], "vit_tiny_cifar100": [0.48, 0.47, 0.48]}
    for name, accuracies in tests.items():
        write_seeds(tmp_path, accuracies, f"train_{name}.py")
    says = "its lead over ViT-Tiny grows from CIFAR-10 to CIFAR-100"
    expected = np.array([0.03 - 0.06, 0.05 - 0.07, 0.03 - 0.07])
    assert measured(tmp_path, says).values.tolist() == pytest.approx(expected)
    _, text = claims_markdown(read_results(tmp_path), tmp_path)
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {says} (as documented)")]
    half = 100 * T_975[3] * expected.std(ddof=1) / np.sqrt(3)
    low, high = -3 - half, -3 + half
    assert line.endswith(f"| -0.77 | -3.00 (tf32) | {low:+.2f} to {high:+.2f} | 3 | {OPPOSITE} |")
