"""Schedules, augmentations and fields of the recipe, each held to an independent computation."""

import dataclasses
import math
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import nn

from training import (
    ClassificationConfig,
    Experiment,
    PretrainingConfig,
    RunOptions,
    SegmentationConfig,
    UserError,
    fit,
    randaugment,
)
from analysis.reading import read_runs
from models.baselines import ViTConfig
from models.bdh_unet import bdh_unet_config
from models.vision_bdh import v2_config, v3_config
from tests.camvid_data import write_camvid
from tests.trials import generator, make_train, resumed
from training.augment import JointTransform, PadAndCrop, RandomErasing
from training.contracts import check_source
from training.mixing import Mix, SmoothLabels
from training.optimiser import rate_factor
from training.runs import load_model
from training.tasks import median_frequencies, pixel_cross_entropy


def test_schedules():
    def at(step, shape):
        return rate_factor(step, 1000, 100, shape)

    assert [at(50, shape) for shape in ("cosine", "linear", "constant", "trapezoid")] == [0.5] * 4
    assert at(550, "cosine") == pytest.approx((1 + math.cos(math.pi / 2)) / 2) and at(550, "linear") == 0.5
    assert at(999, "constant") == 1 and at(800, "trapezoid") == 1 and at(900, "trapezoid") == 0.5
    assert at(1000, "linear") == at(1000, "trapezoid") == 0


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        (dict(adamw_learning_rate=0.1), "adamw_learning_rate"),
        (dict(momentum=0.9), "momentum"),
        (dict(optimizer="sgd", betas=(0.8, 0.9)), "betas"),
        (dict(ema=1.0), "ema"),
        (dict(crop_padding=4, crop_scale_min=0.8), "crop_padding"),
        (dict(randaugment_magnitude=31), "randaugment_magnitude"),
        (dict(repeat_augment=9), "repeat_augment"),
        (dict(label_smoothing=1.0), "label_smoothing"),
    ],
)
def test_fields_are_refused_where_they_make_no_sense(fields, word):
    with pytest.raises(ValueError, match=word):
        make_train(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        dict(max_grad_norm=math.inf),
        dict(learning_rate=math.inf),
        dict(model=dict(residual="true_pre", update_gain=math.inf)),
    ],
    ids=str,
)
def test_an_infinite_number_is_refused_before_a_run_that_could_not_be_read(fields, experiment):
    trial = experiment(**fields)
    with pytest.raises(UserError, match="= inf must be finite"):
        fit(trial)
    assert not trial.folder.exists()


def test_shifts_beyond_an_image_are_refused(experiment):
    trial = experiment(crop_padding=32)
    with pytest.raises(UserError, match=r"--crop-padding 32 .*32 x 32 pixels.* less than 32, as 4"):
        fit(trial)
    assert not trial.folder.exists()


@pytest.mark.parametrize("fields", [dict(repeat_augment=3), dict(randaugment_magnitude=15)])
def test_settings_refused_today_are_still_read_in_stored_runs(fields, experiment):
    trial = experiment(epochs=1, **fields)
    with pytest.raises(UserError, match=next(iter(fields))):
        fit(trial)
    assert not trial.folder.exists()
    with mock.patch.object(ClassificationConfig, "check_new"):  # as a version that did not refuse it
        fit(dataclasses.replace(trial, train=dataclasses.replace(trial.train, epochs=2)))
    load_model(trial.folder)
    (trial.folder / "summary.json").unlink()
    (trial.folder / "previous.pt").replace(trial.folder / "last.pt")
    fit(resumed(dataclasses.replace(trial, train=dataclasses.replace(trial.train, epochs=2))))
    assert len(read_runs([trial.folder])) == 1


@pytest.mark.parametrize("train_val", [False, True])
def test_a_limit_above_the_number_of_images_is_refused(train_val):
    source = mock.Mock(description={"name": "camvid", "images": {"train": 6, "val": 2}})
    there = 6 + 2 * train_val
    train = SegmentationConfig(dataset="camvid", epochs=1, batch_size=2, learning_rate=1e-3, weight_decay=0.0)
    train = dataclasses.replace(train, train_val=train_val, train_limit=there)
    check_source(train, source)
    with pytest.raises(UserError, match=f"--train-limit {there + 1} is above the number of training images, {there}"):
        check_source(dataclasses.replace(train, train_limit=there + 1), source)


def test_pretraining_has_no_labels_to_mix():
    with pytest.raises(ValueError, match="mixup"):
        PretrainingConfig(**(dataclasses.asdict(make_train()) | {"mixup": 0.8}))


@pytest.mark.parametrize(
    "config",
    [
        v2_config(n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, dropout=0.0, drop_path=0.5),
        v3_config(n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, dropout=0.0, drop_path=0.5),
        ViTConfig(n_layer=2, n_embd=12, mlp_dim=24, drop_path=0.5),
    ],
    ids=["v2", "v3", "vit"],
)
def test_drop_path_skips_levels_in_proportion_to_their_depth_and_only_in_training(config):
    model, images = config.build(), torch.randn(1, 3, 32, 32).expand(800, -1, -1, -1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    plain = dataclasses.replace(config, drop_path=0.0).build()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(images[:2]), plain.eval()(images[:2]))
    torch.manual_seed(0)
    outputs = model.train()(images)
    groups = {tuple(row.tolist()) for row in torch.cdist(outputs, outputs) < 1e-2 * outputs.std()}
    shares = sorted(sum(group) / 800 for group in groups)  # both levels, one of them, none kept: p = 0.25 and 0.5
    assert shares == pytest.approx([0.125, 0.125, 0.375, 0.375], abs=0.06)


def test_drop_path_counts_the_blocks_of_a_hybrid_as_levels():
    sizes = dict(n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4)
    model = v2_config(**sizes, drop_path=0.4, blocks_before=1, blocks_after=1).build()
    around = [block.drop_path2.drop_prob for block in (*model.blocks_before, *model.blocks_after)]
    assert around == pytest.approx([0.1, 0.4])
    assert [model.config.drop_probability(level) for level in (0, 1)] == pytest.approx([0.2, 0.3])


# ---------------------------------------------------------------------------- augmentations


@pytest.mark.parametrize(
    ("name", "sign", "library"),
    [
        ("brightness", 1, lambda u: TF.adjust_brightness(u, 1.45)),
        ("saturation", -1, lambda u: TF.adjust_saturation(u, 0.55)),
        ("contrast", -1, lambda u: TF.adjust_contrast(u, 0.55)),
        ("sharpness", 1, lambda u: TF.adjust_sharpness(u, 1.45)),
        ("posterize", 1, lambda u: TF.posterize(u, 6)),
        ("solarize", 1, lambda u: TF.solarize(u, 127.5)),
        ("autocontrast", 1, TF.autocontrast),
        ("equalize", 1, TF.equalize),
    ],
)
def test_colour_operations_are_the_librarys(name, sign, library):
    images = torch.randint(40, 200, (6, 3, 16, 16), generator=generator(), dtype=torch.uint8)
    images[0] = 77  # a constant image
    ours = randaugment.OPERATIONS[name](images.float(), 0.5, torch.full((6,), float(sign)))
    assert (ours - library(images).float()).abs().max() <= 1  # a grey level, where the library rounds otherwise


@pytest.mark.parametrize(("magnitude", "bits"), [(3, 8), (5, 7), (9, 7), (12, 6), (20, 5), (30, 4)])
def test_posterize_keeps_fewer_bits_at_larger_magnitudes(magnitude, bits):
    images = torch.randint(256, (2, 3, 8, 8), generator=generator(), dtype=torch.uint8)
    ours = randaugment.OPERATIONS["posterize"](images.float(), magnitude / 30, torch.ones(2))
    assert torch.equal(ours, TF.posterize(images, bits).float())


@pytest.mark.parametrize("name", randaugment.GEOMETRIC)
def test_geometric_operations_are_the_librarys(name):
    images = torch.rand(4, 3, 21, 21, generator=generator()) * 255
    shear, shift = math.degrees(math.atan(0.15)), math.trunc(0.5 * 150 / 331 * 21)
    angle, translate, shears = {
        "rotate": (15.0, [0, 0], [0.0, 0.0]),
        "translate_x": (0.0, [shift, 0], [0.0, 0.0]),
        "translate_y": (0.0, [0, shift], [0.0, 0.0]),
        "shear_x": (0.0, [0, 0], [-shear, 0.0]),
        "shear_y": (0.0, [0, 0], [0.0, -shear]),
    }[name]
    bilinear = TF.InterpolationMode.BILINEAR
    expected = TF.affine(images, angle, translate, 1.0, shears, interpolation=bilinear, fill=127.5)
    ours = randaugment.OPERATIONS[name](images, 0.5, torch.ones(4))
    inner = (..., slice(5, -5), slice(5, -5))  # the border blends with grey in its own way
    assert torch.allclose(ours[inner], expected[inner], atol=0.05)


def test_operations_follow_each_other_on_a_black_border():
    images = torch.zeros(4, 3, 32, 32)
    images[:, :, 10:20, 10:20] = 255
    rotated, sign = images, torch.ones(4)
    for name in ("rotate", "posterize", "equalize"):
        rotated = randaugment.OPERATIONS[name](rotated, 0.3, sign)
        assert rotated.min() >= 0 and rotated.max() <= 255, name


def test_randaugment_draws_for_each_image_and_stays_in_range():
    step = randaugment.RandAugment(number=2, magnitude=15)
    operations, signs = step.draw(500, 32, 32, generator())
    assert set(operations.flatten().tolist()) == set(range(14)) and set(signs.flatten().tolist()) == {-1, 1}
    images = torch.rand(500, 3, 16, 16, generator=generator()) * 2 - 1
    augmented, labels = step.apply(images, torch.arange(500), operations, signs)
    assert augmented.abs().max() <= 1 + 1e-6 and torch.equal(labels, torch.arange(500))
    alone, _ = step.apply(images[7:8], labels[7:8], operations[7:8], signs[7:8])
    assert torch.allclose(alone, augmented[7:8], atol=1e-5)


def test_mixup_and_cutmix_mix_targets_as_they_mix_images():
    n, classes = 6, 4
    images, labels = torch.rand(n, 3, 8, 8, generator=generator()), torch.tensor([0, 1, 2, 3, 0, 1])
    one_hot = F.one_hot(labels, classes).float()
    mixup = Mix(0.8, 0.0, classes, batch_size=n)
    share, boxes, cut = mixup.draw(n, 8, 8, generator())
    mixed, soft = mixup.apply(images, labels, share, boxes, cut)
    for i in range(n):
        j, own = n - 1 - i, share[i].item()
        assert torch.allclose(mixed[i], own * images[i] + (1 - own) * images[j], atol=1e-6)
        assert torch.allclose(soft[i], own * one_hot[i] + (1 - own) * one_hot[j], atol=1e-6)
    cutmix = Mix(0.0, 1.0, classes, batch_size=n)
    share, boxes, cut = cutmix.draw(n, 8, 8, generator(1))
    mixed, soft = cutmix.apply(images, labels, share, boxes, cut)
    for i in range(n):
        from_partner = (mixed[i] == images[n - 1 - i]).all(0)
        assert torch.equal(mixed[i][:, ~from_partner], images[i][:, ~from_partner])
        assert share[i].item() == pytest.approx(1 - from_partner.float().mean().item(), abs=1e-6)
    assert torch.allclose(soft.sum(1), torch.ones(n))


def test_shares_follow_the_beta_distribution_and_either_is_chosen_by_batch():
    share, _, cut = Mix(0.8, 0.0, 10, 32).draw(20_000, 32, 32, generator())
    assert share.mean() == pytest.approx(0.5, abs=0.01) and share.var() == pytest.approx(
        1 / (4 * (2 * 0.8 + 1)), rel=0.03
    )
    _, _, cut = Mix(0.8, 1.0, 10, 32).draw(3200, 32, 32, generator())
    per_batch = cut.view(100, 32)
    assert (per_batch == per_batch[:, :1]).all() and 30 < per_batch[:, 0].sum() < 70


def test_class_weights_are_median_frequencies():
    masks = np.array([[[0, 0, 0, 1]], [[0, 0, 3, 3]], [[2, 2, 2, 2]]], dtype=np.uint8)  # 3 is void
    frequencies = np.array([5 / 6, 1 / 4, 4 / 4])
    assert median_frequencies(masks, 3).tolist() == pytest.approx(np.median(frequencies) / frequencies)
    logits, truth = torch.randn(2, 3, 4, 5), torch.randint(4, (2, 4, 5))
    weights = torch.tensor([0.5, 1.0, 2.0])
    expected = F.cross_entropy(logits, truth, weight=weights, ignore_index=3)  # the library's weighted mean
    assert pixel_cross_entropy(logits, truth, weights).item() == pytest.approx(expected.item(), rel=1e-5)


def test_scaled_crops_keep_the_size_and_pad_with_void():
    config = SegmentationConfig(
        epochs=1, batch_size=1, learning_rate=1e-3, weight_decay=0.0, scale_min=0.5, scale_max=2.0
    )
    transform = JointTransform(config, void=11, img_size=(24, 32))
    image, mask = np.full((24, 32, 3), 200, np.uint8), np.full((24, 32), 4, np.uint8)
    padded = 0
    for seed in range(40):
        scaled, labels = transform(image, mask, seed)
        assert scaled.shape == (24, 32, 3) and labels.shape == (24, 32) and set(np.unique(labels)) <= {4, 11}
        assert (scaled[labels == 11] == 0).all()
        padded += (labels == 11).any()
    assert 5 < padded < 35


def test_training_on_both_parts_tests_the_last_epoch(tmp_path):
    write_camvid(tmp_path / "data_camvid", n_train=6, n_val=3)
    train = SegmentationConfig(epochs=3, batch_size=3, learning_rate=1e-2, weight_decay=0.0, train_val=True)
    model = bdh_unet_config(img_size=(32, 48), n_layer=1, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4)
    options = RunOptions(data_dir=tmp_path, runs_dir=tmp_path / "runs", device="cpu", num_workers=0)
    with pytest.raises(UserError, match="--train-val tests on the test set"):
        fit(Experiment("both", model, train, options))
    for kind in ("", "annot"):
        shutil.copytree(tmp_path / f"data_camvid/val{kind}", tmp_path / f"data_camvid/test{kind}")
    summary = fit(Experiment("both", model, train, options))
    assert summary["images"] == {"train": 9, "val": 3, "test": 3}
    assert summary["best"]["epoch"] == 3 and summary["test"] is not None


def test_soft_targets_are_met_by_their_heaviest_class():
    targets = torch.tensor([[0.6, 0.4, 0.0], [0.9, 0.1, 0.0], [0.0, 0.3, 0.7]])
    assert make_train().make_task().counts(torch.eye(3), targets)["correct"] == 2


def test_label_smoothing_is_the_librarys():
    logits, labels = torch.randn(5, 7), torch.randint(7, (5,))
    _, soft = SmoothLabels(0.1, 7).apply(logits, labels)
    assert F.cross_entropy(logits, soft).item() == pytest.approx(
        F.cross_entropy(logits, labels, label_smoothing=0.1).item(), rel=1e-6
    )


def test_padding_shifts_over_black_and_erasing_replaces_a_box_by_grey():
    images = torch.rand(3, 2, 6, 6, generator=generator())
    shifts = torch.tensor([[0, 0], [2, -1], [-2, 2]])
    padded, _ = PadAndCrop(2).apply(images, torch.zeros(3), shifts)
    for image, shifted, (dy, dx) in zip(images, padded, shifts.tolist(), strict=True):
        expected = F.pad(image, (2, 2, 2, 2), value=-1.0)[:, 2 + dy : 8 + dy, 2 + dx : 8 + dx]
        assert torch.equal(shifted, expected)
    (drawn,) = PadAndCrop(2).draw(500, 6, 6, generator())
    assert [row.unique().tolist() for row in drawn.T] == [[-2, -1, 0, 1, 2]] * 2
    step = RandomErasing(0.5)
    boxes, chosen = step.draw(400, 16, 16, generator())
    images = torch.rand(400, 3, 16, 16, generator=generator()) + 0.5
    erased, _ = step.apply(images, torch.zeros(400), boxes, chosen)
    area = (erased == 0).all(1).float().mean((1, 2))
    assert torch.equal(area > 0, chosen) and 0.4 < chosen.float().mean() < 0.6 and area.max() < 0.5
    boxes, chosen = RandomErasing(1.0).draw(20_000, 16, 16, generator())
    full = boxes[:, 2:] == 16  # as wide or as high as the image is a box, both together are the whole image
    assert torch.equal(chosen, ~full.all(1)) and (full.any(1) & chosen).any()


def test_repeated_augmentation_sees_as_many_samples_of_fewer_images(experiment_in, tmp_path, data_dir):
    from training.data import ImageBatches, load_dataset, split_train

    dataset = load_dataset("cifar10", data_dir)
    split = split_train(dataset.train_labels, 0.2, None, 0)
    config = make_train(repeat_augment=2, batch_size=16)
    batches = ImageBatches(dataset, split, config, 16, torch.device("cpu"))
    first, _ = next(iter(batches.train_batches(0)))
    assert torch.equal(first[0::2], first[1::2])  # without augmentation the copies are equal
    total = torch.cat([labels for _, labels in batches.train_batches(0)])
    assert len(total) == batches.size("train")
