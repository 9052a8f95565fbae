"""Activation checkpointing (recompute): bit-identical results with less memory."""

import dataclasses

import pytest
import torch

from training import UserError, fit
from benchmarks.measure import kept_memory_mb
from models import kernels
from models.baselines import ResNet20Config
from models.bdh import LN_EPS, BDHCore, CoreConfig
from models.bdh_unet import bdh_unet_config
from models.vision_bdh import v1_config, v2_config, v2_softmax_config, v3_config
from training.stored import load_checkpoint

SMALL = dict(n_layer=3, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4, dropout=0.3, img_size=32)


@pytest.mark.parametrize("tokens", [9, 40])  # by the scores, and by the state
@pytest.mark.parametrize("attn_norm", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("images_per_slice", [5, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_update_is_bit_identical(tokens, attn_norm, dropout, softmax, images_per_slice, dtype):
    """Output, gradients, and the random draws that follow."""
    core = BDHCore(CoreConfig(n_embd=12, n_head=2, mlp_internal_dim_multiplier=4), causal=False)
    masters = core.encoder, core.encoder_v, core.decoder
    for master in masters:
        torch.nn.init.normal_(master, std=0.3)
    assert kernels.scores_are_cheaper(tokens, core.config.n_neurons, 12) == (tokens == 9)
    x, cotangent = torch.randn(5, tokens, 12, requires_grad=True), torch.randn(5, tokens, 12)

    def run(recompute):
        torch.manual_seed(4)
        y = kernels.fast_update(
            x,
            masters,
            tuple(master.detach().to(dtype) for master in masters),
            core.attn.tables(tokens).phases,
            attn_eps=LN_EPS if attn_norm else None,
            dropout=dropout,
            softmax=softmax,
            recompute=recompute,
            slice_bytes=images_per_slice * 2 * tokens * core.config.n_neurons * dtype.itemsize,
        )
        between = torch.rand(3)  # draws between the passes must neither matter nor be disturbed
        gradients = torch.autograd.grad(y, (x, *masters), cotangent)
        return y, *gradients, between, torch.rand(3)

    kept, again = run(False), run(True)
    assert all(gradient.norm() > 0 for gradient in kept[1:5])
    assert all(torch.equal(*pair) for pair in zip(kept, again, strict=True))


def hybrid_config(**overrides):
    return v2_config(**overrides, blocks_before=1, blocks_after=1, drop_path=0.3)


@pytest.mark.parametrize("config", [v1_config, v2_config, v3_config, v2_softmax_config, bdh_unet_config, hybrid_config])
@pytest.mark.parametrize("use_fast_path", [True, False])
def test_models_are_bit_identical_and_need_less_memory(config, use_fast_path):
    torch.manual_seed(0)
    model, images = config(**SMALL).build(), torch.randn(4, 3, 32, 32)
    core = next(module for module in model.modules() if isinstance(module, BDHCore))  # a U-Net's decoder is unaffected
    core.use_fast_path = use_fast_path
    results, memory = [], []
    for core.recompute in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        loss = model(images).square().mean()
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        memory.append(kept_memory_mb(lambda: core(images), torch.device("cpu")))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert memory[1] < 0.6 * memory[0]
    with torch.no_grad():
        evaluated = model.eval()(images)
    assert torch.equal(model(images), evaluated) and not evaluated.requires_grad


def test_training_with_recompute(experiment, monkeypatch):
    """The run is bit-identical, and the levels really are computed again."""
    plain, trial = experiment("plain", epochs=2), experiment("again", epochs=2, options={"recompute": True})
    excitements, excite = [], kernels._excite
    monkeypatch.setattr(kernels, "_excite", lambda *args, **kwargs: excitements.append(1) or excite(*args, **kwargs))
    assert fit(plain) == fit(trial) and plain.configuration.fields() == trial.configuration.fields()
    once, again = (load_checkpoint(each.folder / "last.pt")["model"] for each in (plain, trial))
    assert all(torch.equal(once[key], again[key]) for key in once)
    n_batches = 2 * 6  # two epochs of 192 images; validation and test add the same to both
    evaluations = 1 + 2 + 1  # the check before the first step, validation, test
    assert len(excitements) == (n_batches + evaluations) + (2 * n_batches + evaluations)


def test_models_without_levels_to_recompute(experiment):
    trial = dataclasses.replace(experiment(epochs=1, options={"recompute": True}), model=ResNet20Config())
    with pytest.raises(UserError, match=r"--recompute"):
        fit(trial)
    assert not trial.folder.exists()
