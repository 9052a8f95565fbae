"""BDH-UNet: the encoder is Vision-BDH's, the decoder is the published one, any image size is accepted."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interpretability.common.recorder import record
from models.bdh import layer_norm
from models.bdh_unet import AttentionBridge, BDHUNetConfig, bdh_unet_config
from models.upernet import STRIDES, UPerNet, averaged
from models.vision_bdh import VisionBDH, VisionEncoder, interpolate_positions, v2_config
from tests.reference import count, randomised

SMALL = dict(img_size=32, n_layer=3, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4)
WITH_SKIPS = dict(skips=True, skip_levels=(2, 1))
WITH_BRIDGES = WITH_SKIPS | dict(bridges="attention")
UPERNET = dict(decoder="upernet", img_size=64)
VARIANTS = [
    {},
    WITH_SKIPS,
    WITH_BRIDGES,
    UPERNET,
    UPERNET | dict(residual="scaled_pre", upernet_levels=(3, 1, 1, 2)),
    dict(rotary="axial"),
    dict(attention="softmax"),
    dict(shared=False),
    dict(pos_embed=False),
    dict(residual="scaled_pre"),
]


def small_unet(**fields):
    torch.manual_seed(0)
    return bdh_unet_config(**(SMALL | fields)).build().eval()


# ---------------------------------------------------------------------------- the published model


def test_the_published_sizes_and_decoder():
    config = bdh_unet_config()
    assert (config.img_size, config.patch_size, config.grid, config.num_classes) == (384, 8, (48, 48), 11)
    assert (config.n_embd, config.n_head, config.n_layer, config.n_neurons, config.dropout) == (256, 4, 6, 1024, 0.1)
    assert (config.residual, config.attention, config.init) == ("pre", "raw", "xavier") and not config.skips
    with torch.device("meta"):
        model, with_skips = config.build(), bdh_unet_config(skips=True).build()
    assert (count(model), count(with_skips)) == (4_152_235, 4_646_251)
    expected, before = [], 256
    for width in (128, 64, 32):
        expected += [nn.ConvTranspose2d(before, width, 2, stride=2), nn.BatchNorm2d(width), nn.ReLU()]
        expected += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    expected.append(nn.Conv2d(32, 11, 1))
    decoder = [each for part in (model.stages, model.head) for each in part.modules() if not list(each.children())]
    assert [repr(each) for each in decoder] == [repr(each) for each in expected]
    assert model.skips is None


def test_the_decoder_goes_from_the_grid_to_the_image():
    model, sides = small_unet(), []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, args, output: sides.append((output.shape[1], output.shape[2])))
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 11, 32, 32)
    assert sides == [(8, 8), (4, 16), (2, 32)]


# ---------------------------------------------------------------------------- the encoder is Vision-BDH's


def test_the_encoder_is_the_class_that_classification_uses():
    model = small_unet()
    assert type(model.encoder) is VisionEncoder and issubclass(VisionBDH, VisionEncoder)
    classifier = v2_config(**SMALL, patch_size=8).build().eval()
    missing, unexpected = classifier.load_state_dict(model.encoder.state_dict(), strict=False)
    assert set(missing) == {"head.weight", "head.bias"} and not unexpected
    images = torch.randn(2, 3, 32, 32)
    states, grid = model.encoder(images)
    assert grid == (4, 4) and len(states) == 3
    assert torch.equal(states[-1], classifier.tokens(images))


@pytest.mark.parametrize("residual", ["post", "pre", "true_pre", "scaled_pre", "none"])
def test_states_are_those_after_each_level(residual):
    """The states of a model of n levels are the first n of a deeper model, except for scaled_pre's final norm."""
    fields = SMALL | dict(residual=residual, patch_size=8)
    models = [randomised(v2_config(**(fields | dict(n_layer=n))).build()) for n in (1, 2, 3)]
    for model in models[:2]:
        weights = models[2].state_dict()
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
    images = torch.randn(2, 3, 32, 32, dtype=models[0].encoder.dtype)
    x, grid = models[2].embed(images)
    states = models[2].states(x, grid)
    for model in models[: 2 if residual != "scaled_pre" else 0]:
        torch.testing.assert_close(states[model.config.n_layer - 1], model.levels(x, grid))
    torch.testing.assert_close(states[-1], models[2].levels(x, grid))


@pytest.mark.parametrize("residual", ["pre", "scaled_pre"])
def test_the_decoder_reads_the_normalised_last_state(residual):
    model, read, images = small_unet(residual=residual), [], torch.randn(2, 3, 32, 32)
    model.stages[0].register_forward_pre_hook(lambda module, args: read.append(args[0]))
    model(images)
    last = model.encoder(images)[0][-1]
    assert torch.equal(read[0].flatten(2).mT, last if residual == "scaled_pre" else layer_norm(last))


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_training_reaches_every_weight(fields):
    model = small_unet(**fields).train()
    side = model.config.img_size
    model(torch.randn(2, 3, side, side)).square().mean().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


def test_the_fast_path_is_the_encoders():
    for fields in ({}, WITH_BRIDGES, UPERNET | dict(upernet_channels=3)):
        assert small_unet(**fields).encoder.has_fast_path(torch.device("cpu"))
    assert not small_unet(gate="sigmoid").encoder.has_fast_path(torch.device("cpu"))


# ---------------------------------------------------------------------------- skips


def test_skips_read_the_chosen_levels_and_the_stem():
    model = small_unet(**WITH_SKIPS)
    images, skips = torch.randn(1, 3, 32, 32), []
    model.skips.register_forward_hook(lambda module, args, output: skips.extend(output))
    model(images)
    assert [tuple(each.shape) for each in skips] == [(1, 16, 8, 8), (1, 8, 16, 16)]
    states, _ = model.encoder(images)
    coarse = model.skips.project[0](layer_norm(states[1]).mT.unflatten(-1, (4, 4)))  # level 2 for the coarser stage
    upsampled = nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear")
    torch.testing.assert_close(skips[0][:, :8], upsampled)
    half = model.skips.stem[0](images)
    torch.testing.assert_close(skips[1][:, 4:], half)
    torch.testing.assert_close(skips[0][:, 8:], model.skips.stem[1](half))


@pytest.mark.parametrize(("fields", "seen"), [({}, False), (WITH_SKIPS, True)])
def test_with_skips_the_image_bypasses_the_encoder(fields, seen):
    """A change that the encoder is blind to reaches the output only through the stem."""
    model, images = small_unet(**fields), torch.randn(1, 3, 32, 32)
    changed = images.clone()
    changed[..., :4, :4] += 1
    with torch.no_grad():
        model.encoder.patch_embed.weight.zero_()
        assert (not torch.equal(model(images), model(changed))) == seen


def test_a_bridge_weights_each_position_of_the_skip_connection():
    """Against the formula of Attention U-Net, written as sums over channels."""
    model, seen = small_unet(**WITH_BRIDGES).double(), {}
    for stage in model.stages[:2]:
        nn.init.normal_(stage.bridge.psi.weight, std=2)
    stage = model.stages[1]
    for name, part in (("gate", stage.up), ("out", stage.bridge)):
        part.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
    stage.bridge.register_forward_pre_hook(lambda module, args: seen.update(skip=args[0]))
    stage.conv.register_forward_pre_hook(lambda module, args: seen.update(read=args[0]))
    model(torch.randn(2, 3, 16, 40, dtype=torch.float64))
    w_x, w_g, psi = (getattr(stage.bridge, name).weight[:, :, 0, 0] for name in ("of_skip", "of_gate", "psi"))
    both = torch.einsum("oc,bchw->bohw", w_x, seen["skip"]) + torch.einsum("oc,bchw->bohw", w_g, seen["gate"])
    both = (both + stage.bridge.of_gate.bias[:, None, None]).clamp(min=0)
    alpha = 1 / (1 + torch.exp(-torch.einsum("c,bchw->bhw", psi[0], both) - stage.bridge.psi.bias))
    assert alpha.shape == (2, 8, 20) and alpha.max() - alpha.min() > 0.1
    torch.testing.assert_close(seen["out"], seen["skip"] * alpha[:, None])
    torch.testing.assert_close(seen["read"], torch.cat((seen["gate"], seen["out"]), dim=1))


def test_bridges_start_almost_open():
    torch.manual_seed(0)
    alpha = AttentionBridge(64, 32)(torch.ones(4, 64, 9, 9), torch.randn(4, 32, 9, 9))
    assert alpha.min() > 0.7 and 0.8 < alpha.mean() < 0.95


# ---------------------------------------------------------------------------- UPerNet


@pytest.mark.parametrize("side", [1, 2, 5, 6, 13])
def test_means_over_regions_are_the_librarys(side):
    x = torch.randn(2, 3, side, 7, dtype=torch.float64)
    for n in (1, 2, 3, 6):
        torch.testing.assert_close(averaged(x, n), F.adaptive_avg_pool2d(x, n))


@torch.no_grad()
def test_upernet_computes_what_segmentation_models_pytorch_does():
    """But for BatchNorm after the mean over the whole map, a LayerNorm on the levels, and strides, tested below."""
    from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

    torch.manual_seed(0)
    ours, theirs = UPerNet(16, 8, 6).eval(), UPerNetDecoder([3, 16, 16, 16, 16, 16], decoder_channels=6).eval()
    ours.resize = nn.ModuleList(nn.Identity() for _ in STRIDES)
    theirs.feature_norms = nn.ModuleList(nn.Identity() for _ in STRIDES)
    pairs = [*zip(theirs.fpn_conv_blocks, reversed(ours.smooth), strict=True)]
    lateral = [each.conv_norm_relu for each in theirs.fpn_lateral_blocks]
    regions = [each[1] for each in theirs.psp.blocks]
    pairs += [*zip(lateral, reversed(ours.lateral), strict=True), *zip(regions, ours.pooling.regions, strict=True)]
    pairs += [(theirs.psp.out_conv, ours.pooling.bottleneck), (theirs.fusion_block, ours.fuse)]
    for their, own in pairs:
        own[0].weight.copy_(their[0].weight)
        norm = their[1]
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.bias.normal_()
        if isinstance(own[1], nn.BatchNorm2d):
            own[1].load_state_dict(norm.state_dict())
        else:
            norm.running_mean.zero_(), norm.running_var.fill_(1 - norm.eps)
            own[0].bias.copy_(norm.bias)
    levels = [torch.randn(2, 16, 24 // k, 40 // k) for k in (1, 2, 4, 8)]
    torch.testing.assert_close(ours(levels), theirs([levels[0], levels[0], *levels]))


@pytest.mark.parametrize(("patch_size", "factors"), [(8, (2, 1, 1 / 2, 1 / 4)), (16, (4, 2, 1, 1 / 2))])
def test_levels_are_resized_to_four_strides(patch_size, factors):
    resize = UPerNet(2, patch_size, 4).eval().resize
    x = torch.randn(1, 2, 5, 6)
    for factor, layer in zip(factors, resize, strict=True):
        y = layer(x)
        assert y.shape[2:] == (math.ceil(5 * factor), math.ceil(6 * factor))
        if factor == 2:
            weight, bias = layer[0].weight, layer[0].bias
            expected = torch.einsum("bchw,cokl->bohkwl", x, weight).flatten(2, 3).flatten(3) + bias[:, None, None]
            torch.testing.assert_close(y, expected)
        if factor < 1:
            k = round(1 / factor)
            blocks = [[x[..., i : i + k, j : j + k].amax((2, 3)) for j in range(0, 6, k)] for i in range(0, 5, k)]
            assert torch.equal(y, torch.stack([torch.stack(row, -1) for row in blocks], -2))


@pytest.mark.parametrize("residual", ["pre", "scaled_pre"])
def test_upernet_reads_the_normalised_levels_and_its_logits_are_interpolated(residual):
    model, read, small = small_unet(**UPERNET, residual=residual, upernet_levels=(2, 1, 1, 3)), [], []
    model.upernet.register_forward_pre_hook(lambda module, args: read.extend(args[0]))
    model.head.register_forward_hook(lambda module, args, output: small.append(output))
    images = torch.randn(2, 3, 96, 160)
    logits = model(images)
    states, grid = model.encoder(images)
    last = states[2] if residual == "scaled_pre" else layer_norm(states[2])
    for each, expected in zip(read, (layer_norm(states[1]), *2 * [layer_norm(states[0])], last), strict=True):
        assert torch.equal(each.flatten(2).mT, expected) and each.shape[2:] == grid
    assert small[0].shape == (2, 11, 24, 40)
    torch.testing.assert_close(logits, F.interpolate(small[0], scale_factor=4, mode="bilinear"))


def test_upernet_trains_on_one_image_at_a_time():
    model = small_unet(**UPERNET | dict(img_size=40)).train()
    model(torch.randn(1, 3, 40, 40)).square().mean().backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


def test_upernets_levels_are_spread_over_the_depth():
    defaults = {n: bdh_unet_config(decoder="upernet", n_layer=n).levels_of_strides for n in (1, 2, 6, 12)}
    assert defaults == {1: (1, 1, 1, 1), 2: (1, 1, 2, 2), 6: (2, 3, 5, 6), 12: (3, 6, 9, 12)}
    one, other = (BDHUNetConfig(decoder="upernet", upernet_levels=kind((1, 2, 4, 6))) for kind in (list, tuple))
    assert one == other and one.levels_of_strides == (1, 2, 4, 6)  # a list: as config.json returns it


# ---------------------------------------------------------------------------- any size


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("size", [(16, 40), (48, 24), (8, 8)])
def test_any_multiple_of_the_patch_size(fields, size):
    assert small_unet(**fields)(torch.randn(2, 3, *size)).shape == (2, 11, *size)


def test_non_square_training_size():
    model = small_unet(img_size=(24, 40))
    assert model.encoder.pos_embed.shape == (1, 15, 16)
    assert model(torch.randn(1, 3, 24, 40)).shape == (1, 11, 24, 40)
    assert BDHUNetConfig(img_size=[24, 40]) == BDHUNetConfig(img_size=(24, 40))  # as config.json returns it
    with pytest.raises(ValueError, match=r"\(36, 32\).*patch_size = 8"):
        model(torch.randn(1, 3, 36, 32))


def test_positions_on_a_smaller_grid_are_antialiased():
    positions = torch.randn(1, 12, 8)
    as_map = positions.mT.unflatten(-1, (3, 4))
    expected = torch.nn.functional.interpolate(as_map, size=(5, 2), mode="bicubic", antialias=True)
    assert torch.equal(interpolate_positions(positions, (3, 4), (5, 2)), expected.flatten(2).mT)


def test_positions_are_interpolated_as_a_map():
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 6), torch.linspace(0, 1, 8), indexing="ij")
    positions = torch.stack((rows, columns)).flatten(1).T[None]  # (1, 48, 2): each holds its own place
    assert interpolate_positions(positions, (6, 8), (6, 8)) is positions
    larger = interpolate_positions(positions, (6, 8), (12, 24))
    assert larger.shape == (1, 288, 2)
    rows, columns = larger[0].T.unflatten(1, (12, 24))
    assert rows.std(1).max() < 1e-4 and columns.std(0).max() < 1e-4  # a row stays a row
    inner = rows[2:-2, 0].diff()
    torch.testing.assert_close(inner, torch.full_like(inner, 0.1), atol=0.01, rtol=0)
    there_and_back = interpolate_positions(larger, (12, 24), (6, 8))
    assert (there_and_back - positions).abs().max() < 0.06


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(img_size=60), "img_size = 60 is not a multiple of patch_size = 8"),
        (dict(img_size=(64, 60)), r"img_size = \(64, 60\)"),
        (dict(img_size=0), "img_size = 0"),
        (dict(patch_size=6, img_size=48), "patch_size = 6 must be 2, 4, 8"),
        (dict(patch_size=1, img_size=48), "patch_size = 1 must be 2, 4, 8"),
        (dict(patch_size=32, n_embd=48, n_head=2), "n_embd = 48 is not a multiple of patch_size = 32"),
        (dict(skips=True, skip_levels=(3,)), "skip_levels = .* must be 2 levels"),
        (dict(skips=True, skip_levels=(7, 2)), "between 1 and n_layer = 6"),
        (dict(skips=True, skip_levels=(0, 2)), "between 1 and n_layer = 6"),
        (dict(patch_size=2, skips=True, skip_levels=()), "skips need a patch_size of 4 or more"),
        (dict(num_classes=0), "num_classes = 0"),
        (dict(bridges="attention"), "bridges = attention needs skip connections: .*--skips"),
        (dict(bridges="attention", decoder="upernet"), "bridges = attention needs skip connections"),
        (dict(decoder="upernet", skips=True), "--no-skips"),
        (dict(decoder="upernet", upernet_levels=(1, 2, 6)), "must be 4 levels"),
        (dict(decoder="upernet", upernet_levels=(0, 2, 4, 6)), "between 1 and n_layer = 6"),
        (dict(decoder="upernet", upernet_levels=(1, 2, 4, 7)), "between 1 and n_layer = 6"),
        (dict(decoder="upernet", upernet_levels=(1, 2, 3, 4)), "must contain the last level, n_layer = 6"),
        (dict(decoder="upernet", upernet_channels=0), "upernet_channels = 0 must be at least 1"),
        (dict(decoder="upernet", img_size=(64, 32)), r"img_size = \(64, 32\) is too small .* above 32"),
        (dict(upernet_levels=(1, 2, 4, 6)), "upernet_levels is for decoder = upernet"),
        (dict(upernet_channels=64), "upernet_channels is for decoder = upernet"),
    ],
)
def test_impossible_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        bdh_unet_config(**fields)


@pytest.mark.parametrize(("patch_size", "levels"), [(2, None), (4, (2,)), (16, (3, 2, 1))])
def test_other_patch_sizes(patch_size, levels):
    model = small_unet(patch_size=patch_size, skips=levels is not None, skip_levels=levels or ())
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 11, 32, 32)


@pytest.mark.parametrize("patch_size", [2, 4, 16, 64])
def test_other_patch_sizes_with_upernet(patch_size):
    model = small_unet(**UPERNET, patch_size=patch_size)
    assert model(torch.randn(1, 3, 64, 128)).shape == (1, 11, 64, 128)


# ---------------------------------------------------------------------------- looking inside


@pytest.mark.parametrize(
    "fields", [{}, dict(rotary="axial"), dict(attention="softmax", rotary="axial"), WITH_BRIDGES, UPERNET], ids=str
)
@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_recorded_scores_are_those_of_the_encoder(fields, size):
    model = small_unet(**fields).double()
    randomised(model.encoder)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    expected, inputs = model(images), []
    hook = model.encoder.level_input.register_forward_hook(lambda module, args, output: inputs.append(output))
    with record(model) as trace:
        outputs = model(images)
    hook.remove()
    assert torch.equal(outputs, expected)
    grid = size[0] // 8, size[1] // 8
    for level in range(3):
        assert torch.equal(trace.inputs[level], inputs[level])
        torch.testing.assert_close(trace.scores(level), model.encoder.attention_weights(inputs[level], level, grid))
    assert trace.scores(0).shape == (2, 2, grid[0] * grid[1], grid[0] * grid[1])
