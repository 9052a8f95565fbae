"""Classifies image files with a trained model: the most probable classes of each, as a picture and as a table.

Takes image files or folders of them, of any size and format that Pillow reads: turned upright by their EXIF
orientation, transparent pixels on white, 16 bits a channel scaled to 8. Each is scaled until its shorter side has the
model's size, then center-cropped, as in training; a run with --eval-flip or --eval-scales answers as it was evaluated.
Writes one row per image to classes.csv, and a picture of each file that is named itself (images found in a folder go
into the table only).

    python interpretability/classify.py cat.jpg truck.png --run runs/v2_cifar10/seed0
    python interpretability/classify.py photos --run runs/v2_cifar10/seed0 --top 3
"""

import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from matplotlib.figure import Figure

from analysis.plotting.style import PAGE, plain_text, save_png, titled_figure
from interpretability.common.image_choice import ImagePaths, image_files, picture_names, raise_for_bad
from interpretability.common.trained import Places, TrainedRun, progress
from training.command_line import run_script
from training.config import ROOT
from training.data.finding import printable
from training.data.image_files import ImageFiles, UnreadableImage
from training.files import written_whole

TABLE = "classes.csv"


@dataclass(frozen=True, kw_only=True)
class Options(Places):
    """What to classify, and with which model."""

    images: ImagePaths
    """image files, or folders with images at any depth"""
    run: Path
    """run folder, such as runs/v2_cifar10/seed0, or a checkpoint in it"""
    top: int = 5
    """number of classes to list per image"""
    batch_size: int = 64
    """images per forward pass"""
    output_dir: Path = ROOT / "predictions"
    """results are written to a subfolder named after the run (and the checkpoint, if one is given)"""

    def __post_init__(self):
        for name in ("top", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class Answer:
    """What the model says of one image."""

    path: Path
    pixels: np.ndarray
    """(C, S, S) uint8, what the model sees"""
    classes: list[str]
    """the most probable first"""
    probabilities: list[float]


def classify(run: TrainedRun, files: Sequence[Path], top: int, batch_size: int, bad: list[str]) -> Iterator[Answer]:
    """Answers for the files, in order. bad: receives one message for each file that cannot be read."""
    share = run.train.get("eval_crop", 1.0)
    images = ImageFiles([str(path) for path in files], run.sizes.img_size, run.sizes.in_channels, share, deep=True)
    names = run.config["data"].get("class_names") or run.class_names
    for first in progress(range(0, len(files), batch_size)):
        read = {}
        for place in range(first, min(first + batch_size, len(files))):
            try:
                read[place] = images[place]
            except UnreadableImage as error:
                bad.append(str(error))
        if not read:
            continue
        with torch.inference_mode():
            logits = run.answer(run.model, run.pixels(torch.from_numpy(np.stack(list(read.values())))))
        best = logits.float().softmax(-1).topk(min(top, logits.shape[-1]))
        for place, values, numbers in zip(read, best.values.tolist(), best.indices.tolist(), strict=True):
            yield Answer(files[place], read[place], [names[number] for number in numbers], values)


def draw(answer: Answer, title: str) -> Figure:
    """The image as the model sees it, and a bar for each class."""
    figure = titled_figure(PAGE, 2.6, f"{printable(answer.path.name)}: {title}")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    left.imshow(answer.pixels.transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    left.set_axis_off()
    places = range(len(answer.classes))
    bars = right.barh(places, answer.probabilities)
    right.bar_label(bars, [f"{value:.1%}" for value in answer.probabilities], padding=3)
    right.set_yticks(places, map(plain_text, answer.classes))
    right.invert_yaxis()
    right.set_xlim(0, 1.15)
    right.set_xlabel("probability")
    return figure


def write_table(path: Path, answers: Sequence[Answer]) -> None:
    """One row per image: file, class_1, probability_1, class_2, ..."""
    ranks = range(1, len(answers[0].classes) + 1)
    with (
        written_whole(path) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", *(f"{word}_{rank}" for rank in ranks for word in ("class", "probability"))])
        for answer in answers:
            pairs = zip(answer.classes, answer.probabilities, strict=True)
            writer.writerow([answer.path, *(cell for name, value in pairs for cell in (name, f"{value:.6f}"))])


def main(options: Options) -> None:
    files = image_files(options.images)
    run = TrainedRun(options.run, options.data_dir, options.device, any_model=True)
    run.require_classifier()
    output = options.output_dir / run.file_name(run.stem)
    bad: list[str] = []
    answers = list(classify(run, files, options.top, options.batch_size, bad))
    if answers:
        write_table(output / TABLE, answers)
    named = {path.resolve() for path in options.images if path.is_file()}
    pictures = dict(zip(files, picture_names(files), strict=True))
    for answer in answers:
        best = ", ".join(f"{name} {p:.1%}" for name, p in zip(answer.classes, answer.probabilities, strict=True))
        if answer.path.resolve() in named:
            print(f"{answer.path}: {best}")
            save_png(draw(answer, run.title), output / pictures[answer.path])
    if answers:
        print(f"-> {output}: {len(answers)} image{'s' * (len(answers) != 1)} in {TABLE}")
    raise_for_bad(bad, len(answers), "classified")


if __name__ == "__main__":
    run_script(main, __doc__)
