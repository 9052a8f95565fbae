"""Vision-BDH in timm: what its train.py, validate.py and feature extraction ask of a model."""

from pathlib import Path

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torchvision.transforms.functional import to_pil_image

from models import timm_models
from models.vision_bdh import v2_config, v3_config
from tests.conftest import TINY_MODEL
from tests.inspecting import with_large_weights
from tools.exporting.weights import export_weights
from training.loop import fit
from training.runs import load_model


@pytest.fixture(scope="session")  # timm knows a name once in a process, whatever order the tests have
def trained(experiment_in, tmp_path_factory):
    """timm's name of a trained model, and the model as this project opens it."""
    folder = tmp_path_factory.mktemp("timm")
    trial = experiment_in(folder, epochs=1, model=dict(n_layer=3, residual="scaled_pre", pool="cls"))
    fit(trial)
    target = folder / "results" / "tiny+cls=1" / "seed0"
    export_weights(load_model(trial.folder)[0], trial.folder, target)
    (name,) = timm_models.register_pretrained(folder / "results")
    assert name == "vision_bdh_tiny_cls_1" and timm.is_model(name) and name in timm.list_pretrained()
    return name, load_model(target)[0]


def test_a_model_without_positions_does_not_take_weights_that_have_some(trained):
    with pytest.raises(RuntimeError, match=r"Unexpected key.*pos_embed"):
        timm.create_model(trained[0], pretrained=True, pos_embed=False)


def test_pretrained_weights_give_the_projects_logits(trained):
    name, ours = trained
    images = torch.randn(5, 3, 32, 32)
    theirs = timm.create_model(name, pretrained=True).eval()
    assert torch.equal(theirs(images), ours(images))
    assert not torch.equal(timm.create_model(name).eval()(images), ours(images))
    data = timm.data.resolve_model_data_config(theirs)
    assert data["mean"] == data["std"] == (0.5,) * 3 and data["input_size"] == (3, 32, 32) and data["crop_pct"] == 1
    pixels = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    transform = timm.data.create_transform(**data, is_training=False)
    torch.testing.assert_close(transform(to_pil_image(pixels)), pixels / 127.5 - 1)


def test_a_new_head_other_channels_and_another_size(trained):
    name, ours = trained
    model = timm.create_model(name, pretrained=True, num_classes=3, in_chans=1, img_size=48).eval()
    assert model(torch.randn(2, 1, 48, 48)).shape == (2, 3) and model.pos_embed.shape == (1, 36, 8)
    assert torch.equal(model.encoder, ours.encoder)
    torch.testing.assert_close(model.patch_embed.weight, ours.patch_embed.weight.sum(1, keepdim=True))


def test_a_convolutional_stem_takes_other_channels_and_levels_are_one_layer(experiment_in, tmp_path):
    fields = dict(stem="conv", mixing="conv_per_level", level_gain=True, update_gain=0.5, pool="seq")
    trial = experiment_in(tmp_path, epochs=1, model=fields)
    fit(trial)
    export_weights(load_model(trial.folder)[0], trial.folder, tmp_path / "results" / "stem" / "seed0")
    timm_models.register_pretrained(tmp_path / "results")
    model = timm.create_model("vision_bdh_stem", pretrained=True, in_chans=1).eval()
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    first = load_model(trial.folder)[0].patch_embed.first.weight.bfloat16().float()
    torch.testing.assert_close(model.patch_embed.first.weight, first.sum(1, keepdim=True))
    groups = group_parameters(model, model.group_matcher())
    stem, levels, head = ({name.partition(".")[0] for name in groups[key]} for key in sorted(groups))
    assert stem == {"patch_embed", "pos_embed"} and head == {"head", "pool_query"}
    assert levels == {"encoder", "encoder_v", "decoder", "mixing", "level_gain", "level_bias", "update_gain"}


def test_each_block_of_a_hybrid_is_a_layer():
    sizes = dict(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4)
    model = timm.create_model("vision_bdh_v2", **sizes, blocks_before=2, blocks_after=1)
    layers = group_parameters(model, model.group_matcher())
    first = [layers[key][0].removesuffix(".norm1.weight") for key in sorted(layers)]
    assert first[1:] == ["blocks_before.0", "blocks_before.1", "encoder", "blocks_after.0", "head.weight"]


def test_head_and_features(trained):
    model = timm.create_model(trained[0], pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    features = model.forward_features(images)
    assert features.shape == (2, 17, 8)
    assert torch.equal(model.forward_head(features), model(images))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model.get_classifier() is model.head
    model.reset_classifier(4)
    assert model(images).shape == (2, 4) and model.num_classes == 4
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert torch.equal(model(images), features)
    assert timm.create_model(trained[0], num_classes=0)(images).shape == (2, 8)
    with pytest.raises(ValueError, match="global_pool = 'avg' must be 'token'"):
        model.reset_classifier(3, "avg")


@pytest.mark.parametrize("make", [v2_config, v3_config])
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_intermediates_are_the_states_of_the_levels(make, pool):
    config = make(**(TINY_MODEL | dict(n_layer=3, pool=pool)))
    fields = {
        key: value for key, value in vars(config).items() if key not in ("num_classes", "in_channels", "drop_path")
    }
    model = with_large_weights(timm_models.TimmVisionBDH(**fields)).double()
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)  # not square, not the size it was built for
    last, found = model.forward_intermediates(images, output_fmt="NLC")
    assert torch.equal(last, model.forward_features(images)) and len(found) == 3
    assert torch.equal(found[-1], last[:, model.num_prefix_tokens :])
    shorter = timm_models.TimmVisionBDH(**(fields | dict(n_layer=2))).double().eval()
    shorter.load_state_dict(model.state_dict(), strict=False)
    if make is v2_config:  # in v3 the norm after two levels is another one than the model's last
        torch.testing.assert_close(found[1], shorter.forward_features(images)[:, model.num_prefix_tokens :])
    elif pool == "mean":
        states = model.states(*model.embed(images))
        assert torch.equal(found[1], model.finished(states[1])) and not torch.equal(found[1], states[1])
    (normed,) = model.forward_intermediates(images, 1, norm=True, intermediates_only=True)
    assert normed.shape == (2, 8, 2, 3)
    expected = model.normalised(last)[:, model.num_prefix_tokens :].mT.unflatten(-1, (2, 3))
    torch.testing.assert_close(normed, expected)


def test_feature_extraction(trained):
    model = timm.create_model(trained[0], pretrained=True, features_only=True, out_indices=(0, 2)).eval()
    assert model.feature_info.channels() == [8, 8] and model.feature_info.reduction() == [8, 8]
    outputs = model(torch.randn(2, 3, 32, 32))
    full = timm.create_model(trained[0], pretrained=True).eval()
    assert [output.shape for output in outputs] == [(2, 8, 4, 4)] * 2
    assert all(torch.isfinite(output).all() for output in outputs) and len(full.feature_info) == 3
    assert len(timm.create_model(trained[0], features_only=True, n_layer=2)(torch.randn(1, 3, 32, 32))) == 2


def test_a_step_of_timms_training(trained):
    """Layer-wise rates, no decay of positions, activation checkpointing, a loss that falls."""
    torch.manual_seed(0)
    model = timm.create_model(trained[0], drop_path_rate=0.1, drop_rate=0.2)
    assert model.config.drop_path == 0.1 and model.config.dropout == 0.2
    for name, of_timm in (("dropout", "drop_rate"), ("drop_path", "drop_path_rate"), ("in_channels", "in_chans")):
        with pytest.raises(TypeError, match=f"{name} .* {of_timm}"):
            timm.create_model(trained[0], **{name: 1})
    model = timm.create_model(trained[0], drop_rate=0.0)
    model.set_grad_checkpointing()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.5)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert scales == {1.0, 0.5, 0.25}  # head, levels, embedding
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(model.pos_embed)] == 0 and decays[id(model.encoder)] == 0.05
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_untrained_variants_have_every_field_and_no_weights(trained):
    model = timm.create_model("vision_bdh_v3", n_layer=1, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4)
    assert model.config == v3_config(n_layer=1, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4)
    with pytest.raises(RuntimeError, match="No pretrained weights exist for vision_bdh_v3"):
        timm.create_model("vision_bdh_v3", pretrained=True)


def test_a_damaged_folder_is_passed_over_with_a_warning(tmp_path):
    folder = tmp_path / "results" / "broken"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{")
    (folder / "best_bf16.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"broken is not registered: .*config\.json cannot be read"):
        assert timm_models.register_pretrained(tmp_path / "results") == []


def test_a_name_that_is_taken_is_passed_over_with_a_warning(trained_run, tmp_path):
    for name in ("twin-a", "twin_a", "v2"):
        export_weights(load_model(trained_run)[0], trained_run, tmp_path / "results" / name / "seed0")
    with pytest.warns(UserWarning, match="is not registered: there is a vision_bdh_") as warned:
        assert timm_models.register_pretrained(tmp_path / "results") == ["vision_bdh_twin_a"]
    assert [Path(str(each.message).split(" ")[0]).parent.name for each in warned] == ["twin_a", "v2"]
    assert timm.create_model("vision_bdh_v2").config.n_layer == 6  # as before


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="global_pool = 'banana' must be one of avg, token, seq"):
        timm.create_model("vision_bdh_v2", global_pool="banana")
