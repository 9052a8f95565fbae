"""What a new model or task must provide: checked before the first step, one message, nothing written."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch import nn
from torchvision.utils import save_image

from training import ClassificationConfig, UserError, fit
from analysis.reading import make_rows, read_runs
from interpretability import classify
from models import CONFIG_CLASSES
from models.vision_bdh import VisionBDHConfig
from tests.trials import read_metrics, with_options
from tools.exporting.model_card import model_card
from training.data import DATASETS, load_dataset
from training.metrics import METRICS, Items, Metric
from training.runs import Run, load_model
from training.tasks import Classification


def refusal(trial):
    """The message with which a trial is refused; nothing must have been written."""
    with pytest.raises(UserError) as refused:
        fit(trial)
    assert not trial.options.runs_dir.exists()
    return str(refused.value)


@pytest.fixture
def register(monkeypatch):
    """Registers a config class, for the test only."""
    return lambda cls: monkeypatch.setitem(CONFIG_CLASSES, cls.__name__, cls)


# ---------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Linear:
    """The smallest model that keeps the contract."""

    num_classes: int = 10
    img_size: int = 32
    in_channels: int = 3

    def build(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(self.in_channels * self.img_size**2, self.num_classes))


@dataclass(frozen=True)
class WithoutBuild(Linear):
    build: None = None


@dataclass(frozen=True)
class Doubling(Linear):
    """Is another one when made from its own fields."""

    width: int = 3

    def __post_init__(self):
        object.__setattr__(self, "width", 2 * self.width)


@dataclass(frozen=True)
class NotJSON(Linear):
    levels: Any = frozenset({1, 2})


@dataclass(frozen=True)
class Converted(Linear):
    """Refuses what JSON gives back for a tuple."""

    sides: tuple = (1, 2)

    def __post_init__(self):
        if not isinstance(self.sides, tuple):
            raise ValueError("sides must be a tuple")


@dataclass(frozen=True)
class Normed(Linear):
    """With BatchNorm, which cannot normalise a single sample."""

    def build(self):
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3 * 32**2), nn.Linear(3 * 32**2, self.num_classes))


def with_model(trial, model):
    return dataclasses.replace(trial, model=model)


def test_a_model_that_keeps_the_contract_trains_and_opens_again(experiment, register):
    trial = with_model(experiment(epochs=1), Linear())
    assert "Linear is not registered" in refusal(trial)
    register(Linear)
    fit(trial)
    assert isinstance(load_model(trial.folder)[0][1], nn.Linear)


@pytest.mark.parametrize(
    ("config_class", "words"),
    [
        (WithoutBuild, ["WithoutBuild has no build()"]),
        (Doubling, ["Doubling", "width: 6 -> 12"]),
        (NotJSON, ["NotJSON", "frozenset"]),
        (Converted, ["Converted", "sides must be a tuple"]),
    ],
)
def test_a_model_that_could_not_be_opened_again_is_refused(config_class, words, experiment, register):
    register(config_class)
    message = refusal(with_model(experiment(), config_class()))
    assert all(word in message for word in [*words, "docs/extending.md"]) and "\n" not in message


def test_a_class_that_took_the_name_of_another_is_refused(experiment):
    fields = [(field.name, field.type, field) for field in dataclasses.fields(VisionBDHConfig)]
    other = dataclasses.make_dataclass("VisionBDHConfig", fields, kw_only=True)
    assert "not registered" in refusal(with_model(experiment(), other()))


@pytest.mark.parametrize(
    ("changes", "alone"),
    [
        (dict(batch_size=16, train_limit=121), True),  # 97 to train
        (dict(batch_size=1), True),
        (dict(batch_size=16, train_limit=122), False),  # 98
    ],
)
def test_a_last_batch_of_one_sample_needs_a_model_without_batch_norm(changes, alone, experiment, register):
    register(Linear), register(Normed)
    trial = experiment(epochs=1, val_fraction=0.2, **changes)
    if alone:
        message = refusal(with_model(trial, Normed()))
        assert "--batch-size" in message and "single sample" in message
        fit(with_model(trial, Linear()))
    else:
        fit(with_model(trial, Normed()))


# ---------------------------------------------------------------------------- tasks


class VectorLoss(Classification):
    def loss(self, logits, labels):
        return (logits.float() ** 2).mean(1)


class NumberLoss(Classification):
    def loss(self, logits, labels):
        return 1.5


class NumberCounts(Classification):
    def counts(self, logits, labels):
        return {"correct": 3, "more": torch.ones(())}


class NoCounts(Classification):
    def counts(self, logits, labels):
        return (logits.argmax(1) == labels).sum()


class UnknownMetric(Classification):
    metric = Metric("happiness", "happiness", percent=True, higher_is_better=True)

    def ratios(self, sums):
        return {"happiness": 1.0}


class OtherRatios(Classification):
    def ratios(self, sums):
        return {"psnr": 1.0}


@dataclass(frozen=True, kw_only=True)
class OwnTask(ClassificationConfig):
    """A train config whose task the test chooses."""

    make = None

    def make_task(self):
        return self.make(self)


def with_task(trial, task):
    config_class = type("OwnTask", (OwnTask,), {"make": task})
    return dataclasses.replace(trial, train=config_class(**vars(trial.train)))


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (VectorLoss, "loss of VectorLoss is not a scalar"),
        (NumberLoss, "loss of NumberLoss is not a scalar"),
        (NumberCounts, "counts of NumberCounts (correct)"),
        (NoCounts, "counts of NoCounts"),
        (UnknownMetric, "UnknownMetric.metric = happiness"),
        (OtherRatios, "OtherRatios.metric = accuracy"),
    ],
)
def test_a_task_that_breaks_the_contract_is_refused(task, words, experiment):
    message = refusal(with_task(experiment(), task))
    assert words in message and "docs/extending.md" in message and "\n" not in message


class AveragePrecision(Classification):
    """Needs the scores of all samples at once, so its counts are gathered; costly, so not part of the progress bar."""

    metric = Metric("average_precision", "average precision", percent=True, higher_is_better=True)
    shows_metric = False
    seen: ClassVar = []  # what ratios() was given

    def counts(self, logits, labels):
        items = {"scores": Items(logits.softmax(1)), "labels": Items(F.one_hot(labels, 10))}
        return super().counts(logits, labels) | items

    def ratios(self, sums):
        self.seen.append(sums)
        precision = average_precision_score(sums["labels"].numpy(), sums["scores"].numpy())
        return {"average_precision": float(precision), "accuracy": sums["correct"] / sums["samples"]}


@pytest.mark.filterwarnings("ignore:No positive class")
def test_items_are_gathered_over_batches_and_reach_the_ratios_as_one_tensor(experiment, monkeypatch):
    monkeypatch.setitem(METRICS, "average_precision", AveragePrecision.metric)
    monkeypatch.setattr(AveragePrecision, "seen", [])
    trial = with_task(experiment(epochs=2, options={"eval_batch_size": 9, "log_every": 1}), AveragePrecision)
    summary = fit(trial)
    sizes = [(each["samples"], tuple(each["scores"].shape), each["scores"].dtype) for each in AveragePrecision.seen]
    assert sizes == [(n, (n, 10), torch.float32) for n in (2, 192, 48, 192, 48, 40)]  # two samples: the check

    dataset = load_dataset("cifar10", trial.options.data_dir)
    val = Run(trial.folder).read_split().val
    model, _ = load_model(trial.folder)
    for found, images, labels in (
        (summary["test"]["average_precision"], dataset.test_images, dataset.test_labels),
        (summary["best"]["val_average_precision"], dataset.train_images[val], dataset.train_labels[val]),
    ):
        with torch.no_grad():
            scores = model(torch.from_numpy(images).float() / 127.5 - 1).softmax(1)
        expected = average_precision_score(np.eye(10, dtype=int)[labels], scores.numpy())
        assert found == pytest.approx(expected, abs=1e-6)
    row = read_metrics(trial.folder)[summary["best"]["epoch"] - 1]
    assert row["val_average_precision"] == summary["best"]["val_average_precision"] and "val_accuracy" in row
    last = [each for each in AveragePrecision.seen if each["samples"] == 48]
    assert last[0]["labels"].argmax(1).tolist() == dataset.train_labels[val].tolist()


def test_a_data_set_bears_the_name_that_selects_it(experiment, monkeypatch):
    renamed = dataclasses.replace(load_dataset("digits", None), name="numbers")
    monkeypatch.setitem(DATASETS, "digits", lambda *arguments: renamed)
    trial = experiment(dataset="digits", model=dict(img_size=8, patch_size=4, in_channels=1))
    assert "the data set digits calls itself numbers" in refusal(trial)


class OwnConfig(ClassificationConfig):
    """Stands for a config class that a user defines in a script of their own."""


def test_a_run_of_a_config_class_from_elsewhere_is_used_as_its_task_is(experiment, tmp_path):
    trial = experiment(epochs=1)
    own = dataclasses.replace(trial, train=OwnConfig(**dataclasses.asdict(trial.train)))
    fit(own)
    with pytest.raises(UserError, match=r"another configuration \(train_class: OwnConfig -> ClassificationConfig\)"):
        fit(with_options(trial, resume=True))  # the same fields, but perhaps another optimiser
    fit(with_options(trial, runs_dir=tmp_path / "others"))
    assert len(make_rows(read_runs([own.folder, tmp_path / "others" / own.name / "seed0"]))) == 2
    assert "pipeline_tag: image-classification" in model_card(own.folder)
    images = tmp_path / "images"
    images.mkdir()
    save_image(torch.rand(3, 32, 32), images / "noise.png")
    options = classify.Options(
        images=[images], run=own.folder, output_dir=tmp_path / "out", data_dir=trial.options.data_dir
    )
    classify.main(options)
    assert len(list((tmp_path / "out").rglob("classes.csv"))) == 1
