"""The segmentation task: its metrics and losses against libraries, what void does, augmentation, batches."""

import dataclasses
import pickle
import random
from unittest import mock

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
import torchmetrics

from training import SegmentationConfig
from tests.camvid_data import write_camvid
from training.augment import JointTransform
from training.data.classes import CAMVID
from training.data.masks import find_masks
from training.data.segmentation import MaskBatches
from training.metrics import Sums, batch_miou, confusion_matrices, metric_of
from training.tasks import at_size_of, dice_loss, median_frequencies, pixel_cross_entropy
from training.views import views_used

VOID = CAMVID.void
TRAIN = dict(epochs=1, batch_size=4, learning_rate=1e-3, weight_decay=0.0)
AUGMENTED = dict(horizontal_flip=0.5, brightness_contrast=0.5, shift_scale_rotate=1.0)
CPU = torch.device("cpu")


def make_config(**fields):
    return SegmentationConfig(**(TRAIN | fields))


def random_maps(n=8, classes=11, size=(6, 7), absent=()):
    """Logits and masks with a tenth of void, some classes nowhere."""
    logits = torch.randn(n, classes, *size)
    logits[:, list(absent)] = -100
    labels = torch.tensor([label for label in range(classes) if label not in absent])
    masks = labels[torch.randint(len(labels), (n, *size))]
    masks[torch.rand(n, *size) < 0.1] = classes
    return logits, masks


def ratios_of(batches, **fields):
    """What the task makes of (logits, masks) pairs, as fit() does."""
    task, sums = make_config(**fields).make_task(), Sums()
    for logits, masks in batches:
        sums.add(task.counts(logits, masks))
    return task.ratios(sums.read())


# ---------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("absent", [(), (3,), (0, 5, 10)])
def test_miou_is_torchmetrics_over_the_whole_part(absent):
    batches = [random_maps(n, absent=absent) for n in (4, 4, 3)]
    ratios = ratios_of(batches)
    jaccard = torchmetrics.JaccardIndex("multiclass", num_classes=11, ignore_index=VOID)
    by_class = torchmetrics.JaccardIndex("multiclass", num_classes=11, ignore_index=VOID, average="none")
    right = torchmetrics.Accuracy("multiclass", num_classes=11, ignore_index=VOID, average="micro")
    for logits, masks in batches:
        for metric in (jaccard, by_class, right):
            metric.update(logits, masks)
    assert ratios["miou"] == pytest.approx(jaccard.compute().item(), abs=1e-6)
    assert ratios["pixel_accuracy"] == pytest.approx(right.compute().item(), abs=1e-6)
    for label, name in enumerate(CAMVID.names):
        if label in absent:
            assert ratios[f"iou_{name}"] is None  # neither there nor predicted: it is not part of the mean
        else:
            assert ratios[f"iou_{name}"] == pytest.approx(by_class.compute()[label].item(), abs=1e-6)


def test_confusion_matrices_count_each_image_by_truth_and_prediction():
    truth = torch.tensor([[[0, 0, 1], [2, 2, 3]], [[3, 3, 3], [1, 0, 2]]])  # 3 is void
    predicted = torch.tensor([[[0, 1, 1], [2, 0, 2]], [[0, 1, 2], [1, 1, 2]]])
    first, second = confusion_matrices(predicted, truth, 3).tolist()
    assert first == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]
    assert second == [[0, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_the_summary_says_what_masks_were_counted():
    assert views_used(make_config(eval_full_size=True, eval_flip=True)) == {"eval_flip": True, "eval_full_size": True}
    assert views_used(make_config()) == {}


def test_batches_without_a_labelled_pixel_do_not_count():
    logits, masks = random_maps()
    void = (logits, torch.full_like(masks, VOID))
    assert ratios_of([(logits, masks), void])["miou_batch"] == ratios_of([(logits, masks)])["miou_batch"] > 0
    assert ratios_of([void])["miou_batch"] == 0


def test_batch_miou_is_the_mean_over_the_classes_that_the_masks_hold():
    confusion = torch.tensor([[2, 2, 0], [0, 3, 1], [0, 0, 0]])  # the third class is predicted once, and never there
    assert batch_miou(confusion).item() == pytest.approx((2 / 4 + 3 / 6) / 2)
    assert batch_miou(torch.zeros(3, 3)) == 0


def test_the_published_metric_is_a_mean_over_batches():
    logits, masks = random_maps(16)
    logits[:4] += 5 * F.one_hot(masks[:4], 12)[..., :11].movedim(-1, 1)  # the first batch is easy
    ratios = ratios_of(list(zip(logits.split(4), masks.split(4), strict=True)))
    predicted = logits.argmax(1)
    by_batch = []
    for here in torch.arange(16).split(4):
        ious = []
        for label in masks[here][masks[here] != VOID].unique():
            of, said = masks[here] == label, (predicted[here] == label) & (masks[here] != VOID)
            ious.append((of & said).sum() / (of | said).sum())
        by_batch.append(torch.stack(ious).mean())
    assert ratios["miou_batch"] == pytest.approx(torch.stack(by_batch).mean().item(), abs=1e-6)
    assert abs(ratios["miou_batch"] - ratios["miou"]) > 0.01  # they are not the same thing


def test_every_column_has_a_name_and_a_unit():
    ratios = ratios_of([random_maps(absent=(3,))])
    assert [metric_of(key).key for key in ratios] == list(ratios)
    assert metric_of("iou_sky").show(0.5) == "50.00%" and metric_of("iou_sky").show(None) == "none"
    with pytest.raises(KeyError):
        metric_of("iuo_sky")


# ---------------------------------------------------------------------------- losses


@pytest.mark.parametrize("absent", [(), (2, 7)])
def test_dice_is_that_of_segmentation_models_pytorch(absent):
    logits, masks = random_maps(absent=absent)
    logits.requires_grad_()
    loss, theirs = dice_loss(logits, masks), smp.losses.DiceLoss("multiclass", ignore_index=VOID)(logits, masks)
    torch.testing.assert_close(loss, theirs)
    mine, expected = (torch.autograd.grad(each, logits)[0] for each in (loss, theirs))
    torch.testing.assert_close(mine, expected)


def test_cross_entropy_is_pytorchs():
    logits, masks = random_maps()
    torch.testing.assert_close(pixel_cross_entropy(logits, masks), F.cross_entropy(logits, masks, ignore_index=VOID))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_mixes_both(share):
    logits, masks = random_maps()
    loss = make_config(dice_weight=share).make_task().loss(logits, masks)
    torch.testing.assert_close(
        loss, (1 - share) * pixel_cross_entropy(logits, masks) + share * dice_loss(logits, masks)
    )


def test_a_sure_and_right_prediction_costs_nothing():
    _, masks = random_maps()
    logits = 50.0 * F.one_hot(masks, 12)[..., :11].movedim(-1, 1)
    assert make_config().make_task().loss(logits, masks) < 1e-6
    assert make_config().make_task().loss(-logits, masks) > 1


def test_void_changes_nothing():
    """Whatever the model says of void pixels: the same loss, the same gradients elsewhere, none there, same metrics."""
    logits, masks = random_maps()
    is_void = masks == VOID
    task, results = make_config().make_task(), []
    for noise in (0.0, 30.0):
        changed = (logits + noise * torch.randn_like(logits) * is_void.unsqueeze(1)).requires_grad_()
        loss = task.loss(changed, masks)
        (gradient,) = torch.autograd.grad(loss, changed)
        results.append((loss, gradient, ratios_of([(changed.detach(), masks)])))
    (loss, gradient, ratios), (loss_2, gradient_2, ratios_2) = results
    assert is_void.sum() > 10 and (gradient.movedim(1, -1)[is_void] == 0).all() and gradient.abs().sum() > 0
    torch.testing.assert_close(loss, loss_2)
    torch.testing.assert_close(gradient, gradient_2)
    assert ratios == ratios_2


def test_a_batch_of_void_alone_costs_nothing():
    logits = torch.randn(2, 11, 4, 4, requires_grad=True)
    loss = make_config().make_task().loss(logits, torch.full((2, 4, 4), VOID))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_predictions_are_brought_to_the_size_of_the_masks():
    logits, masks = torch.randn(2, 11, 4, 6), torch.randint(12, (2, 8, 18))
    enlarged = F.interpolate(logits, size=(8, 18), mode="bilinear", align_corners=False)
    assert torch.equal(at_size_of(masks, logits), enlarged)
    assert at_size_of(masks[:, :4, :6], logits) is logits
    half = logits.bfloat16()  # is enlarged in float32
    assert torch.equal(at_size_of(masks, half), at_size_of(masks, half.float()))
    assert ratios_of([(logits, masks)]) == ratios_of([(enlarged, masks)])


# ---------------------------------------------------------------------------- augmentation


def coloured_blocks(rng, labels=(0, 4, 10), size=(48, 64), block=16):
    """A mask of blocks, and the image that shows each label as a grey value of its own."""
    small = rng.choice(labels, (size[0] // block, size[1] // block))
    mask = np.kron(small, np.ones((block, block))).astype(np.uint8)
    return np.repeat((50 + 20 * mask)[..., None], 3, axis=2).astype(np.uint8), mask


def test_image_and_mask_move_together():
    transform = JointTransform(make_config(**(AUGMENTED | dict(brightness_contrast=0.0))), VOID, (32, 48))
    image, mask = coloured_blocks(np.random.default_rng(0), size=(96, 128))
    wrong, still = [], []
    for seed in range(8):
        moved, moved_mask = transform(image, mask, seed)
        expected = np.where(moved_mask == VOID, 0, 50 + 20 * moved_mask.astype(int))
        wrong.append(
            (np.abs(moved[..., 0].astype(int) - expected) > 10).mean()
        )  # where blocks meet, the image is blurred
        still.append((np.abs(image[..., 0].astype(int) - expected) > 10).mean())
    assert max(wrong) < 0.07
    assert np.mean(still) > 0.3  # against the image as it was, the test would fail


def test_labels_are_never_mixed_and_what_comes_into_view_is_void():
    """Between 0 and 10, interpolation would make all others; fill 0 would be sky."""
    transform = JointTransform(make_config(**AUGMENTED), VOID, (32, 48))
    image, mask = coloured_blocks(np.random.default_rng(0), labels=(0, 10))
    seen, outside = set(), 0
    for seed in range(30):
        _, moved = transform(image, mask, seed)
        seen |= set(np.unique(moved))
        outside += (moved == VOID).sum()
    assert seen == {0, 10, VOID} and outside > 0
    solid = np.full_like(mask, 10)
    assert all(set(np.unique(transform(image, solid, seed)[1])) <= {10, VOID} for seed in range(30))


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_brightness_changes_the_image_alone_and_only_if_asked_for(probability):
    transform = JointTransform(make_config(brightness_contrast=probability), VOID, (32, 48))
    image, mask = coloured_blocks(np.random.default_rng(0))
    for seed in range(5):
        changed, same_mask = transform(image, mask, seed)
        assert np.array_equal(changed, image) == (probability == 0) and np.array_equal(same_mask, mask)


def test_shifts_angles_and_scales_reach_their_limits():
    """Two marks 100 pixels apart say how an image was moved (6.25 %), turned (15 degrees) and scaled (10 %)."""
    size = (200, 200)
    transform = JointTransform(make_config(shift_scale_rotate=1.0), VOID, size)
    image, mask = np.zeros((*size, 3), np.uint8), np.zeros(size, np.uint8)
    mask[95:106, 45:56], mask[95:106, 145:156] = 1, 2
    found = []
    for seed in range(300):
        _, moved = transform(image, mask, seed)
        left, right = (np.argwhere(moved == label).mean(0) for label in (1, 2))
        rise, run = right - left
        turned, scaled = np.degrees(np.arctan2(rise, run)), np.hypot(rise, run) / 100 - 1
        found.append([*((left + right) / 2 - 100) / 200, turned / 15, scaled])
    for numbers, limit in zip(np.transpose(found), (0.0625, 0.0625, 1.0, 0.1), strict=True):
        assert -1.15 * limit < numbers.min() < -0.85 * limit and 0.85 * limit < numbers.max() < 1.15 * limit


def test_contrast_changes_by_a_fifth_at_most():
    transform = JointTransform(make_config(brightness_contrast=1.0), VOID, (32, 48))
    image, mask = np.full((32, 48, 3), 100, np.uint8), np.zeros((32, 48), np.uint8)
    image[:, 24:] = 140
    changed = [transform(image, mask, seed)[0].astype(float) for seed in range(200)]
    contrast = [abs(each[0, 47, 0] - each[0, 0, 0]) / 40 for each in changed]
    assert 0.75 < min(contrast) < 0.85 and 1.15 < max(contrast) < 1.25


def test_draws_follow_from_the_seed_and_are_independent_of_each_other():
    """Flips and changes of brightness each come half of the time, together a quarter."""
    transform = JointTransform(make_config(horizontal_flip=0.5, brightness_contrast=0.5), VOID, (32, 48))
    image, mask = coloured_blocks(np.random.default_rng(1))
    assert not np.array_equal(mask, mask[:, ::-1])
    flipped, changed = [], []
    for seed in range(400):
        random.seed(0)  # draws of others do not matter
        moved, moved_mask = transform(image, mask, seed)
        again, _ = transform(image, mask, seed)
        assert np.array_equal(moved, again)
        flipped.append(np.array_equal(moved_mask, mask[:, ::-1]))
        changed.append(not np.array_equal(moved[:, ::-1] if flipped[-1] else moved, image))
    flipped, changed = np.array(flipped), np.array(changed)
    for share, expected in ((flipped.mean(), 0.5), (changed.mean(), 0.5), ((flipped & changed).mean(), 0.25)):
        assert abs(share - expected) < 0.11  # over four standard deviations


def test_workers_that_are_not_forked_can_be_given_it():
    transform = JointTransform(make_config(**AUGMENTED), VOID, (32, 48))
    copy = pickle.loads(pickle.dumps(transform))
    image, mask = coloured_blocks(np.random.default_rng(2))
    for one, other in zip(transform(image, mask, 3), copy(image, mask, 3), strict=True):
        assert np.array_equal(one, other)


# ---------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def camvid(tmp_path_factory):
    """Made-up images of 48 x 32 pixels: 7 to train on and 5 to validate with."""
    folder = tmp_path_factory.mktemp("data_camvid")
    write_camvid(folder, n_train=7, n_val=5, size=(48, 32))
    return folder


def make_batches(folder, img_size=16, num_workers=0, **fields):
    files = find_masks("camvid", folder)
    return MaskBatches(files, make_config(**(AUGMENTED | fields)), img_size, CPU, num_workers)


def same(batches, others):
    batches, others = list(batches), list(others)
    return len(batches) == len(others) and all(
        torch.equal(a, b) for pair in zip(batches, others, strict=True) for a, b in zip(*pair, strict=True)
    )


def test_batches_are_ready_for_the_model(camvid):
    data = make_batches(camvid, img_size=(16, 24))
    assert [data.size(part) for part in ("train", "val", "test")] == [7, 5, 0]
    shapes = [(tuple(images.shape), tuple(masks.shape)) for images, masks in data.train_batches(0)]
    assert shapes == [((n, 3, 16, 24), (n, 16, 24)) for n in (4, 3)]
    for images, masks in [*data.train_batches(0), *data.eval_batches("val")]:
        assert images.dtype == torch.float32 and -1 <= images.min() < images.max() <= 1
        assert masks.dtype == torch.int64 and masks.min() >= 0 and masks.max() <= VOID
    assert [len(images) for images, _ in data.eval_batches("val")] == [4, 1]
    assert list(data.eval_batches("test")) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(camvid, workers):
    alone, together = make_batches(camvid), make_batches(camvid, num_workers=workers)
    for epoch in (0, 1, 0):  # the workers stay from epoch to epoch
        assert same(alone.train_batches(epoch), together.train_batches(epoch))


def test_batches_follow_from_seed_and_epoch_alone(camvid):
    data = make_batches(camvid)
    first = list(data.train_batches(0))
    torch.rand(3), np.random.rand(3), random.random()
    before = torch.random.get_rng_state()
    assert same(first, data.train_batches(0)) and same(first, make_batches(camvid).train_batches(0))
    assert torch.equal(before, torch.random.get_rng_state())  # dropout follows PyTorch's own generator
    assert not same(first, data.train_batches(1)) and not same(first, make_batches(camvid, seed=1).train_batches(0))


def test_validation_images_are_never_augmented(camvid):
    data, plain = (make_batches(camvid, **fields) for fields in ({}, dict.fromkeys(AUGMENTED, 0.0)))
    assert same(data.eval_batches("val"), plain.eval_batches("val"))
    assert not same(data.train_batches(0), plain.train_batches(0))


def test_an_epoch_has_every_image_once(camvid):
    data = make_batches(camvid, **dict.fromkeys(AUGMENTED, 0.0))
    images = torch.cat([images for images, _ in data.train_batches(3)])
    in_order = torch.from_numpy(data.parts["train"].images).permute(0, 3, 1, 2) / 127.5 - 1
    distances = (images[:, None] - in_order[None]).abs().amax((2, 3, 4))
    assert sorted(distances.argmin(1).tolist()) == list(range(7)) and distances.amin(1).max() < 1e-6
    assert distances.argmin(1).tolist() != list(range(7))


def test_a_limit_draws_some_of_the_training_images(camvid):
    data = make_batches(camvid, train_limit=3)
    assert [data.size(part) for part in ("train", "val")] == [3, 5]
    every = make_batches(camvid).parts["train"].images
    places = [[np.array_equal(each, other) for other in every].index(True) for each in data.parts["train"].images]
    assert places == sorted(set(places))
    images = find_masks("camvid", camvid).description["images"]
    assert images["train"] == 7  # the data are the same, whatever part of them is used


def test_a_limit_draws_by_the_seed(camvid):
    drawn = [make_batches(camvid, train_limit=3, seed=seed).parts["train"].images.tobytes() for seed in range(4)]
    assert len(set(drawn)) > 1


def test_the_loss_weights_classes_by_the_training_masks(camvid):
    task, trial = make_config(class_weighting="median_frequency", dice_weight=0.0).make_task(), mock.Mock()
    trial.model.img_size, trial.options.num_workers = 16, 0
    data = task.load(find_masks("camvid", camvid), None, trial, CPU)
    weights = median_frequencies(data.parts["train"].masks, 11)
    logits, masks = random_maps()
    torch.testing.assert_close(task.loss(logits, masks), pixel_cross_entropy(logits, masks, weights))


def test_masks_of_their_own_size(camvid):
    data = make_batches(camvid, eval_full_size=True)
    assert [tuple(masks.shape) for _, masks in data.eval_batches("val")] == [(4, 32, 48), (1, 32, 48)]
    assert all(images.shape[2:] == (16, 16) for images, _ in data.eval_batches("val"))
    assert all(masks.shape[1:] == (16, 16) for _, masks in data.train_batches(0))
    files = find_masks("camvid", camvid)
    masks = torch.cat([masks for _, masks in data.eval_batches("val")])
    assert np.array_equal(masks[3], files.read_mask(files.pairs["val"][3].mask))


def test_a_batch_holds_masks_of_one_size(camvid):
    data = make_batches(camvid, eval_full_size=True)
    full = data.parts["val"].full_masks
    full[1], full[2] = full[1][:20], full[2][:20]
    sizes = [tuple(masks.shape) for _, masks in data.eval_batches("val")]
    assert sizes == [(1, 32, 48), (2, 20, 48), (2, 32, 48)]
    assert sum(len(images) for images, _ in data.eval_batches("val")) == 5


def test_the_fields_are_checked():
    for name in ("dice_weight", "horizontal_flip", "brightness_contrast", "shift_scale_rotate"):
        for value in (-0.1, 1.1):
            with pytest.raises(ValueError, match=f"{name} = {value} must be between 0 and 1"):
                make_config(**{name: value})
    with pytest.raises(ValueError, match="train_limit = 0 must be at least 1"):
        make_config(train_limit=0)
    assert "val_fraction" not in {field.name for field in dataclasses.fields(SegmentationConfig)}
