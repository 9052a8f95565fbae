"""What a new model, task or data set must provide, checked before the first step. docs/extending.md explains it."""

import copy

import torch
from torch import nn

from training import processes
from models import CONFIG_CLASSES, build_config
from training.batchnorm import has_batchnorm
from training.config import TrainConfig, UserError
from training.experiment import Configuration, Experiment
from training.metrics import METRICS, Items, Sums
from training.progress import counts_of, loss_of
from training.tasks import Batches, Source, Task

TASK = "see the contract of a task in docs/extending.md"
DATA = "see the contract of a data set in docs/extending.md"
MODEL = "see the contract of a model in docs/extending.md"


def check_experiment(experiment: Experiment) -> None:
    """Raises UserError for a model that could not be built again from its stored config, or a refused setting."""
    try:
        if not experiment.options.resume:
            experiment.check_new()
    except ValueError as error:
        raise UserError(str(error)) from None
    config, name = experiment.model, type(experiment.model).__name__
    if CONFIG_CLASSES.get(name) is not type(config):
        raise UserError(
            f"{name} is not registered, so its runs could not be opened again: add it to CONFIG_CLASSES in "
            f"models/__init__.py; {MODEL}"
        )
    if not callable(getattr(config, "build", None)):
        raise UserError(f"{name} has no build(): {MODEL}")
    try:
        stored = Configuration.of(config, experiment.train)
        again = build_config(name, stored.model)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{name} cannot be built again from its stored fields ({error}): {MODEL}") from None
    if changed := stored.differences(Configuration.of(again, experiment.train)):
        raise UserError(f"{name} is another one when built from its stored fields ({'; '.join(changed)}): {MODEL}")


def check_source(train: TrainConfig, source: Source) -> None:
    """Raises UserError for a new run on these data that may not be.

    That is one on a data set that does not bear the name that selects it, as it could not be read again, or one with
    a train_limit above the number of images.
    """
    name, dataset = source.description["name"], getattr(train, "dataset", None)
    if dataset is not None and name.partition(" ")[0] != dataset:
        raise UserError(f"the data set {dataset} calls itself {name}: {DATA}")
    images, limit = source.description.get("images", {}), getattr(train, "train_limit", None)
    n_images = images.get("train", 0) + images.get("val", 0) * getattr(train, "train_val", False)
    if limit is not None and limit > n_images:
        raise UserError(f"--train-limit {limit} is above the number of training images, {n_images}: leave it out")


def check_batches(model: nn.Module, data: Batches, task: Task, train: TrainConfig) -> None:
    """Tries two validation samples: loss, counts and metric. Raises UserError where the contract of a task is broken.

    Also refuses a last training batch of one sample if the model's BatchNorm cannot normalise it; of several processes,
    a share of one sample.
    """
    inputs, targets = next(iter(data.eval_batches("val")))
    inputs, targets = inputs[:2], targets[:2]
    model.eval()
    with torch.no_grad():
        outputs = task.predict(model, inputs)
        loss = loss_of(task, outputs, targets)
        counts = task.counts(outputs, targets)
    name = type(task).__name__
    if not isinstance(loss, torch.Tensor) or loss.ndim or not loss.is_floating_point():
        raise UserError(f"the loss of {name} is not a scalar tensor: {TASK}")
    if not isinstance(counts, dict):
        raise UserError(f"the counts of {name} are no dictionary: {TASK}")
    if bad := [key for key, value in counts.items() if not isinstance(value, torch.Tensor | Items)]:
        raise UserError(f"the counts of {name} ({', '.join(bad)}) are neither tensors nor Items: {TASK}")
    sums = Sums()
    sums.add(counts_of(task, outputs, targets, loss))
    samples = int(processes.total(torch.tensor(len(targets))))
    ratios = task.ratios(sums.read() | {"samples": samples})
    if task.metric.key not in METRICS or task.metric.key not in ratios:
        raise UserError(f"{name}.metric = {task.metric.key} must be in METRICS and among its ratios: {TASK}")
    if has_batchnorm(model):
        _check_single_sample(model, inputs, data.size("train"), train)


def _check_single_sample(model: nn.Module, inputs: torch.Tensor, n_train: int, train: TrainConfig) -> None:
    size = train.batch_size
    batches = {n_train % size or size, min(n_train, size)}
    shares = {part.stop - part.start for batch in batches for part in processes.shares(batch)}
    if 1 not in (batches if train.sync_batchnorm else shares):
        return
    try:
        copy.deepcopy(model).to("meta").train()(torch.empty(1, *inputs.shape[1:], dtype=inputs.dtype, device="meta"))
    except ValueError:  # BatchNorm: one value per channel has no variance
        each, or_share = "", ""
        if processes.count() > 1 and 1 not in batches:
            each, or_share = " for a process", ", or add --sync-batchnorm"
        raise UserError(
            f"the last batch of an epoch holds a single sample{each}, whose variance this model's BatchNorm cannot "
            f"compute: choose a --batch-size (or --train-limit) that leaves more{or_share}"
        ) from None
