"""Optimizers, held to the library's, and which parameters each of them gets."""

from functools import partial

import pytest
import torch
from torch import nn

from models.baselines import DeiTTinyConfig, ResNet20Config, ViTConfig
from models.bdh_unet import bdh_unet_config
from models.vision_bdh import v2_config
from tests.trials import make_train
from training.muon import orthogonalise
from training.optimiser import hidden_matrices, make_optimizer


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize(
    ("fields", "library"),
    [
        (dict(betas=(0.5, 0.6)), partial(torch.optim.AdamW, betas=(0.5, 0.6))),
        (dict(optimizer="sgd", momentum=0.8), partial(torch.optim.SGD, momentum=0.8, nesterov=True)),
        (dict(optimizer="sgd", momentum=0.0), torch.optim.SGD),
        (dict(optimizer="muon", momentum=0.8), partial(torch.optim.Muon, momentum=0.8, adjust_lr_fn="match_rms_adamw")),
    ],
    ids=["adamw", "sgd", "sgd without momentum", "muon"],
)
def test_an_optimizer_steps_as_the_librarys_with_the_same_fields(fields, library, shape):
    model = nn.Linear(shape[1], shape[0], bias=False)
    start = model.weight.detach().clone()
    twin = nn.Parameter(start.clone())
    ours, theirs = make_optimizer(model, make_train(**fields)), library([twin], lr=0.02, weight_decay=0.1)
    for _ in range(4):
        model.weight.grad = torch.randn(shape)
        twin.grad = model.weight.grad.clone()
        ours.step()
        theirs.step()
    in_bf16 = fields.get("optimizer") == "muon"  # the library's
    assert torch.allclose(model.weight, twin, rtol=0, atol=2e-3 if in_bf16 else 1e-6)
    assert (model.weight - start).abs().max() > 0.01


def test_muon_decays_weights_by_rate_times_decay_whatever_the_update():
    model = nn.Linear(20, 12, bias=False)
    before = model.weight.detach().clone()
    model.weight.grad = torch.zeros_like(before)
    make_optimizer(model, make_train(optimizer="muon", weight_decay=0.1)).step()
    assert torch.equal(model.weight, before * (1 - 0.02 * 0.1))


def test_orthogonalise_brings_singular_values_near_one_and_keeps_the_directions():
    matrices = torch.randn(5, 12, 30, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    inside = u.mT @ orthogonalise(matrices, torch.float64) @ vt.mT  # diagonal in the bases of the SVD
    values = inside.diagonal(dim1=-2, dim2=-1)
    assert ((values > 0.6) & (values < 1.3)).all() and s.max() / s.min() > 2
    assert (inside - torch.diag_embed(values)).abs().max() < 1e-9


@pytest.mark.parametrize("shared", [True, False])
def test_each_head_and_level_of_a_bdh_is_a_matrix_of_its_own(shared):
    model = v2_config(n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, shared=shared).build()
    shapes = hidden_matrices(model)
    assert shapes.keys() == {"encoder", "encoder_v", "decoder"}
    for name, shape in shapes.items():
        stack = getattr(model, name).reshape(shape)
        assert stack.flatten(0, -3).shape == (2 if shared else 4, *((16, 8) if name == "decoder" else (8, 16)))
    optimizer = make_optimizer(model, make_train(optimizer="muon"))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before, grad = model.decoder.detach().clone(), model.decoder.grad.clone()
    optimizer.step()
    head = slice(0, 16)  # the first head's neurons: moved by their own orthogonalised gradient
    step = (model.decoder - before * (1 - 0.02 * 0.1)).view(-1, 8)[head]
    expected = orthogonalise(grad.view(-1, 8)[head][None], torch.float32)[0]
    assert torch.allclose(step / step.norm(), -expected / expected.norm(), atol=2e-2)


def test_muon_leaves_embeddings_norms_and_the_head_to_adamw():
    names = hidden_matrices(ViTConfig(n_layer=1, n_embd=12, mlp_dim=24).build())
    assert {name.rpartition("encoder_layer_0.")[2] for name in names} == {
        "self_attention.in_proj_weight",
        "self_attention.out_proj.weight",
        "mlp.0.weight",
        "mlp.3.weight",
    }
    deit = hidden_matrices(DeiTTinyConfig().build())
    assert deit["blocks.0.attn.qkv.weight"] == (3, -1, 192) and len(deit) == 4 * 12
    sizes = dict(n_layer=1, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4)
    hybrid = hidden_matrices(v2_config(**sizes, blocks_before=1, blocks_after=1).build())
    assert hybrid["blocks_after.0.attn.qkv.weight"] == (3, -1, 8) and len(hybrid) == 3 + 4 + 4
    convolutions = hidden_matrices(ResNet20Config().build())
    assert len(convolutions) == 19 and set(map(len, convolutions.values())) == {2}
    unet_sizes = sizes | dict(n_embd=16, img_size=64)
    upernet = hidden_matrices(bdh_unet_config(decoder="upernet", **unet_sizes).build())
    assert len(upernet) == 3 + 1 + 5 + 3 + 3 + 1 and upernet["upernet.resize.0.0.weight"] == (16, -1)
    bridged = hidden_matrices(
        bdh_unet_config(skips=True, skip_levels=(1, 1), bridges="attention", **unet_sizes).build()
    )
    assert {name for name in bridged if "bridge" in name} == {
        f"stages.{stage}.bridge.of_{what}.weight" for stage in (0, 1) for what in ("skip", "gate")
    }
    model = v2_config(**sizes).build()
    muon, adamw = make_optimizer(model, make_train(optimizer="muon", adamw_learning_rate=0.005)).param_groups
    assert (muon["lr"], adamw["lr"]) == (0.02, 0.005)
    fields = dict(lr=0.005, weight_decay=0.1, betas=(0.5, 0.6))
    twin = torch.optim.AdamW([model.head.weight.detach().clone().requires_grad_()], **fields)
    optimizer = make_optimizer(model, make_train(optimizer="muon", adamw_learning_rate=0.005, betas=(0.5, 0.6)))
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        twin.param_groups[0]["params"][0].grad = model.head.weight.grad.clone()
        optimizer.step()
        twin.step()
    assert torch.allclose(model.head.weight, twin.param_groups[0]["params"][0], atol=1e-7)


def test_a_loaded_state_lies_where_the_weights_are():
    """Checkpoints are read on the CPU; the device "meta" stands for a GPU."""
    model, elsewhere = (v2_config(n_layer=1, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4).build() for _ in "ab")
    optimizer = make_optimizer(model, make_train(optimizer="muon"))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    loaded = make_optimizer(elsewhere.to("meta"), make_train(optimizer="muon"))
    loaded.load_state_dict(optimizer.state_dict())
    values = {(name, value.device.type) for state in loaded.state.values() for name, value in state.items()}
    assert values == {(name, "meta") for name in ("momentum_buffer", "exp_avg", "exp_avg_sq", "step")}


def test_decay_of_matrices_spares_biases_norms_positions_and_tokens():
    model = ViTConfig(n_layer=1, n_embd=12, mlp_dim=24).build()
    decayed, spared = make_optimizer(model, make_train(decay="matrices")).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    spared = {names[id(parameter)] for parameter in spared["params"]}
    assert spared == {n for n in names.values() if n.endswith("bias") or "ln" in n or "token" in n or "pos_" in n}
    (single,) = make_optimizer(model, make_train()).param_groups
    assert len(single["params"]) == len(names)
