"""Evaluation at several scales and mirrored, training at several sizes, and which models take other sizes."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from training import ClassificationConfig, SegmentationConfig, UserError, fit
from interpretability.common.trained import TrainedRun
from interpretability.predict import predict
from models.baselines import (
    DeiTTinyConfig,
    EfficientNetB0Config,
    MobileNetV2Config,
    ResNet20Config,
    ResNetUNetConfig,
    ViTConfig,
)
from models.bdh_unet import bdh_unet_config, v4_unet_config
from models.flops import flop_of
from models.masked_bdh import MaskedBDHConfig
from models.vision_bdh import v2_config, v4_config
from tests.camvid_data import write_camvid
from tests.trials import read_rows, same_weights, weights
from tools.exporting.evaluation import score
from tools.exporting.model_card import model_card
from training.config import PretrainingConfig
from training.data import draw_split, load_dataset
from training.data.batches import ImageBatches
from training.data.mask_files import read_image
from training.metrics import confusion_matrices, confusion_ratios
from training.views import Views, check_train_sizes, views_of

SIZE = dict(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4)
COMMON = dict(epochs=1, batch_size=16, learning_rate=1e-3, weight_decay=0.0)
MODELS = {
    "v2": v2_config(patch_size=8, **SIZE),
    "v4": v4_config(**SIZE),
    "unet": bdh_unet_config(img_size=(32, 48), **SIZE),
    "v4_unet": v4_unet_config(img_size=32, skip_levels=(2, 1), **SIZE),
    "resnet_unet": ResNetUNetConfig(img_size=64, encoder_weights="none"),
    "resnet20": ResNet20Config(),
    "mobilenet": MobileNetV2Config(setting="fitted"),
    "efficientnet": EfficientNetB0Config(),
    "vit": ViTConfig(n_layer=1, n_embd=12, mlp_dim=8),
    "deit": DeiTTinyConfig(setting="fitted"),
    "masked": MaskedBDHConfig(patch_size=8, **SIZE),
}


def resize(images, height, width, antialias=True):
    return F.interpolate(images, (height, width), mode="bilinear", align_corners=False, antialias=antialias)


# ---------------------------------------------------------------------------- which sizes a model takes


@pytest.mark.parametrize("name", MODELS)
def test_a_config_says_which_sizes_its_model_takes(name):
    config = MODELS[name]
    model, unit = config.build().eval(), config.size_unit
    with torch.no_grad():
        if unit is None:
            with pytest.raises(Exception, match=r"(?i)match|size|shape|expand|height"):  # each library has its own
                model(torch.rand(1, 3, 40, 40))
            with pytest.raises(UserError, match=rf"{type(config).__name__} takes images of 32 x 32 pixels only"):
                views_of(config, (1.0, 1.25), False)
            with pytest.raises(UserError, match="leave out --train-sizes"):
                check_train_sizes(config, (24, 32))
            return
        outputs = model(torch.rand(1, 3, 2 * unit, 3 * unit + 20 // unit * unit))
        if unit > 1 and name != "resnet_unet":  # whose library takes them as well
            with pytest.raises((ValueError, RuntimeError)):
                model(torch.rand(1, 3, 2 * unit, 3 * unit + 1))
        if unit > 1:
            with pytest.raises(UserError, match=f"{5 * unit + 1} is not a multiple of {unit}"):
                check_train_sizes(config, (5 * unit, 5 * unit + 1))
    assert outputs.isfinite().all()


def test_scales_are_rounded_to_what_the_model_takes():
    views = views_of(bdh_unet_config(img_size=(384, 512)), (0.7, 1, 0.01), False)
    assert views.sizes == ((272, 360), (384, 512), (8, 8))
    assert views_of(ResNetUNetConfig(), (0.7, 1), True) == Views(True, ((256, 256), (384, 384)))
    assert views_of(ViTConfig(), [1.0], True) == Views(True)  # any model, as it is one size; JSON has lists
    with pytest.raises(UserError, match=r"--eval-scales 1 and 1\.05 are both 32 x 32 pixels, in multiples of 4"):
        views_of(v2_config(), (1, 1.05), False)


@pytest.mark.parametrize("scales", [(), (1, 1), (0,), (-1, 1), (1, float("nan")), (1, 9)])
@pytest.mark.parametrize(
    "make",
    [lambda **f: ClassificationConfig(dataset="cifar10", **COMMON, **f), lambda **f: SegmentationConfig(**COMMON, **f)],
)
def test_bad_scales_are_refused(make, scales):
    with pytest.raises(ValueError, match=r"must be one or more different numbers between 0\.1 and 8"):
        make(eval_scales=scales)


def test_bad_sizes_and_pretraining_are_refused():
    for sizes in ((32, 32), (0, 32)):
        with pytest.raises(ValueError, match="must be different sizes"):
            ClassificationConfig(dataset="cifar10", train_sizes=sizes, **COMMON)
    with pytest.raises(ValueError, match="pretraining does not use"):
        PretrainingConfig(dataset="cifar10", eval_scales=(1, 2), **COMMON)


# ---------------------------------------------------------------------------- the mean over views


class Odd(nn.Module):
    """Answers by place and size, so that every resizing and mirroring shows."""

    def __init__(self, pooled):
        super().__init__()
        self.convolution, self.pooled = nn.Conv2d(3, 4, 3, padding=1), pooled

    def forward(self, images):
        answers = self.convolution(images) * torch.linspace(1, 9, images.shape[-1])
        return answers.mean((2, 3)) if self.pooled else answers[..., ::2, ::2]  # half the size, as some decoders give


def test_without_views_the_answer_is_the_models_own():
    images, answer = torch.rand(2, 3, 8, 12), torch.rand(2, 4, 8, 12)
    for method in (Views().classify, Views().segment):
        assert method(lambda given: answer if given is images else None, images) is answer


def test_classes_of_an_image_are_the_mean_of_logits():
    model, images = Odd(pooled=True), torch.rand(2, 3, 32, 32)
    forms = [resize(images, 24, 24), images, resize(images, 40, 40)]
    views = views_of(v2_config(), (0.75, 1, 1.25), False)
    with torch.no_grad():
        torch.testing.assert_close(views.classify(model, images), torch.stack([*map(model, forms)]).mean(0))
        both = torch.stack([model(form) for each in forms for form in (each, each.flip(-1))]).mean(0)
        torch.testing.assert_close(dataclasses.replace(views, flip=True).classify(model, images), both)
        flipped = (model(images) + model(images.flip(-1))) / 2
        assert torch.equal(Views(True).classify(model, images), flipped)  # as it was before there were scales


def test_classes_of_pixels_are_the_mean_of_probabilities():
    model, images = Odd(pooled=False), torch.rand(2, 3, 32, 48)
    views = views_of(bdh_unet_config(img_size=(32, 48)), (0.75, 1), True)
    probabilities = []
    with torch.no_grad():
        for form in (resize(images, 24, 32), images):
            for logits in (model(form), model(form.flip(-1)).flip(-1)):
                probabilities.append(resize(logits, 32, 48, antialias=False).softmax(1))
        expected = torch.stack(probabilities).mean(0)
        torch.testing.assert_close(views.segment(model, images).softmax(1), expected)
        assert (views.segment(model, images).argmax(1) != resize(model(images), 32, 48).argmax(1)).any()
        sure = Views(True).segment(
            lambda given: torch.tensor([1e4, -1e4]).view(1, 2, 1, 1).expand(2, 2, 32, 48), images
        )
        assert sure.isfinite().all()  # a probability of 0 has no logarithm


# ---------------------------------------------------------------------------- runs


UNET = (
    "--img-size 32 --n-layer 2 --n-embd 32 --n-head 2 --mlp-internal-dim-multiplier 4 --init normal --epochs 6 "
    "--learning-rate 2e-2 --batch-size 2 --device cpu --num-workers 0 --precision float32 --runs-dir runs --data-dir"
)
VIEWS = "--eval-flip --eval-scales 0.75 1 1.5"
VIEWS_TEXT = "mean class probabilities of each image and its mirror image at scales 0.75, 1, 1.5"


def test_a_segmentation_run_is_validated_in_its_views(call_script, tmp_path, capsys):
    """Same training, another measurement: what summary.json, exporter and predict.py find is counted again here."""
    folder = tmp_path / "data_camvid"
    write_camvid(folder, n_train=8, n_val=3, size=(48, 32))
    flags = [*UNET.split(), folder]
    assert call_script("train_bdh_unet.py", *flags, *VIEWS.split()) == 0
    assert VIEWS_TEXT in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert call_script("train_bdh_unet.py", *flags, "--name", "plain") == 0
    (run,) = (tmp_path / "runs").glob("*eval_flip=True+eval_scales=0.75,1.0,1.5*/seed0")
    plain = tmp_path / "runs" / "plain" / "seed0"
    assert same_weights(weights(run, "last.pt"), weights(plain, "last.pt"))
    found, unlike = (json.loads((each / "summary.json").read_text()) for each in (run, plain))
    assert (
        found["eval_flip"] and found["eval_scales"] == [0.75, 1, 1.5] and not {"eval_flip", "eval_scales"} & set(unlike)
    )
    assert VIEWS_TEXT in model_card(run) and "mirror image" not in model_card(plain)

    opened, confusion = TrainedRun(run, folder, "cpu", any_model=True), 0
    for images, masks in opened.batches(range(3), 1):
        with torch.no_grad():
            forms = [resize(images, side, side) if side != 32 else images for side in (24, 32, 48)]
            answers = [opened.model(form) for form in forms] + [opened.model(form.flip(-1)).flip(-1) for form in forms]
            mean = torch.stack([resize(each, 32, 32, antialias=False).softmax(1) for each in answers]).mean(0)
        confusion += confusion_matrices(mean.argmax(1), masks, 11)[0]
    miou = confusion_ratios(confusion.tolist(), opened.class_names)["miou"]
    assert found["best"]["val_miou"] == pytest.approx(miou) == pytest.approx(score(opened, opened.model).value)
    assert all(
        one["val_loss"] != other["val_loss"] for one, other in zip(read_rows(run), read_rows(plain), strict=True)
    )

    image = read_image(opened.images.pairs[2].image)
    expected = F.interpolate(mean.log(), size=(32, 48), mode="bilinear", align_corners=False)[0].argmax(0)
    drawn = predict(lambda given: opened.answer(opened.model, given), image, 32, torch.device("cpu"))
    assert (drawn == expected.numpy()).mean() > 0.99 and len(set(drawn.flat)) > 1
    assert call_script("train_bdh_unet.py", *flags, "--name", "plain", "--resume", *VIEWS.split()) == 1
    assert "eval_scales" in capsys.readouterr().err


def make_batches(data_dir, **fields):
    config = ClassificationConfig(dataset="cifar10", **(COMMON | dict(horizontal_flip=True, mixup=0.5) | fields))
    source = load_dataset("cifar10", data_dir)
    return ImageBatches(source, draw_split(source, 0.2, None, 0), config, 16, torch.device("cpu"))


def test_each_batch_has_a_size_of_its_own_drawn_by_the_seed(data_dir):
    """The images are those of training at one size, resized after augmentation."""
    plain, data = make_batches(data_dir), make_batches(data_dir, train_sizes=(24, 32, 40))
    sizes = []
    for epoch in (0, 1):
        for (one, labels), (other, same_labels) in zip(
            plain.train_batches(epoch), data.train_batches(epoch), strict=True
        ):
            side = other.shape[-1]
            sizes.append(side)
            assert torch.equal(labels, same_labels)
            assert torch.equal(other, one if side == 32 else resize(one, side, side))
    assert set(sizes) == {24, 32, 40} and sizes[:12] != sizes[12:]
    assert [len(images[0, 0]) for images, _ in data.train_batches(1, first=5)] == sizes[17:]
    other_seed = make_batches(data_dir, train_sizes=(24, 32, 40), seed=1)
    assert [len(images[0, 0]) for images, _ in other_seed.train_batches(0)] != sizes[:12]
    assert all(images.shape[2:] == (32, 32) for images, _ in data.eval_batches("val"))


def test_a_model_of_one_size_is_refused_before_anything_is_written(call_script, data_dir, tmp_path, capsys):
    where = ["--data-dir", data_dir, "--runs-dir", tmp_path / "runs"]
    for flags in (["--train-sizes", 24, 32], ["--eval-scales", 1, 1.25]):
        assert call_script("train_vit_tiny_cifar10.py", *where, *flags) == 1
        assert f"takes images of 32 x 32 pixels only: leave out {flags[0]}" in capsys.readouterr().err
    assert call_script("train_v2_cifar10.py", *where, "--train-sizes", 30, 32) == 1
    assert "--train-sizes 30 is not a multiple of 4" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_run_at_several_sizes(experiment, data_dir):
    fields = dict(train_sizes=(24, 32), eval_scales=(1, 1.25))
    trial = experiment(epochs=1, **fields)
    summary = fit(trial)
    assert summary["eval_scales"] == [1, 1.25] and "mean logits of each image at scales 1, 1.25" in model_card(
        trial.folder
    )
    run = TrainedRun(trial.folder, data_dir, "cpu")
    right = [run.answer(run.model, images).argmax(1) == labels for images, labels in run.batches(range(run.n_images))]
    assert torch.cat(right).float().mean().item() == pytest.approx(summary["test"]["accuracy"])
    flop = [flop_of(dataclasses.replace(trial.model, img_size=size, pos_embed=False)) for size in (24, 32)]
    assert flop_of(dataclasses.replace(trial.model, pos_embed=False), (24, 32)) == sum(flop) / 2
