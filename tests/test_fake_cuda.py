"""CUDA without CUDA: tensors without values, on a GPU by name, so that operations choose types as they would there."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models import kernels
from training.augment import CropAndFlip, PadAndCrop, RandomErasing
from training.mixing import Mix, SmoothLabels
from training.randaugment import OPERATIONS

H, D, N, IMAGES = 2, 8, 32, 3
FEW, MANY = 4, 64  # tokens: attention by its scores, and by q^T x


@pytest.fixture
def fake():
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@contextlib.contextmanager
def autocast(dtype):
    """Of CUDA, without a GPU; `torch.autocast` would turn itself off."""
    torch.set_autocast_dtype("cuda", dtype)
    torch.set_autocast_enabled("cuda", dtype is not torch.float32)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


class Context:
    """Stands in for autograd's, whose engine needs a driver."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("attn_eps", "softmax", "recompute", "tokens"),
    list(itertools.product((None, 1e-5), (False, True), (False, True), (FEW, MANY))),
)
def test_the_fast_step_keeps_its_precision(fake, monkeypatch, dtype, attn_eps, softmax, recompute, tokens):
    monkeypatch.setattr(kernels, "random_state", lambda device: [])
    monkeypatch.setattr(kernels, "_random_as", lambda states, device: contextlib.nullcontext())
    masters = [torch.empty(size, device="cuda") for size in ((H, D, N), (H, D, N), (H * N, D))]
    weights = tuple(master.to(dtype) for master in masters)
    phases = torch.empty(tokens, N // 2, dtype=torch.complex64, device="cuda")
    context, x = Context(), torch.empty(IMAGES, tokens, D, device="cuda")
    settings = (attn_eps, 0.1, softmax, recompute, 1)
    with autocast(dtype):
        y = kernels._FastUpdate.forward(context, x, *masters, weights, phases, *settings)
        gradients = kernels._FastUpdate.backward(context, torch.empty_like(y))
        assert torch.is_autocast_enabled("cuda") == (dtype is not torch.float32)
    assert (y.shape, y.dtype, y.device.type) == (x.shape, torch.float32, "cuda")
    kept = [tensor for tensor in context.saved_tensors if tensor is not None and tensor.shape[-1] > 1]
    assert kept and {tensor.dtype for tensor in kept} == {dtype}
    assert [gradient.shape for gradient in gradients[:4]] == [x.shape, *(master.shape for master in masters)]
    assert [gradient.dtype for gradient in gradients[:4]] == [dtype, *[torch.float32] * 3]  # autograd casts the first


class NoWaiting(TorchDispatchMode):
    """Raises for a copy from the host to the GPU that the host waits for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        devices = {each.device.type for each in (*args, result) if isinstance(each, torch.Tensor)}
        if "copy" in function.name() and len(devices) > 1:
            raise RuntimeError(f"{function} makes the host wait")
        return result


def test_waiting_is_noticed(fake):
    kernel = torch.ones(3, 3, device="cuda")
    with NoWaiting(), pytest.raises(RuntimeError, match="makes the host wait"):
        kernel[1, 1] = 5


@pytest.mark.parametrize("name", OPERATIONS)
def test_randaugment_does_not_wait(fake, name):
    pixels, sign = torch.empty(4, 3, 16, 16, device="cuda"), torch.empty(4, device="cuda")
    with NoWaiting():
        assert OPERATIONS[name](pixels, 0.5, sign).device.type == "cuda"


@pytest.mark.parametrize(
    "step", [CropAndFlip(0.8, True), PadAndCrop(4), RandomErasing(0.5), Mix(0.8, 1.0, 10, 8), SmoothLabels(0.1, 10)]
)
def test_augmentation_does_not_wait(fake, monkeypatch, step):
    monkeypatch.setattr(F, "grid_sample", lambda images, grid, **settings: torch.empty_like(images))  # has no fake
    draws = step.draw(8, 16, 16, torch.Generator().manual_seed(0))
    images, labels = torch.empty(8, 3, 16, 16, device="cuda"), torch.empty(8, dtype=torch.int64, device="cuda")
    draws = [torch.empty(draw.shape, dtype=draw.dtype, device="cuda") for draw in draws]
    with NoWaiting():
        images, labels = step.apply(images, labels, *draws)
    assert images.device.type == labels.device.type == "cuda"
