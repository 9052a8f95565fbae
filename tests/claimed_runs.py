"""Folders of runs as `training` leaves them, with the configuration of a script and its flags."""

import json

import numpy as np
import pandas as pd

from training import SegmentationConfig
from analysis.published import read_published
from training.command_line import experiment_of
from training.metrics import METRICS

# 97.5 % quantiles of Student's t by n, of a printed table with n - 1 degrees of freedom
T_975 = {2: 12.7062047, 3: 4.30265273, 5: 2.77644511, 10: 2.26215716}
GPU = {"device": "cuda", "name": "GPU X", "memory_gb": 8.0}
IMAGES = {"camvid": (367, 101, 0), "voc": (1464, 1449, 0)}  # others: as CIFAR
PARTS = ("train", "val", "test")


def published(name, source="spec_current", dataset=None):
    """The row of published_results.csv with that published name."""
    lines = [line for line in read_published() if (line.source, line.experiment) == (source, name)]
    (line,) = [line for line in lines if dataset in (None, line.dataset)]
    return line


def write_run(
    folder,
    script,
    flags="",
    seed=0,
    test=0.8,
    metric="accuracy",
    name=None,
    finished=True,
    images=None,
    columns=None,
    hardware=GPU,
    parameters=3_562_570,
    **fields,
):
    """Writes a run that a script made with these flags; returns its folder.

    test: result of the test, None for data without a test part. metric: of runs but segmentation's. columns: of
    metrics.csv, one value an epoch, beside or in place of the usual ones. Keywords are fields of model or training that
    are stored in place of the script's; those that are ... are not stored.
    """
    asked = experiment_of(script, flags)
    config = json.loads(json.dumps(asked.configuration.fields()))
    for part in config.values():
        part |= {key: value for key, value in fields.items() if key in part}
    config["train"]["seed"] = seed
    config = {key: {k: v for k, v in part.items() if v is not ...} for key, part in config.items()}
    data = config["train"]["dataset"]
    images = dict(zip(PARTS, images or IMAGES.get(data, (40_000, 10_000, 10_000)), strict=True))
    about = {"experiment": name or asked.name, "config": config, "model_class": type(asked.model).__name__}
    about |= {"data": {"name": data, "images": images}, "parameters": parameters, "hardware": hardware}

    metrics = ["miou", "miou_batch"] if isinstance(asked.train, SegmentationConfig) else [metric]
    n = len(next(iter(columns.values()))) if columns else config["train"]["epochs"]
    usual = {"epoch": range(1, n + 1), "train_loss": 0.5, "val_loss": 0.6}
    usual |= {f"val_{metric}": np.linspace(0.3, 0.5, n) for metric in metrics}
    usual |= {"learning_rate": 1e-4, "epoch_time_sec": 50.0, "images_per_sec": 800.0, "peak_memory_mb": 1200.0}
    epochs = pd.DataFrame(usual | (columns or {}))
    folder.mkdir(parents=True)
    epochs.to_csv(folder / "metrics.csv", index=False)
    (folder / "config.json").write_text(json.dumps(about))
    if finished:
        key = f"val_{metrics[0]}"
        best = epochs.loc[epochs[key].idxmax() if METRICS[metrics[0]].higher_is_better else epochs[key].idxmin()]
        summary = {"test": {"loss": 0.6, metrics[0]: test}, "epochs": n, "parameters": parameters, "images": images}
        summary["best"] = {"epoch": int(best["epoch"]), "val_loss": best["val_loss"], key: best[key]}
        summary["test"] = None if test is None or not images["test"] else summary["test"]
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_seeds(results, tests, script="train_v2_cifar10.py", flags="", name=None, **changed):
    """A run for each test accuracy, with seeds from 0, in results/<experiment>/seed<k>."""
    name = name or experiment_of(script, flags).name
    for seed, test in enumerate(tests):
        write_run(results / name / f"seed{seed}", script, flags, seed, test, **changed)
