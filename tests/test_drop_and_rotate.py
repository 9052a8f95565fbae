"""kernels.drop_ and kernels.rotate: dropout's statistics, and turned pairs against `rope`."""

import math

import pytest
import torch

from models import kernels
from models.rotary import rope

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------------- drop_


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.25, 0.003])
def test_rate_of_dropped_entries(dtype, p):
    # Many columns and few rows: the drawn threshold, which a column shares, then adds little to the binomial deviation.
    # So many entries that rounding p to a multiple of 1 / 256 would show: 26 / 256 is 0.0016 from 0.1, 5 sigma 0.0012.
    torch.manual_seed(0)
    v = torch.ones(37, 40009, dtype=dtype)
    factor = kernels.drop_(v, p)
    assert factor == pytest.approx(1 / (1 - p), rel=1e-12)
    assert abs((v == 0).double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / v.numel())
    assert ((v == 0) | (v == 1)).all()


@pytest.mark.parametrize("p", [0.1, 0.25, 0.7])
def test_rate_is_the_same_in_every_column(p):
    # over many calls, so that the thresholds, drawn anew for each call and column, average out as well
    torch.manual_seed(0)
    calls, rows, columns = 400, 25, 24
    dropped = torch.zeros(columns)
    for _ in range(calls):
        v = torch.ones(rows, columns)
        kernels.drop_(v, p)
        dropped += (v == 0).sum(0)
    n = calls * rows
    assert ((dropped / n - p).abs() < 5 * math.sqrt(p * (1 - p) / n)).all()


def test_dropped_entries_are_independent():
    torch.manual_seed(0)
    p = 0.25
    calls = []
    for _ in range(2):
        v = torch.ones(600, 800)
        kernels.drop_(v, p)
        calls.append((v == 0).double() - p)
    first, second = calls
    pairs = [(first, second), (first[1:], first[:-1])]
    pairs += [(first[:, lag:], first[:, :-lag]) for lag in (1, 2, 4, 8, 64)]
    for a, b in pairs:  # p is a multiple of 1 / 256 here, so that columns share no random threshold
        assert abs((a * b).mean().item()) < 5 * p * (1 - p) / math.sqrt(a.numel())


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 11), (8, 2), (1, 1, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_entry_of_any_size_is_sometimes_dropped_and_sometimes_kept(shape, dtype):
    ever_dropped, ever_kept = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for _ in range(150):
        v = torch.ones(shape, dtype=dtype)
        assert kernels.drop_(v, 0.5) == 2.0
        ever_dropped |= v == 0
        ever_kept |= v == 1
    assert ever_dropped.all()
    assert ever_kept.all()


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float64, torch.int64)]
)
def test_kept_entries_are_unchanged_bit_for_bit(dtype, bits):
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, torch.finfo(dtype).tiny / 4, torch.finfo(dtype).max])
    v = torch.cat((torch.randn(999), special.repeat(40))).to(dtype)
    before = v.clone().view(bits)
    kernels.drop_(v, 0.3)
    after = v.view(bits)
    assert ((after == before) | (after == 0)).all()
    assert (after == before).any()
    assert (after == 0).any()


def test_dropping_nothing():
    v = torch.randn(5, 7)
    before = v.clone()
    assert kernels.drop_(v, 0.0) == 1.0
    assert torch.equal(v, before)


def test_two_drops_differ_and_a_seed_repeats_one():
    first, second, third = torch.ones(3, 10, 50)
    torch.manual_seed(4)
    kernels.drop_(first, 0.3)
    kernels.drop_(second, 0.3)
    torch.manual_seed(4)
    kernels.drop_(third, 0.3)
    assert not torch.equal(first, second)
    assert torch.equal(first, third)


# ---------------------------------------------------------------------------- rotate


def turning(tokens, neurons, dtype):
    """Random angles (T, N), equal within a pair, and their phases (T, N / 2)."""
    angles = (torch.rand(tokens, neurons // 2, dtype=dtype) * 2 * math.pi).repeat_interleave(2, dim=-1)
    return angles, torch.polar(torch.ones_like(angles[:, 0::2]), angles[:, 0::2])


# v's precision, the phases' precision, and what equality means: rope in the same precision rounds once at the end, so a
# bfloat16 result may land on the neighbouring value, 2^-7 away at most
PRECISIONS = [
    (torch.float64, torch.float64, 1e-14),
    (torch.float32, torch.float32, 2e-6),
    (torch.bfloat16, torch.float32, 2**-7),
]


@pytest.mark.parametrize("out", ["none", "other", "itself"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (4, 1, 2), (7, 10)])
@pytest.mark.parametrize(("dtype", "phase_dtype", "tolerance"), PRECISIONS)
def test_rotate_equals_rope(dtype, phase_dtype, tolerance, shape, out):
    v = torch.randn(shape, dtype=torch.float64).to(dtype)
    angles, phases = turning(shape[-2], shape[-1], phase_dtype)
    expected, before = rope(v, angles.cos(), angles.sin()), v.clone()
    target = {"none": None, "other": torch.full_like(v, math.nan), "itself": v}[out]
    turned = kernels.rotate(v, phases, out=target)
    assert turned.dtype == dtype
    assert torch.allclose(turned, expected, rtol=tolerance, atol=1e-6 if dtype != torch.float64 else 1e-14)
    if target is not None:
        assert turned.data_ptr() == target.data_ptr()
    if out != "itself":
        assert torch.equal(v, before)


@pytest.mark.parametrize(("dtype", "phase_dtype", "tolerance"), PRECISIONS)
def test_conjugate_phases_rotate_back(dtype, phase_dtype, tolerance):
    v = torch.randn(2, 3, 5, 8, dtype=torch.float64).to(dtype)
    _, phases = turning(5, 8, phase_dtype)
    turned = kernels.rotate(v, phases)
    assert not torch.allclose(turned, v, rtol=0.1)
    back = kernels.rotate(turned, phases.conj())
    # errors are relative to the pair's norm, and an entry may be the small one of its pair
    assert torch.allclose(back, v, rtol=0, atol=tolerance * v.abs().max().item())
    assert torch.equal(kernels.rotate(turned.clone(), phases.conj(), out=turned), back)


def test_rotate_turns_by_the_angle_of_the_phase():
    angle = torch.tensor([[0.3]], dtype=torch.float64)
    phases = torch.polar(torch.ones_like(angle), angle)
    turned = kernels.rotate(torch.tensor([[2.0, 0.0]], dtype=torch.float64), phases)
    expected = torch.tensor([[2 * math.cos(0.3), 2 * math.sin(0.3)]], dtype=torch.float64)
    assert torch.allclose(turned, expected, rtol=1e-15)
