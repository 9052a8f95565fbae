"""Folders of finished runs as `training` leaves them, at the configuration that a script and its flags ask for."""

import json

import numpy as np
import pandas as pd

from analysis.published import asked_of, read_published

GPU = {"device": "cuda", "name": "GPU X", "memory_gb": 8.0}
IMAGES = {"cifar10": (40_000, 10_000, 10_000), "cifar100": (40_000, 10_000, 10_000), "camvid": (367, 101, 0)}
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
    name=None,
    finished=True,
    images=None,
    curve=None,
    hardware=GPU,
    **fields,
):
    """Writes a run that a script made with these flags.

    test: its test accuracy; curve: (epochs,) val_miou and val_miou_batch of a segmentation run. Keywords are fields of
    model or training that are stored in place of the script's; those that are ... are not stored.
    """
    asked = asked_of(script, flags)
    config = json.loads(json.dumps(asked.fields()))
    for part in config.values():
        part |= {key: value for key, value in fields.items() if key in part}
    config["train"]["seed"] = seed
    config = {key: {k: v for k, v in part.items() if v is not ...} for key, part in config.items()}
    data = asked.train.dataset
    about = {"experiment": name or asked.name, "config": config, "model_class": type(asked.model).__name__}
    about |= {"data": {"name": data}, "parameters": 3_562_570, "hardware": hardware}
    epochs = pd.DataFrame({"epoch": range(1, config["train"]["epochs"] + 1), "train_loss": 0.5, "val_loss": 0.6})
    if data == "camvid":
        epochs["val_miou"], epochs["val_miou_batch"] = curve or (np.linspace(0.3, 0.5, len(epochs)),) * 2
    else:
        epochs["val_accuracy"] = np.linspace(0.3, 0.8, len(epochs))
    metric = epochs.columns[3]
    best = epochs.loc[epochs[metric].idxmax()]
    folder.mkdir(parents=True)
    epochs.assign(epoch_time_sec=50.0).to_csv(folder / "metrics.csv", index=False)
    (folder / "config.json").write_text(json.dumps(about))
    if finished:
        summary = {"test": None if data == "camvid" else {"loss": 0.6, "accuracy": test}, "epochs": len(epochs)}
        summary["best"] = {"epoch": int(best["epoch"]), metric: best[metric]}
        summary["images"] = dict(zip(PARTS, images or IMAGES[data], strict=True))
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_seeds(results, tests, script="train_v2_cifar10.py", flags="", name=None, **changed):
    """A run for each test accuracy, with seeds from 0, in results/<experiment>/seed<k>."""
    name = name or asked_of(script, flags).name
    for seed, test in enumerate(tests):
        write_run(results / name / f"seed{seed}", script, flags, seed, test, **changed)
