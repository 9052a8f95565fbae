"""The baselines: parameters, settings, ResNet-20 by its paper, and configs."""

import dataclasses
import math
import runpy
import shutil
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models as torchvision_models

from training import fit
from models import CONFIG_CLASSES, build_config
from models.baselines import (
    BaselineConfig,
    DeiTTinyConfig,
    EfficientNetB0Config,
    MobileNetV2Config,
    ResNet20Config,
    ViTConfig,
)
from models.vision_bdh import VisionBDHConfig
from tests.reference import count
from tests.trials import same_weights, weights
from training.config import ROOT

LIBRARY = {
    MobileNetV2Config: torchvision_models.mobilenet_v2,
    EfficientNetB0Config: torchvision_models.efficientnet_b0,
    DeiTTinyConfig: lambda **fields: timm.create_model(
        "deit_tiny_patch16_224", pretrained=False, img_size=32, **fields
    ),
}
CONFIGS = [ViTConfig, ResNet20Config, *LIBRARY]
PUBLISHED, FITTED = dict(setting="published"), dict(setting="fitted")
# config, fields, parameters with 10 and with 100 classes, side of the feature map or grid of patches for 32 x 32 pixels
MODELS = [
    (ResNet20Config, {}, (269_722, 275_572), 8),  # 269,722 is the known count for option A
    (ViTConfig, {}, (5_362_762, 5_380_132), 8),
    (DeiTTinyConfig, PUBLISHED, (5_489_482, 5_506_852), 2),
    (DeiTTinyConfig, FITTED, (5_362_762, 5_380_132), 8),
    (MobileNetV2Config, PUBLISHED, (2_236_682, 2_351_972), 1),
    (MobileNetV2Config, FITTED, (2_236_682, 2_351_972), 4),
    (EfficientNetB0Config, PUBLISHED, (4_020_358, 4_135_648), 1),
    (EfficientNetB0Config, FITTED, (4_020_358, 4_135_648), 4),
]


def draw_weights(model, std=0.05):
    """Every parameter and every running statistic at random, so that all parts matter and none is at its start."""
    generator = torch.Generator().manual_seed(11)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2.0, generator=generator)
        elif value.is_floating_point():
            value.normal_(0, std, generator=generator)
        if value.ndim == 1 and name.endswith("weight"):  # the factor of a norm
            value.add_(1)
    return model


# ---------------------------------------------------------------------------- sizes and settings


@pytest.mark.parametrize(("config", "fields", "parameters", "side"), MODELS)
def test_parameters_feature_maps_and_gradients(config, fields, parameters, side):
    with torch.device("meta"):
        assert tuple(count(config(num_classes=n, **fields).build()) for n in (10, 100)) == parameters
    last = {ResNet20Config: "blocks", DeiTTinyConfig: "norm", ViTConfig: "encoder"}.get(config, "features")
    model, shapes = config(num_classes=7, **fields).build().eval(), []
    model.get_submodule(last).register_forward_hook(lambda *args: shapes.append(tuple(args[-1].shape)))
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    (shape,) = shapes
    assert shape[1:] == (1 + side**2, 192) if len(shape) == 3 else shape[2:] == (side, side)
    # another image size; every parameter learns
    model = draw_weights(config(num_classes=7, img_size=64, **fields).build()).train()
    logits = model(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.eval()(torch.randn(1, 3, 64, 64)).isfinite().all()


def strides(model):
    return {name: each.stride for name, each in model.named_modules() if isinstance(each, nn.Conv2d)}


@pytest.mark.parametrize("config", LIBRARY)
def test_published_is_the_librarys_model(config):
    """The same modules, names, shapes and strides, from one seed the same weights, and the same logits."""
    torch.manual_seed(0)
    model = config(**PUBLISHED).build().eval()
    torch.manual_seed(0)
    library = LIBRARY[config](num_classes=10).eval()
    assert repr(model).replace("SmallMapConv2d", "Conv2d") == repr(library) and strides(model) == strides(library)
    ours, theirs = model.state_dict(), library.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(draw_weights(model)(images), draw_weights(library)(images))


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        (MobileNetV2Config, ["features.0.0", "features.2.conv.1.0"]),
        (EfficientNetB0Config, ["features.0.0", "features.2.0.block.1.0"]),
    ],
)
def test_fitted_differs_in_two_strides_and_takes_the_same_weights(config, changed):
    published, fitted = config(**PUBLISHED).build(), config(**FITTED).build()
    before, after = strides(published), strides(fitted)
    assert [name for name in before if before[name] != after[name]] == changed
    assert all((before[name], after[name]) == ((2, 2), (1, 1)) for name in changed)
    draw_weights(published).eval()
    fitted.load_state_dict(published.state_dict())
    stems = []
    for model in (published, fitted.eval()):
        model.features[0].register_forward_hook(lambda module, args, output: stems.append(output))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = [model(images) for model in (published, fitted)]
    assert torch.allclose(stems[0], stems[1][..., ::2, ::2], atol=1e-6)  # a stride of 2 leaves out every second pixel
    assert not torch.allclose(*logits, rtol=1e-2)


def test_the_fitted_deit_is_vit_tiny():
    """Weights renamed from timm's to torchvision's names give the same logits: only the initial weights differ."""
    deit, vit = draw_weights(DeiTTinyConfig(**FITTED).build()).eval(), ViTConfig().build().eval()
    names = {
        "cls_token": "class_token",
        "pos_embed": "encoder.pos_embedding",
        "patch_embed.proj": "conv_proj",
        "blocks.": "encoder.layers.encoder_layer_",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attn.qkv.": "self_attention.in_proj_",
        "attn.proj": "self_attention.out_proj",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.3",
        "head.": "heads.head.",
    }
    moved = {}
    for name, value in deit.state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        moved["encoder.ln." + name.removeprefix("norm.") if name.startswith("norm.") else name] = value
    vit.load_state_dict(moved)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(deit(images), vit(images), atol=1e-5)
        assert deit(images).std() > 0.1


@pytest.mark.parametrize("config", [MobileNetV2Config, EfficientNetB0Config])
def test_dropout_fields_arrive(config):
    model = config(dropout=0.35).build()
    assert [each.p for each in model.modules() if isinstance(each, nn.Dropout)] == [0.35]
    if config is EfficientNetB0Config:
        model = config(stochastic_depth_prob=0.5).build()
        skips = [each.p for each in model.modules() if type(each).__name__ == "StochasticDepth"]
        assert skips == [0.5 * block / 16 for block in range(16)]


# ---------------------------------------------------------------------------- ResNet-20


def reference_resnet20(weights, images, training):
    """Logits by He et al. 2016, section 4.2, from weights in the order in which the network uses them."""
    left = iter(weights)

    def convolve(x, stride):
        kernel, scale, shift, running_mean, running_var = (next(left) for _ in range(5))
        x = F.conv2d(x, kernel, stride=stride, padding=1)
        mean = x.mean((0, 2, 3)) if training else running_mean
        var = x.var((0, 2, 3), unbiased=False) if training else running_var
        mean, var, scale, shift = (each[:, None, None] for each in (mean, var, scale, shift))
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = convolve(images, 1).clamp(min=0)
    for stage, channels in enumerate((16, 32, 64)):
        for block in range(3):
            stride = 2 if stage > 0 and block == 0 else 1
            update = convolve(convolve(x, stride).clamp(min=0), 1)
            short = x.new_zeros(update.shape)
            short[:, : x.shape[1]] = x[..., ::stride, ::stride]
            x = (update + short).clamp(min=0)
            assert x.shape[1] == channels
    head, bias = left  # and nothing is left over
    return x.mean((2, 3)) @ head.T + bias


@pytest.mark.parametrize("size", [32, 27])
@pytest.mark.parametrize("training", [False, True])
def test_resnet20_by_its_paper(training, size):
    model = draw_weights(ResNet20Config(num_classes=5).build().double(), std=0.15).train(training)
    weights = [value.clone() for value in model.state_dict().values() if value.is_floating_point()]
    images = torch.randn(4, 3, size, size, dtype=torch.float64)
    logits = model(images)
    assert torch.allclose(logits, reference_resnet20(weights, images, training), rtol=1e-10, atol=1e-12)
    assert logits.std() > 0.01


def test_resnet20_starts_from_he_initialisation():
    torch.manual_seed(0)
    for module in ResNet20Config().build().modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            # the deviation of n draws is known to 1 / sqrt(2 n) of itself; 5 of these
            tolerance = 5 / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=tolerance)
            assert module.bias is None


# ---------------------------------------------------------------------------- training


def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(experiment_in, tmp_path):
    """Bit-identical, with running statistics, dropout and skipped blocks, which no BDH has."""

    def trial(folder, **options):
        train = dict(epochs=2, batch_size=8, learning_rate=1e-3, train_limit=20)
        experiment = experiment_in(tmp_path / folder, options=options, **train)
        return dataclasses.replace(experiment, model=EfficientNetB0Config())

    whole, stopped = trial("whole"), trial("stopped", resume=True)
    fit(whole)
    shutil.copytree(whole.folder, stopped.folder)
    for name in ("last.pt", "summary.json"):  # as after the first epoch, whose checkpoint is previous.pt
        (stopped.folder / name).unlink()
    fit(stopped)
    first, expected = weights(whole.folder, "previous.pt"), weights(whole.folder)
    assert same_weights(weights(stopped.folder), expected)
    assert not torch.equal(first["features.0.1.running_mean"], expected["features.0.1.running_mean"])


# ---------------------------------------------------------------------------- configs


@pytest.mark.parametrize("cls", CONFIGS)
def test_a_config_survives_being_stored(cls):
    config = cls(num_classes=12, img_size=64)
    assert CONFIG_CLASSES[cls.__name__] is cls and isinstance(config, BaselineConfig)
    assert build_config(cls.__name__, dataclasses.asdict(config)) == config
    assert (config.num_classes, config.img_size, config.in_channels) == (12, 64, 3)


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("GPTConfig", {}, r"unknown model config GPTConfig: register it .*VisionBDHConfig"),
        ("ViTConfig", dict(n_layer=2, n_layers=2, width=3), "ViTConfig has no field n_layers, width:"),
        ("ViTConfig", dict(n_layer="two"), "ViTConfig does not take the stored values"),
        ("ViTConfig", dict(n_layer=0), "n_layer = 0 must be at least 1"),
    ],
)
def test_a_stored_config_that_cannot_be_built(name, fields, words):
    assert build_config("VisionBDHConfig", dict(n_layer=2)) == VisionBDHConfig(n_layer=2)  # the others by default
    with pytest.raises(ValueError, match=words):
        build_config(name, fields)


@pytest.mark.parametrize(
    ("cls", "fields", "words"),
    [
        *((cls, dict(num_classes=0), "num_classes = 0 must be at least 1") for cls in CONFIGS),
        *((cls, dict(img_size=0), "img_size = 0 must be at least 1") for cls in CONFIGS),
        *((cls, dict(setting="fited"), "published, fitted") for cls in LIBRARY),
        (MobileNetV2Config, dict(dropout=1.0), "dropout = 1.0 must be at least 0 and below 1"),
        (EfficientNetB0Config, dict(dropout=-0.1), "dropout = -0.1"),
        (EfficientNetB0Config, dict(stochastic_depth_prob=1.5), "stochastic_depth_prob = 1.5"),
        (EfficientNetB0Config, dict(stochastic_depth_prob=math.nan), "stochastic_depth_prob = nan"),
        (DeiTTinyConfig, dict(img_size=40), "img_size = 40 is not a multiple of 16.*published"),
        (DeiTTinyConfig, dict(img_size=42, **FITTED), "img_size = 42 is not a multiple of 4.*fitted"),
        (ViTConfig, dict(img_size=30), "img_size = 30 is not a multiple of patch_size = 4"),
        (ViTConfig, dict(n_layer=0), "n_layer = 0 must be at least 1"),
        (ViTConfig, dict(dropout=1.0), "dropout = 1.0"),
        (ViTConfig, dict(n_head=5), "n_embd = 192 is not a multiple of n_head = 5"),
    ],
)
def test_impossible_values_are_refused(cls, fields, words):
    with pytest.raises(ValueError, match=words):
        cls(**fields)


def test_only_deit_needs_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    for file in ("models/baselines.py", "interpretability/common/recorder.py"):
        runpy.run_path(str(ROOT / file))
    with torch.device("meta"):
        for cls in set(CONFIGS) - {DeiTTinyConfig}:
            cls().build()


# ---------------------------------------------------------------------------- as a user meets them


def flags(data_dir, tmp_path, *more):
    return ["--data-dir", data_dir, "--runs-dir", tmp_path / "runs", "--device", "cpu", "--epochs", "1", *more]


def test_a_last_batch_of_one_image_is_one_message(call_script, data_dir, tmp_path, capsys):
    """120 images to train, 7 times 17 and one more."""
    more = flags(data_dir, tmp_path, "--train-limit", 150, "--batch-size", 17)
    assert call_script("train_mobilenetv2_cifar100.py", *more) == 1
    assert "--batch-size" in capsys.readouterr().err


def test_the_attention_of_a_trained_deit_is_drawn(call_script, data_dir, tmp_path, capsys):
    more = flags(data_dir, tmp_path, "--setting", "fitted", "--train-limit", 40, "--name", "deit")
    assert call_script("train_deit_tiny_cifar100.py", *more) == 0
    where = ["--run", tmp_path / "runs" / "deit" / "seed0", "--data-dir", data_dir, "--output-dir", tmp_path / "maps"]
    assert call_script("interpretability/visualize_attention.py", *where) == 0
    (picture,) = (tmp_path / "maps").glob("*/*.png")
    assert picture.stat().st_size > 15_000
