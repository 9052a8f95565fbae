"""Augmentation against torchvision's, and the batches that training and validation get."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2.functional import horizontal_flip, resized_crop

from training import ClassificationConfig, augment, seeds
from tests.trials import generator
from training.data import DataSet, ImageBatches, Split

CROPS_AND_FLIPS = dict(crop_scale_min=0.5, horizontal_flip=True)


# ---------------------------------------------------------------------------- crops and flips


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-4)])
@pytest.mark.parametrize("height, width", [(32, 32), (33, 17), (7, 7), (20, 45)])
def test_crop_and_flip_is_torchvisions_resized_crop(height, width, dtype, tolerance):
    n = 60
    images = torch.rand(n, 3, height, width, generator=generator(), dtype=dtype) * 2 - 1
    boxes = augment.draw_boxes(n, height, width, (0.05, 1.0), generator(1))
    # the extremes: the whole image, single pixels in two corners, a row, a column
    boxes[:5] = torch.tensor(
        [[0, 0, height, width], [0, 0, 1, 1], [height - 1, width - 1, 1, 1], [2, 0, 1, width], [0, 3, height, 1]]
    )
    flips = torch.arange(n) % 2 == 0
    ours = torch.cat([augment.crop_and_flip(images, boxes, flips), augment.crop_and_flip(images, boxes, ~flips)])
    for i, image in enumerate(ours):
        box = boxes[i % n].tolist()
        expected = resized_crop(
            images[i % n], *box, size=[height, width], interpolation=InterpolationMode.BILINEAR, antialias=True
        )
        if flips[i % n] == (i < n):
            expected = horizontal_flip(expected)
        torch.testing.assert_close(image, expected, rtol=0, atol=tolerance, msg=lambda m, box=box: f"box {box}: {m}")


@pytest.mark.parametrize("height, width", [(32, 32), (8, 8), (24, 40), (5, 3)])
@pytest.mark.parametrize("scale_min", [0.02, 0.8, 1.0])
def test_boxes_lie_inside_the_image(height, width, scale_min):
    top, left, h, w = augment.draw_boxes(5000, height, width, (scale_min, 1.0), generator()).unbind(1)
    assert min(top.min(), left.min()) >= 0 and min(h.min(), w.min()) >= 1
    assert (top + h).max() <= height and (left + w).max() <= width


@pytest.mark.parametrize("height, width, scale_min", [(32, 32, 0.8), (32, 32, 0.3), (24, 28, 0.3)])
def test_boxes_have_torchvisions_distribution(height, width, scale_min):
    ours = augment.draw_boxes(20000, height, width, (scale_min, 1.0), generator()).double()
    image = torch.empty(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = torch.tensor(
            [RandomResizedCrop.get_params(image, [scale_min, 1.0], [3 / 4, 4 / 3]) for _ in range(6000)]
        ).double()
    for name, statistic in STATISTICS.items():
        mine, other = statistic(*ours.unbind(1)), statistic(*theirs.unbind(1))
        # mean and spread; the latter as the mean of squared deviations, whose error follows from its own spread
        for kind, a, b in (("mean", mine, other), ("spread", squared_deviations(mine), squared_deviations(other))):
            error = (a.var() / len(a) + b.var() / len(b)).sqrt()
            assert abs(a.mean() - b.mean()) < 4 * error, f"{kind} of {name}: {a.mean():.4f}, torchvision {b.mean():.4f}"


STATISTICS = {  # of the four numbers, and how they hang together
    "top": lambda top, left, h, w: top,
    "left": lambda top, left, h, w: left,
    "height": lambda top, left, h, w: h,
    "width": lambda top, left, h, w: w,
    "area": lambda top, left, h, w: h * w,
    "ratio": lambda top, left, h, w: (w / h).log(),
    "top x left": lambda top, left, h, w: top * left,
    "edge": lambda top, left, h, w: ((top == 0) & (left == 0)).double(),
}


def squared_deviations(x):
    return (x - x.mean()).square()


def test_draws_differ_per_image_and_follow_the_generator():
    n = 20000
    boxes, flips = augment.draw_boxes(500, 32, 32, (0.5, 1.0), generator(3)), augment.draw_flips(n, generator(3))
    assert len(boxes.unique(dim=0)) > 400
    assert flips.dtype == torch.bool and abs(flips.double().mean() - 0.5) < 4 * 0.5 / n**0.5
    assert torch.equal(boxes, augment.draw_boxes(500, 32, 32, (0.5, 1.0), generator(3)))
    assert torch.equal(flips, augment.draw_flips(n, generator(3)))
    assert not torch.equal(boxes, augment.draw_boxes(500, 32, 32, (0.5, 1.0), generator(4)))
    assert not torch.equal(flips, augment.draw_flips(n, generator(4)))


def test_normalise_maps_pixels_to_minus_one_to_one():
    pixels = torch.arange(256, dtype=torch.uint8)
    normal = augment.normalise(pixels)
    assert normal.dtype == torch.float32
    assert normal[0] == -1 and normal[255] == 1
    torch.testing.assert_close(normal, ((pixels.double() / 255 - 0.5) / 0.5).float())
    assert torch.equal(pixels, torch.arange(256, dtype=torch.uint8))  # the stored images stay as they are


# ---------------------------------------------------------------------------- batches


def make_batches(n=50, height=8, width=8, eval_batch_size=16, config_class=ClassificationConfig, **train):
    """ImageBatches of n training images labelled 0 to n - 1, and 10 + 10 to validate and test."""
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (n + 20, 3, height, width), dtype=np.uint8)
    labels = np.arange(n + 20)
    dataset = DataSet("noise", images[: n + 10], labels[: n + 10], images[n + 10 :], labels[n + 10 :], ("a", "b"))
    split = Split(train=np.arange(n), val=np.arange(n, n + 10))
    config = config_class(
        **(dict(dataset="cifar10", epochs=9, batch_size=16, learning_rate=1.0, weight_decay=0.0) | train)
    )
    return dataset, ImageBatches(dataset, split, config, eval_batch_size, torch.device("cpu"))


def whole(batches):
    """All images and all labels of an iterator of batches."""
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("part, first", [("val", 50), ("test", 60)])
def test_evaluation_images_are_only_normalised(part, first):
    dataset, data = make_batches(eval_batch_size=4, **CROPS_AND_FLIPS)
    stored = torch.from_numpy(np.concatenate([dataset.train_images, dataset.test_images]))[first : first + 10]
    for _ in range(2):
        list(data.train_batches(0))  # training between two evaluations changes nothing
        batches = list(data.eval_batches(part))
        assert [len(labels) for _, labels in batches] == [4, 4, 2]
        images, labels = whole(batches)
        assert torch.equal(images, augment.normalise(stored))
        assert labels.tolist() == list(range(first, first + 10))


@pytest.mark.parametrize("augmentation", [{}, CROPS_AND_FLIPS])
@pytest.mark.parametrize("epoch", [0, 8])
def test_every_image_appears_once_an_epoch(augmentation, epoch):
    """Permuted; without augmentation it is only normalised."""
    dataset, data = make_batches(**augmentation)
    batches = list(data.train_batches(epoch))
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 2]
    images, labels = whole(batches)
    assert labels.tolist() != sorted(labels.tolist()) and sorted(labels.tolist()) == list(range(50))
    stored = augment.normalise(torch.from_numpy(dataset.train_images))[labels]
    assert torch.equal(images, stored) == (not augmentation)


def test_batches_repeat_for_the_same_seed_and_epoch_only():
    _, data = make_batches(seed=5, **CROPS_AND_FLIPS)
    images, labels = whole(data.train_batches(3))
    list(data.train_batches(4))
    torch.rand(1)  # the global generator has no part in it
    for again in (data, make_batches(seed=5, **CROPS_AND_FLIPS)[1]):
        same_images, same_labels = whole(again.train_batches(3))
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)
    for other in (data.train_batches(4), make_batches(seed=6, **CROPS_AND_FLIPS)[1].train_batches(3)):
        assert not torch.equal(labels, whole(other)[1])


def test_crops_and_flips_are_drawn_anew_each_epoch_and_seed():
    """With one image many times over, where the order cannot be told, batches differ by crops and flips alone."""
    drawn = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        _, data = make_batches(seed=seed, **CROPS_AND_FLIPS)
        part = data.parts["train"]
        part.images = part.images[:1].expand_as(part.images)
        drawn.append(whole(data.train_batches(epoch))[0])
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_batch_size_changes_neither_order_nor_draws():
    one, other = (whole(make_batches(batch_size=size, **CROPS_AND_FLIPS)[1].train_batches(2)) for size in (16, 50))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_labels_stay_with_their_augmented_images():
    _, data = make_batches(**CROPS_AND_FLIPS)
    part = data.parts["train"]
    part.images = part.labels.byte()[:, None, None, None].expand(50, 3, 8, 8)
    images, labels = whole(data.train_batches(0))  # each image one grey, its label's: any crop of it is that grey
    torch.testing.assert_close((images + 1) * 127.5, labels[:, None, None, None].expand(50, 3, 8, 8).float())


def test_flips_alone_mirror_some_images_and_leave_the_rest():
    dataset, data = make_batches(horizontal_flip=True)
    images, labels = whole(data.train_batches(0))
    stored = augment.normalise(torch.from_numpy(dataset.train_images))[labels]
    kept = (images - stored).abs().amax((1, 2, 3)) < 1e-5
    mirrored = (images - stored.flip(3)).abs().amax((1, 2, 3)) < 1e-5
    assert torch.all(kept ^ mirrored)
    assert 10 < kept.sum() < 40


def test_crops_without_flips_mirror_nothing():
    _, flips = augment.CropAndFlip(0.8, flip=False).draw(100, 32, 32, torch.Generator())
    assert not flips.any()


class Negative:
    """An augmentation of a user's own: the negative of some images, told by the sign of their labels."""

    stream = "negative"

    def draw(self, n, height, width, generator):
        return (torch.rand(n, generator=generator) < 0.5,)

    def apply(self, images, labels, negative):
        signs = 1 - 2 * negative.int()
        return images * signs[:, None, None, None], labels * signs


@dataclass(frozen=True, kw_only=True)
class WithNegatives(ClassificationConfig):
    def make_augmentations(self, num_classes):
        return [*super().make_augmentations(num_classes), Negative()]


def test_an_augmentation_added_to_the_list_leaves_the_draws_of_others_alone(monkeypatch):
    monkeypatch.setitem(seeds.STREAMS, "negative", 100)
    plain, added = (
        make_batches(config_class=each, **CROPS_AND_FLIPS)[1] for each in (ClassificationConfig, WithNegatives)
    )
    images, labels = whole(plain.train_batches(1))
    found, signed = whole(added.train_batches(1))
    signs = signed.sign() + (signed == 0)
    assert torch.equal(signed.abs(), labels) and 10 < (signs < 0).sum() < 40
    assert torch.equal((found * signs[:, None, None, None])[labels > 0], images[labels > 0])
    assert torch.equal(whole(plain.eval_batches("val"))[0], whole(added.eval_batches("val"))[0])
