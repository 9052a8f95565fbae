"""Whole training steps of any model, as fit() makes them, and the reference implementation of the BDH step."""

from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Precision
from models.bdh import StepWeights, layer_norm
from models.rotary import Tables, rope
from models.vision_bdh import VisionBDH, VisionBDHConfig
from training.config import ClassificationConfig
from training.data import DataSet, ImageBatches, Split
from training.device import make_scaler, set_precision
from training.graphs import Counts, StepGraphs
from training.optimiser import WeightAverage

Batch = tuple[Tensor, Tensor]  # images (B, C, height, width) in [-1, 1] and labels (B,)


class StackedReference(VisionBDH):
    """The step as first written: x broadcast over the stacked weights, one autograd node for each operation."""

    def update(self, x: Tensor, weights: StepWeights, tables: Tables, products: StepWeights | None = None) -> Tensor:
        x = x.unsqueeze(1)  # (B, 1, T, D)
        x_sparse = F.relu(x @ weights.encoder)  # (B, H, T, N)
        q = rope(x_sparse, tables.cos, tables.sin)
        a = layer_norm((q @ q.mT) @ x)
        y_sparse = F.relu(a @ weights.encoder_v)
        gated = F.dropout(x_sparse * y_sparse, self.config.dropout, self.training)
        return layer_norm(gated.transpose(1, 2).flatten(-2) @ weights.decoder)


def recomputing_model(config: VisionBDHConfig) -> VisionBDH:
    """The model with --recompute."""
    model = VisionBDH(config)
    model.recompute = True
    return model


IMPLEMENTATIONS: dict[str, Callable[[VisionBDHConfig], VisionBDH]] = {
    "reference": StackedReference,
    "fast": VisionBDH,
    "fast, --recompute": recomputing_model,
}


def protocol(**changes: object) -> ClassificationConfig:
    """Training by the CIFAR protocol, with changes."""
    fields = dict(dataset="cifar10", epochs=1, batch_size=32, learning_rate=1e-4, weight_decay=0.05)
    return ClassificationConfig(**(fields | dict(crop_scale_min=0.8, horizontal_flip=True) | changes))


def training_step(
    model: nn.Module,
    batches: Iterator[Batch],
    precision: Precision,
    device: torch.device,
    compiled: bool = False,
    train: ClassificationConfig | None = None,
    graph: bool = False,
) -> Callable[[], Tensor]:
    """A step on the next batch: forward, loss, backward, clip, optimizer, averaging. Returns the detached loss.

    train: default, `protocol()`. graph: as a CUDA graph, as fit() runs it on a GPU. Moves the model to the device. The
    step does not synchronise with the device.
    """
    train = train or protocol()
    autocast, scaler = set_precision(precision, device), make_scaler(precision, device)
    model = model.to(device)
    forward = torch.compile(model) if compiled else model
    optimizer = train.make_optimizer(model)
    average = WeightAverage(model, train.ema) if train.ema else None
    graphs = StepGraphs(optimizer, device) if graph else None

    def update(images: Tensor, labels: Tensor) -> tuple[Tensor, Counts]:
        with autocast:
            loss = F.cross_entropy(forward(images).float(), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
        scaler.step(optimizer)
        return loss.detach().isfinite(), {"loss": loss.detach()}

    def step() -> Tensor:
        if graphs is not None:
            _, counts = graphs.run(update, *next(batches))
        else:
            _, counts = update(*next(batches))
            scaler.update()
            optimizer.zero_grad()
        if average is not None:
            average.update_parameters(model)
        return counts["loss"]

    return step


def endless_batches(data: DataSet, split: Split, train: ClassificationConfig, device: torch.device) -> Iterator[Batch]:
    """Training batches, epoch after epoch."""
    batches = ImageBatches(data, split, train, train.batch_size, device)
    for epoch in count():
        yield from batches.train_batches(epoch)


def made_up_batches(
    batch_size: int, img_size: int, n_classes: int, device: torch.device, train: ClassificationConfig | None = None
) -> Iterator[Batch]:
    """Endless batches of random images, kept as uint8 and augmented on the device as in training.

    An epoch has up to 700 batches or 64 MiB of them, so that its start weighs little.
    """
    image_bytes = 3 * img_size**2
    rng, n = np.random.default_rng(0), max(16, min(700, 2**26 // (batch_size * image_bytes))) * batch_size
    images, names = rng.integers(256, size=(n + 1, 3, img_size, img_size), dtype=np.uint8), map(str, range(n_classes))
    labels = rng.integers(n_classes, size=n + 1)
    data = DataSet("made up", images, labels, images[:0], np.zeros(0, np.int64), tuple(names))
    split = Split(train=np.arange(n), val=np.array([n]))  # a whole number of batches
    return endless_batches(data, split, train or protocol(batch_size=batch_size), device)
