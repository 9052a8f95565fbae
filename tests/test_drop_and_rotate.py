"""kernels.drop_ and kernels.rotate: dropout's statistics, and rotated pairs against `rope`."""

import math

import pytest
import torch

from models import kernels
from models.rotary import rope

DTYPES = [torch.float32, torch.bfloat16, torch.float64]

# ---------------------------------------------------------------------------- drop_


@pytest.mark.parametrize("dtype", DTYPES)
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
    # over many calls, so that the thresholds, drawn for each call and column, average out as well
    torch.manual_seed(0)
    calls, rows, columns = 400, 25, 24
    dropped = torch.zeros(columns)
    for _ in range(calls):
        v = torch.ones(rows, columns)
        kernels.drop_(v, p)
        dropped += (v == 0).sum(0)
    n = calls * rows
    assert ((dropped / n - p).abs() < 5 * math.sqrt(p * (1 - p) / n)).all()


def test_dropped_entries_are_independent_and_follow_the_seed():
    p, calls = 0.25, []
    for seed in (0, None, 0):
        if seed is not None:
            torch.manual_seed(seed)
        v = torch.ones(600, 800)
        kernels.drop_(v, p)
        calls.append((v == 0).double() - p)
    first, second, repeated = calls
    assert torch.equal(first, repeated)
    pairs = [(first, second), (first[1:], first[:-1])]
    pairs += [(first[:, lag:], first[:, :-lag]) for lag in (1, 2, 4, 8, 64)]
    for a, b in pairs:  # p is a multiple of 1 / 256 here, so that columns share no random threshold
        assert abs((a * b).mean().item()) < 5 * p * (1 - p) / math.sqrt(a.numel())


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 11), (8, 2), (1, 1, 9)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_entry_of_any_size_is_sometimes_dropped_and_sometimes_kept(shape, dtype):
    calls = []
    for _ in range(150):
        calls.append(torch.ones(shape, dtype=dtype))
        assert kernels.drop_(calls[-1], 0.5) == 2.0
    calls = torch.stack(calls)
    assert (calls == 0).any(0).all() and (calls == 1).any(0).all()


@pytest.mark.parametrize("p", [0.3, 0.0])
@pytest.mark.parametrize(("dtype", "bits"), [*zip(DTYPES, (torch.int32, torch.int16, torch.int64), strict=True)])
def test_kept_entries_are_unchanged_bit_for_bit(dtype, bits, p):
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, torch.finfo(dtype).tiny / 4, torch.finfo(dtype).max])
    v = torch.cat((torch.randn(999), special.repeat(40))).to(dtype)
    before = v.clone().view(bits)
    assert kernels.drop_(v, p) == 1 / (1 - p)
    after = v.view(bits)
    assert ((after == before) | (after == 0)).all()
    assert (after == before).any() and (after == before).all() == (p == 0)


# ---------------------------------------------------------------------------- rotate

# v's precision, the phases' precision, and what equality means: rope in the same precision rounds once at the end, so a
# bfloat16 result may be the neighbouring value, 2^-7 away at most
PRECISIONS = [
    (torch.float64, torch.float64, 1e-14),
    (torch.float32, torch.float32, 2e-6),
    (torch.bfloat16, torch.float32, 2**-7),
]


@pytest.mark.parametrize("out", ["none", "other", "itself"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (4, 1, 2), (7, 10)])
@pytest.mark.parametrize(("dtype", "phase_dtype", "tolerance"), PRECISIONS)
def test_rotate_equals_rope_and_conjugate_phases_rotate_back(dtype, phase_dtype, tolerance, shape, out):
    v = torch.randn(shape, dtype=torch.float64).to(dtype)
    angles = 0.1 + torch.rand(shape[-2], shape[-1] // 2, dtype=phase_dtype) * (2 * math.pi - 0.2)
    phases, angles = torch.polar(torch.ones_like(angles), angles), angles.repeat_interleave(2, dim=-1)
    expected, before = rope(v, angles.cos(), angles.sin()), v.clone()
    target = {"none": None, "other": torch.full_like(v, math.nan), "itself": v}[out]
    rotated = kernels.rotate(v, phases, out=target)
    assert rotated.dtype == dtype == expected.dtype and not torch.equal(rotated, before)
    assert torch.allclose(rotated, expected, rtol=tolerance, atol=1e-6 if dtype != torch.float64 else 1e-14)
    assert target is None or rotated.data_ptr() == target.data_ptr()
    assert out == "itself" or torch.equal(v, before)
    back = kernels.rotate(rotated, phases.conj(), out=rotated if out == "itself" else None)
    # errors are relative to the pair's norm, and an entry may be the small one of its pair
    assert torch.allclose(back, before, rtol=0, atol=tolerance * before.abs().max().item())
