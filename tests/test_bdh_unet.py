"""BDH-UNet: the encoder is Vision-BDH's, the decoder is the published one, any image size is accepted."""

import pytest
import torch
from torch import nn

from interpretability.common.recorder import record
from models.bdh import layer_norm
from models.bdh_unet import BDHUNetConfig, bdh_unet_config
from models.vision_bdh import VisionBDH, VisionEncoder, interpolate_positions, v2_config
from tests.reference import count, randomised

SMALL = dict(img_size=32, n_layer=3, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4)
WITH_SKIPS = dict(skips=True, skip_levels=(2, 1))
VARIANTS = [
    {},
    WITH_SKIPS,
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
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


def test_the_fast_path_is_the_encoders():
    assert small_unet().encoder.has_fast_path(torch.device("cpu"))
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
    ],
)
def test_impossible_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        bdh_unet_config(**fields)


@pytest.mark.parametrize(("patch_size", "levels"), [(2, None), (4, (2,)), (16, (3, 2, 1))])
def test_other_patch_sizes(patch_size, levels):
    model = small_unet(patch_size=patch_size, skips=levels is not None, skip_levels=levels or ())
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 11, 32, 32)


# ---------------------------------------------------------------------------- looking inside


@pytest.mark.parametrize("fields", [{}, dict(rotary="axial"), dict(attention="softmax", rotary="axial")], ids=str)
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
