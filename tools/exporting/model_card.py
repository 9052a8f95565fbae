"""The model card of a run: what it was trained on and how, how good it is, what it is for.

Everything in it is read from config.json and summary.json.
"""

import json
from pathlib import Path
from typing import Any

from analysis.tables import accuracy_interval
from training.metrics import METRICS
from training.stored import EXPORTED, configuration_of, hardware_of, read_config, read_summary, task_of
from training.views import views_text

DATA = {  # name, where it is described, what its publishers say about its use
    "digits": (
        "Optical Recognition of Handwritten Digits, scikit-learn's copy",
        "https://archive.ics.uci.edu/dataset/80",
        "CC BY 4.0",
    ),
    "cifar10": (
        "CIFAR-10",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        "no licence stated; its page asks to cite Krizhevsky 2009",
    ),
    "cifar100": (
        "CIFAR-100",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        "no licence stated; its page asks to cite Krizhevsky 2009",
    ),
    "camvid": (
        "CamVid",
        "http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/",
        "no licence stated; its page asks to cite Brostow et al. 2008 and 2009",
    ),
    "voc": (
        "Pascal VOC 2012",
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
        "images from Flickr, under its terms of use",
    ),
    "cityscapes": ("Cityscapes", "https://www.cityscapes-dataset.com/license/", "non-commercial use only"),
    "ade20k": ("ADE20K", "https://groups.csail.mit.edu/vision/datasets/ADE20K/terms/", "non-commercial use only"),
}
USES = {
    "classification": ("image-classification", "classifying small images into the classes above"),
    "video": ("video-classification", "classifying short clips into the classes above"),
    "segmentation": ("image-segmentation", "naming the class of every pixel of street or everyday scenes"),
    "detection": ("object-detection", "finding objects of the classes above in images"),
    "pretraining": ("image-feature-extraction", "starting another training from it"),
    "text": ("text-generation", "continuing text, byte by byte"),
}
OTHER_USE = ("other", "the task that it was trained for")
READS = {  # by task: what the samples are called, and what the model reads
    "images": ("images", "images (B, C, height, width) in [-1, 1]"),
    "video": ("clips", "clips (B, frames * 3, height, width) in [-1, 1]"),
    "text": ("text", "bytes as integers (B, T)"),
}
RECIPE = ("epochs", "batch_size", "optimizer", "learning_rate", "weight_decay", "precision", "train_limit", "seed")


def model_card(folder: Path) -> str:
    """Markdown with the metadata that the Hugging Face Hub reads. folder: of a finished run. Raises Damaged."""
    config, summary = read_config(folder), read_summary(folder)
    configuration = configuration_of(config)
    task = task_of(config)
    tag, use = USES.get(task, OTHER_USE)
    name, url, licence = DATA.get(config["data"]["name"], (config["data"]["name"], None, "as its owner says"))
    train = configuration.train
    model = configuration.model_class.removesuffix("Config")
    samples, reads = READS.get(task, READS["images"])
    lines = [
        *_metadata(tag, config["data"]["name"]),
        "",
        f"# {config['experiment'].replace('+', ', ')}, seed {train['seed']}",
        "",
        f"{model}, {summary['parameters']:,} parameters: the Baby Dragon Hatchling (arXiv 2509.26507) on {samples}."
        if "BDH" in model
        else f"{model}, {summary['parameters']:,} parameters: a baseline of Vision-BDH.",
        "",
        "| | |",
        "| --- | --- |",
        f"| data | {f'[{name}]({url})' if url else name} |",
        f"| licence of the data | {licence} |",
        f"| {samples} | {_counts(summary, config)} |",
        *_results(summary, task, samples),
        *_training(summary, config, train),
        "",
        f"**Intended use:** research, and {use}. Anything unlike the {samples} of {name} gets",
        "an answer, too, and it means nothing.",
        "No part of the training looks at bias; do not use the answers to decide about people.",
        "",
        f"`{EXPORTED}` holds the parameters in bf16 (the results above were measured with float32 weights, before",
        f"rounding, with --precision {train['precision']}), `config.json` every field of the model and its training.",
        "",
        "With Python in a checkout of Vision-BDH whose requirements.txt is installed:",
        "",
        "```python",
        "from pathlib import Path",
        "",
        "from training.runs import load_model",
        "",
        'model, config = load_model(Path("FOLDER OF THIS FILE"))  # reads ' + reads,
        "```",
    ]
    return "\n".join(lines) + "\n"


def _metadata(tag: str, data: str) -> list[str]:
    known = [f"datasets: [{json.dumps(data)}]"] if data in DATA else []
    return ["---", "license: mit", f"pipeline_tag: {tag}", "tags: [vision-bdh]", *known, "---"]


def _counts(summary: dict[str, Any], config: dict[str, Any]) -> str:
    counts = summary.get("images") or config["data"].get("images") or {}
    words = {"train": "to train", "val": "to validate", "test": "to test"}
    return ", ".join(f"{n:,} {words.get(part, part)}" for part, n in counts.items()) or "unknown"


def _training(summary: dict[str, Any], config: dict[str, Any], train: dict[str, Any]) -> list[str]:
    """Rows on how the weights came about. train: the run's training configuration."""
    chosen = "the last one" if train.get("train_val") else "the best on the validation part"
    classes = config["data"].get("class_names")
    return [
        f"| weights of | epoch {summary['best']['epoch']} of {summary['epochs']}, {chosen} |",
        f"| training | {', '.join(f'{key} {train[key]}' for key in RECIPE if train.get(key) is not None)} |",
        f"| started from | {_origin(config)} |",
        f"| hardware | {', then '.join(dict.fromkeys(each['name'] for each in hardware_of(config)))} |",
        f"| commit | {config.get('commit') or 'unknown'} |",
        *([f"| classes | {', '.join(classes)} |"] if classes else []),
    ]


def _origin(config: dict[str, Any]) -> str:
    """What the training started from: a file, a library's weights, or nothing."""
    origin = config.get("origin") or {}
    if "library" in origin:
        return f"{origin['library']} weights of the encoder, random ones of the rest"
    if "taken" in origin:
        return f"the encoder of {origin['file']}, random weights of the rest"
    return origin.get("file", "random weights")


def _results(summary: dict[str, Any], task: str, samples: str) -> list[str]:
    """Rows with the test result, or the best validation result where the data have no test part."""
    part, prefix = ("test", "") if summary["test"] else ("val", "val_")
    values = summary["test"] or summary["best"]
    metric = next((METRICS[key] for key in METRICS if key != "loss" and f"{prefix}{key}" in values), None)
    if metric is None:
        return []
    value, n = values[f"{prefix}{metric.key}"], summary.get("images", {}).get(part)
    interval = ""
    if metric.key == "accuracy" and n and part == "test":  # the best of many epochs has no such interval
        low, high = accuracy_interval(round(value * n), n)
        interval = f" (95 % interval over test {samples}: {metric.number(low)} to {metric.number(high)})"
    if views := views_text(summary, task):
        interval += f", {views}"
    where = "test" if part == "test" else "best validation"
    return [f"| {where} {metric.title} | {metric.number(value)}{interval} |"]
