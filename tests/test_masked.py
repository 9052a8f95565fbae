"""Masked-image pretraining: what is masked, what is predicted, and that a segmentation model takes the encoder."""

import json
import math

import pytest
import torch

from training import PretrainingConfig
from models.bdh_unet import bdh_unet_config
from models.masked_bdh import MaskedBDHConfig, Reconstruction
from tests.trials import read_metrics
from training.metrics import Sums
from training.start import take_encoder

SMALL = dict(img_size=24, patch_size=8, n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4)  # 9 patches
TRAIN = dict(dataset="cifar10", epochs=1, batch_size=8, learning_rate=1e-3, weight_decay=0.0)


def make_model(**fields):
    torch.manual_seed(0)
    return MaskedBDHConfig(**(SMALL | fields)).build().eval()


def patch(images, index, columns=3, size=8):
    """A view of the pixels of a patch: (B, C, size, size)."""
    row, column = divmod(int(index), columns)
    return images[..., size * row : size * (row + 1), size * column : size * (column + 1)]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(pos_embed=False),
        dict(residual="scaled_pre"),
        dict(patch_size=4),
        dict(stem="conv"),
        dict(blocks_before=1),
    ],
)
def test_only_visible_patches_matter_and_the_truth_is_the_masked_pixels(fields):
    model, images = make_model(**fields), torch.randn(2, 3, 24, 24)
    size = model.config.patch_size
    before = model(images)
    masked = model.draw_masked(2, images.device)[0].tolist()
    assert len(masked) == model.config.n_masked == round(0.6 * (24 // size) ** 2)
    for index in range((24 // size) ** 2):
        changed = images.clone()
        patch(changed, index, 24 // size, size).add_(1.0)
        assert torch.equal(model(changed).predicted, before.predicted) == (index in masked), index
    for place, index in enumerate(masked):
        assert torch.equal(before.truth[:, place], patch(images, index, 24 // size, size).flatten(1))
    # all masked patches have the same token: without positions the model would predict the same for each
    differences = (before.predicted[0, 0] - before.predicted[0, 1]).abs().max()
    assert differences > 1e-4 or not model.config.pos_embed


def test_training_draws_a_mask_for_each_image_and_evaluation_none():
    model, cpu = make_model().train(), torch.device("cpu")
    drawn = model.draw_masked(200, cpu)
    assert all(len(set(row)) == 5 for row in drawn.tolist())
    assert len({frozenset(row) for row in drawn.tolist()}) > 50
    counts = torch.bincount(drawn.flatten(), minlength=9)
    assert (counts - 200 * 5 / 9).abs().max() < 36  # five standard deviations
    model.eval()
    fixed = model.draw_masked(3, cpu)
    assert torch.equal(fixed, model.draw_masked(3, cpu)) and torch.equal(fixed[:1], model.draw_masked(1, cpu))
    assert (fixed == fixed[0]).all()


def test_loss_and_psnr():
    task, sums = PretrainingConfig(**TRAIN).make_task(), Sums()
    for n, error in ((3, 0.5), (1, 0.1)):
        truth = torch.rand(n, 2, 12)
        outputs, labels = Reconstruction(truth + error, truth), torch.zeros(n, dtype=torch.int64)
        loss = task.loss(outputs, labels)
        assert loss.item() == pytest.approx(error, rel=1e-5)
        sums.add({"loss": loss * len(labels), **task.counts(outputs, labels)})
    ratios = task.ratios(sums.read() | {"samples": 4})
    assert sums.read_one("loss") / 4 == pytest.approx((3 * 0.5 + 0.1) / 4, rel=1e-5)
    assert ratios["psnr"] == pytest.approx(10 * math.log10(4 / ((3 * 0.25 + 0.01) / 4)), rel=1e-5)


def test_training_reaches_every_weight():
    model = make_model().train()
    outputs = model(torch.randn(4, 3, 24, 24))
    (outputs.predicted - outputs.truth).abs().mean().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("ratio", "masked"), [(0.0, 0), (1.0, 9), (0.02, 0), (-1.0, -9)])
def test_a_ratio_that_masks_no_or_all_patches_is_refused(ratio, masked):
    with pytest.raises(ValueError, match=f"mask_ratio = {ratio} masks {masked} of 9 patches"):
        MaskedBDHConfig(**SMALL, mask_ratio=ratio)


def test_the_script_learns_and_a_unet_takes_its_encoder(call_script, data_dir, tmp_path, capsys):
    sizes = dict(n_layer=1, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (sizes | dict(patch_size=8)).items()]
    flags += "--epochs 8 --batch-size 16 --learning-rate 1e-2 --device cpu --name masked".split()
    assert call_script("pretrain_bdh.py", *flags, "--data-dir", data_dir, "--runs-dir", tmp_path) == 0
    folder = tmp_path / "masked" / "seed0"
    rows = read_metrics(folder)
    assert rows[-1]["val_psnr"] > rows[0]["val_psnr"] + 1  # each image has one colour
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["test"]) == {"loss", "psnr"} and "PSNR" in capsys.readouterr().out

    unet = bdh_unet_config(img_size=(48, 64), **sizes).build()
    origin = take_encoder(unet.encoder, folder / "best.pt")
    assert origin["drawn"] == [] and "positions interpolated from 4 x 4" in capsys.readouterr().out
