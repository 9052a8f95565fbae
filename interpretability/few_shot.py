"""Measures few-shot learning: how well a trained model tells apart classes it has never seen, from a few examples each.

The model stays as it is. In each episode, a few new classes are drawn (--way, 5 by default), a few labelled images of
each (--shots: 1, and 5), and other images of these classes as queries (--queries, 15 each). A query gets the class
whose mean feature vector is nearest (features: what the model's classification head reads). Two versions:

    nearest_mean   the features as they are (prototypes: Snell et al. 2017, arXiv 1703.05175)
    centred        less the mean feature of the images that the model was trained on, then scaled to length 1
                   (SimpleShot: Wang et al. 2019, arXiv 1911.04623)

All models get the same episodes, and the same queries for each number of shots. Two controls say what was learnt: raw
pixels instead of features, and each model before training. Intervals are 95 % over episodes, as is the custom; they
cover neither other seeds of training nor other images. Differences are paired by episode. Writes a table (CSV, and
Markdown with the differences) and a figure (PNG and SVG).

The classes must be new: a model of CIFAR-10 is tested on CIFAR-100 and the reverse, or either on a folder of your own
with a subfolder of images per class. Test images are used, or the training images if there is no test part.

    python interpretability/few_shot.py --run runs/v2_cifar10/seed0 runs/vit_tiny_cifar10/seed0
    python interpretability/few_shot.py --run runs/v2_cifar100/seed0 --dataset cifar10
    python interpretability/few_shot.py --run runs/v2_cifar10/seed0 --way 100 --queries 50 --episodes 20
    python interpretability/few_shot.py --run runs/v2_cifar10/seed0 --dataset photos/birds --shots 1 2 3
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from analysis.plotting.style import COLORS, PAGE, plain_text, save_figure, style_axes, titled_figure
from analysis.tables import markdown_table, mean_interval, write_tables
from interpretability.common.features import head_input
from interpretability.common.trained import SeveralChoice, TrainedRun, open_several, progress, several_folder
from models.masked_bdh import MaskedBDH
from training.augment import normalise
from training.command_line import in_a_name, run_script
from training.config import OWN_FILES, UserError, require
from training.data import DATASETS, DataSet, load_dataset
from training.data.finding import cut_name
from training.data.image_files import read_images
from training.experiment import changed_fields
from training.stored import task_of

METHODS = {"nearest_mean": "nearest class mean", "centred": "the same, centred and scaled to length 1"}
PIXELS, TRAINED, UNTRAINED = "raw pixels", "trained", "untrained"
BASE_IMAGES = 2000  # training images whose mean feature is subtracted
BATCH = 128
DIGITS = 5  # decimals in the table
NUMBERS_AT_ONCE = 2**23  # float64 numbers of features in a block of episodes: 64 MB
SETTINGS = ("way", "shots", "queries", "episodes", "seed")  # named in the output files if not the default ones
Source = tuple[str, str]  # name of the run, and trained or untrained; or raw pixels
Extract = Callable[[Tensor], Tensor]  # images (B, C, S, S) -> features (B, F)
Accuracies = dict[tuple[str, int], np.ndarray]  # by method and number of shots: (E,), one for each episode


@dataclass(frozen=True, kw_only=True)
class Options(SeveralChoice):
    """Which runs to test, on which classes."""

    dataset: str = "cifar100"
    """new classes: cifar10, cifar100, another data set's name, or the path of a folder with one subfolder per class"""
    way: int = 5
    """classes in an episode"""
    shots: tuple[int, ...] = (1, 5)
    """labelled images of each class, one or more numbers"""
    queries: int = 15
    """images of each class to be classified in an episode"""
    episodes: int = 600
    """number of episodes"""
    seed: int = 0
    """seed of the episodes"""

    def __post_init__(self):
        for name, least in (("way", 2), ("queries", 1), ("episodes", 2), ("seed", 0)):
            require(getattr(self, name) >= least, self, name, f"must be at least {least}")
        require(bool(self.shots) and min(self.shots) >= 1, self, "shots", "must be one or more numbers from 1")


# ---------------------------------------------------------------------------- images

_loaded = cache(load_dataset)  # once for all runs of one image size


def new_classes(run: TrainedRun, dataset: str, data_dir: Path | None) -> DataSet:
    """The data set of new classes, at the run's image size.

    Raises UserError if the run has been trained on one of the classes, or its model cannot read the images.
    """
    sizes = run.sizes
    known_task = task_of(run.config) in ("classification", "pretraining")
    if not known_task or not isinstance(getattr(sizes, "img_size", None), int):
        raise UserError(f"{run.checkpoint} does not classify images: give a run that does, or one of pretrain_bdh.py")
    if dataset in DATASETS and dataset not in OWN_FILES:
        elsewhere = run.train["dataset"] in OWN_FILES  # then --data-dir is the folder of the run's own images
        found = _loaded(dataset, None if elsewhere else data_dir, sizes.img_size, sizes.in_channels)
    elif Path(dataset).is_dir():
        found = _loaded("folder", Path(dataset), sizes.img_size, sizes.in_channels)
    else:
        raise UserError(f"--dataset {dataset} is neither a data set nor a folder: give cifar10, cifar100, or a folder")
    if found.train_images.shape[1:] != (sizes.in_channels, sizes.img_size, sizes.img_size):
        shapes = [" x ".join(map(str, shape)) for shape in (found.train_images.shape[1:], run_shape(run))]
        raise UserError(f"{dataset} has images of {shapes[0]}, and {run.checkpoint} reads {shapes[1]}: give other ones")
    names = () if isinstance(run.model, MaskedBDH) else run.config["data"].get("class_names", ())
    known = {name.casefold() for name in names}
    if shared := sorted(name for name in found.class_names if name.casefold() in known):
        more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
        raise UserError(
            f"{run.checkpoint} was trained on the class {shared[0]}{more} of {dataset}: few-shot learning is about new "
            "classes, choose others with --dataset"
        )
    share = run.train.get("eval_crop", 1.0)
    return found if isinstance(found.train_images, np.ndarray) else found.with_eval_crop(share)


def run_shape(run: TrainedRun) -> tuple[int, int, int]:
    """Channels, height and width of the model's images."""
    return run.sizes.in_channels, run.sizes.img_size, run.sizes.img_size


def labels_of(dataset: DataSet) -> np.ndarray:
    """(n,) classes of the test images, or of the training images if there is no test part."""
    return dataset.test_labels if len(dataset.test_labels) else dataset.train_labels


def batches_of(dataset: DataSet, numbers: np.ndarray, device: torch.device, text: str) -> Iterator[Tensor]:
    """The images of `labels_of` with these numbers, (B, C, S, S) in [-1, 1]. Raises UserError for a damaged file."""
    images = dataset.test_images if len(dataset.test_labels) else dataset.train_images
    for first in progress(range(0, len(numbers), BATCH), desc=text, unit="batch"):
        yield normalise(torch.from_numpy(read_images(images[numbers[first : first + BATCH]])).to(device))


def draw_episodes(labels: np.ndarray, way: int, per_class: int, episodes: int, seed: int) -> np.ndarray:
    """(episodes, way, per_class) numbers of images: random classes, and random images of each, none twice.

    labels: (n,). Raises UserError if there are too few classes, or images of a class.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if way > len(classes):
        raise UserError(f"--way {way} is more than the {len(classes)} classes of the data: give a smaller number")
    if per_class > counts.min():
        raise UserError(
            f"a class has {counts.min()} images, and an episode needs {per_class} (the most --shots, plus --queries): "
            "give smaller numbers"
        )
    rng = np.random.default_rng(seed)
    chosen = rng.permuted(np.tile(np.arange(len(classes)), (episodes, 1)), axis=1)[:, :way]
    drawn = np.empty((episodes, way, per_class), dtype=np.int64)
    for place, label in enumerate(classes):
        members, here = np.flatnonzero(labels == label), chosen == place
        order = rng.random((here.sum(), len(members))).argsort(1)[:, :per_class]
        drawn[here] = members[order]
    return drawn


# ---------------------------------------------------------------------------- measuring


def centred(features: Tensor, base: Tensor) -> Tensor:
    """Features less the mean of base, scaled to length 1: SimpleShot's CL2N. features: (n, F), base: (m, F)."""
    return F.normalize(features - base.mean(0), dim=1)


def episode_accuracies(features: Tensor, episodes: np.ndarray, shots: int, queries: int) -> np.ndarray:
    """(E,) share of each episode's queries whose nearest class mean (Euclidean) is that of their own class.

    features: (n, F). episodes: (E, way, images) numbers of features; the first `shots` of each class are labelled, the
    last `queries` are to be classified. Features that are all the same give 1 / way.
    """
    features = features.double()
    features = features - features.mean(0)  # changes no distance, and loses fewer digits below
    _, way, images = episodes.shape
    size, found = max(1, NUMBERS_AT_ONCE // (way * images * features.shape[1])), []
    for block in torch.from_numpy(episodes).to(features.device).split(size):
        picked = features[block]  # (e, way, images, F)
        means = picked[:, :, :shots].mean(2)  # (e, way, F)
        asked = picked[:, :, images - queries :].flatten(1, 2)  # (e, way * queries, F)
        nearness = 2 * asked @ means.mT - means.square().sum(-1)[:, None]  # |q|^2 is the same for all classes
        answers = nearness.argmax(-1).unflatten(1, (way, queries))
        right = answers == torch.arange(way, device=answers.device)[:, None]
        found.append(right.double().mean((1, 2)).cpu())
    return torch.cat(found).numpy()


def measure(features: Tensor, base: Tensor, episodes: np.ndarray, options: Options) -> Accuracies:
    """features: (n, F) of new images, which the episodes number; base: (m, F) of images of known classes."""
    versions = {"nearest_mean": features, "centred": centred(features, base)}
    return {
        (method, shots): episode_accuracies(version, episodes, shots, options.queries)
        for method, version in versions.items()
        for shots in options.shots
    }


def features_of(extract: Extract, batches: Iterable[Tensor]) -> Tensor:
    """(n, F) features of all images. Raises UserError if the model has none."""
    try:
        return torch.cat([extract(images) for images in batches])
    except TypeError as error:
        raise UserError(f"{error}: give a run that classifies images, or one of pretrain_bdh.py") from None


def sources_of(runs: dict[str, TrainedRun], untrained: bool) -> Iterator[tuple[Source, TrainedRun, Extract]]:
    """Raw pixels, at the first run's image size, then each run as trained and before training."""
    yield (PIXELS, ""), next(iter(runs.values())), partial(torch.flatten, start_dim=1)
    for name, run in runs.items():
        yield (name, TRAINED), run, partial(head_input, run.model)
        if untrained:
            yield (name, UNTRAINED), run, partial(head_input, run.untrained_model())


def measure_all(runs: dict[str, TrainedRun], options: Options) -> dict[Source, Accuracies]:
    """Accuracies of raw pixels and of every run, on the same episodes. Raises UserError."""
    datasets = {name: new_classes(run, options.dataset, options.data_dir) for name, run in runs.items()}
    labels = labels_of(next(iter(datasets.values())))
    per_class = max(options.shots) + options.queries
    drawn = draw_episodes(labels, options.way, per_class, options.episodes, options.seed)
    used, places = np.unique(drawn, return_inverse=True)
    results = {}
    for (name, weights), run, extract in sources_of(runs, options.untrained):
        dataset = datasets.get(name) or next(iter(datasets.values()))
        new = features_of(extract, batches_of(dataset, used, run.device, f"{name} {weights}".strip()))
        known = run.training_batches(run.choose_training_images(BASE_IMAGES), BATCH)
        base = features_of(extract, (images for images, _ in known))
        results[name, weights] = measure(new, base, places.reshape(drawn.shape), options)
    return results


# ---------------------------------------------------------------------------- tables and figure


def tabulate(results: dict[Source, Accuracies], options: Options) -> pd.DataFrame:
    """A row per features, method and number of shots: accuracy with its interval, and the differences, paired by
    episode, to raw pixels, to the same model before training and to the first run (NaN where there is none)."""
    first, rows = next(name for name, weights in results if weights == TRAINED), []
    for (name, weights), by_setting in results.items():
        others = {"pixels": None if name == PIXELS else (PIXELS, "")}
        others["untrained"] = (name, UNTRAINED) if weights == TRAINED else None
        others["first_run"] = (first, TRAINED) if weights == TRAINED and name != first else None
        for (method, shots), values in by_setting.items():
            row = dict(features=name, weights=weights, method=method, way=options.way, shots=shots)
            row |= _interval("accuracy", values)
            for title, other in others.items():
                of_other = results.get(other, {}).get((method, shots))
                row |= _interval(f"over_{title}", None if of_other is None else values - of_other)
            rows.append(row | dict(queries=options.queries, episodes=options.episodes, seed=options.seed))
    return pd.DataFrame(rows)


def _interval(name: str, values: np.ndarray | None) -> dict[str, float]:
    """Three columns. values: (E,), or None for NaN."""
    ends = (np.nan,) * 3 if values is None else map(float, mean_interval(values))
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))


def markdown(table: pd.DataFrame, title: str) -> list[str]:
    """Accuracies, and below them the differences of the trained models."""
    lines = ["# Few-shot learning", "", title, ""]
    lines += markdown_table(
        ["features", *(f"{shots}-shot, {method}" for method in METHODS for shots in table["shots"].unique())],
        [
            [_label(*source), *(_plus_minus(row, "accuracy") for _, row in rows.iterrows())]
            for source, rows in table.groupby(["features", "weights"], sort=False)
        ],
        left=("features",),
    )
    names = ["over_pixels", "over_untrained", "over_first_run"]
    titles = ["run", "method", "shots", *(name.replace("_", " ") for name in names)]
    trained = table[table["weights"] == TRAINED]
    cells = [
        [row["features"], row["method"], str(row["shots"]), *(_plus_minus(row, name, "+") for name in names)]
        for _, row in trained.iterrows()
    ]
    lines += ["", "Differences in points, paired by episode:", "", *markdown_table(titles, cells, ("run", "method"))]
    about = "; ".join(f"{name}: {text}" for name, text in METHODS.items())
    return [*lines, "", f"Accuracies in percent with the half width of their 95 % interval over episodes. {about}."]


def _plus_minus(row: pd.Series, name: str, sign: str = "") -> str:
    if np.isnan(row[name]):
        return ""
    return f"{100 * row[name]:{sign}.2f} ± {50 * (row[f'{name}_high'] - row[f'{name}_low']):.2f}"


def _label(name: str, weights: str) -> str:
    return f"{name}, {UNTRAINED}" if weights == UNTRAINED else name


def draw(table: pd.DataFrame, way: int, title: str) -> Figure:
    """A panel per number of shots: accuracy of each kind of features by both methods, with intervals, and chance."""
    sources = list(table.groupby(["features", "weights"], sort=False).groups)
    shots = table["shots"].unique().tolist()
    figure = titled_figure(PAGE, 1.1 + 0.28 * len(sources), title)
    axes = figure.subplots(1, len(shots), sharex=True, sharey=True, squeeze=False)[0]
    for ax, number in zip(axes, shots, strict=True):
        for shift, (method, label), color, marker in zip((-0.14, 0.14), METHODS.items(), COLORS, "os", strict=False):
            rows = table[(table["shots"] == number) & (table["method"] == method)]
            values = 100 * rows["accuracy"]
            half = 50 * (rows["accuracy_high"] - rows["accuracy_low"])
            look = dict(color=color, fmt=marker, markersize=4, linewidth=1, label=label)
            ax.errorbar(values, np.arange(len(rows)) + shift, xerr=half, **look)
        ax.axvline(100 / way, color="0.6", linestyle=":", label="chance")
        style_axes(ax, "x")
        ax.set(title=f"{number} labelled image{'s' * (number != 1)} a class", xlabel="accuracy (%)")
        ax.set_yticks(range(len(sources)), [plain_text(_label(*source)) for source in sources])
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def main(options: Options) -> None:
    runs = open_several(options, any_model=True)
    results = measure_all(runs, options)
    table = tabulate(results, options).round(DIGITS)
    name = Path(options.dataset).name or "folder"
    title = (
        f"{name}, {options.way} classes at a time, {options.episodes:,} episodes of {options.queries} queries a class"
    )
    changed = changed_fields(Options(), options)  # the settings that are not the default ones, in the files' names
    settings = [f"{key}={in_a_name(changed[key])}" for key in SETTINGS if key in changed]
    path = several_folder(options, runs) / cut_name("_".join(["few_shot", name, *settings]))
    lines = markdown(table, title)
    pictures = save_figure(draw(table, options.way, f"{title}; 95 % intervals"), path)
    print(*lines, "", "->", *pictures, *write_tables(path, table, lines), sep="\n")


if __name__ == "__main__":
    run_script(main, __doc__)
