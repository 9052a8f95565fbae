"""Draws what a segmentation or detection model predicts for images, and the ground truth beside it.

Takes image files or folders of them and writes one picture for each. The ground truth is shown for images of the run's
data set, and for images in CamVid's layout (DIR/val/NAME.png with DIR/valannot/NAME.png); its void pixels are not
scored. Images are scaled to the size that the model was trained at, and predictions back to the image's size. A run
trained with --eval-flip or --eval-scales predicts with them, too. Of a detection run, boxes with a probability of at
least --threshold are drawn.

    python interpretability/predict.py data_camvid/val --run runs/bdh_unet/seed0
    python interpretability/predict.py street.jpg --run runs/bdh_unet/seed0/last.pt --output-dir pictures
    python interpretability/predict.py street.jpg --run runs/bdh_detector/seed0
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analysis.plotting.style import PAGE, save_png, titled_figure
from interpretability.common.boxes import as_input, detect, draw_boxes, find_boxes
from interpretability.common.image_choice import ImagePaths, image_files, picture_names, raise_for_bad
from interpretability.common.trained import Places, TrainedRun, progress
from models.vision_bdh import ImageSize
from training.command_line import run_script
from training.config import ROOT, UserError, require
from training.data import data_folder
from training.data.classes import CLASSES, Classes
from training.data.finding import printable
from training.data.mask_files import BadFile, MaskFiles, Pair, read_image
from training.data.masks import find_masks
from training.data.segmentation import read_pair
from training.metrics import confusion_matrices, confusion_ratios
from training.stored import task_of
from training.views import Predict

PANEL_INCHES = PAGE / 3
LEGEND_CLASSES = 30
TALLEST_PANEL = 3  # height of a panel in widths; taller images are drawn narrower


@dataclass(frozen=True, kw_only=True)
class Options(Places):
    """What to predict, and with which model."""

    images: ImagePaths
    """image files, or folders with images at any depth"""
    run: Path
    """run folder, such as runs/bdh_unet/seed0, or a checkpoint in it"""
    output_dir: Path = ROOT / "predictions"
    """pictures are written to a subfolder named after the run (and the checkpoint, if one is given)"""
    threshold: float = 0.5
    """detection: draw boxes with at least this probability"""

    def __post_init__(self):
        require(0 <= self.threshold <= 1, self, "threshold", "must be between 0 and 1")


def predict(answer: Predict, image: np.ndarray, img_size: ImageSize, device: torch.device) -> np.ndarray:
    """The most probable class of every pixel. image: (h, w, 3) uint8 of any size -> (h, w) uint8.

    answer: the model, or what asks it in several views (`TrainedRun.answer`).
    """
    with torch.inference_mode():
        logits = answer(as_input(image, img_size, device)).float()
        logits = F.interpolate(logits, size=image.shape[:2], mode="bilinear", align_corners=False)
    return logits[0].argmax(0).to(torch.uint8).cpu().numpy()


def draw(image: np.ndarray, predicted: np.ndarray, truth: np.ndarray | None, classes: Classes, title: str) -> Figure:
    """Panels, and a legend of the classes in them. image: (h, w, 3) uint8; predicted, truth: (h, w) labels."""
    panels = {"image": image, _scored("prediction", predicted, truth, classes): classes.palette[predicted]}
    if truth is not None:
        panels["truth"] = classes.palette[truth]
    handles = _legend([predicted] if truth is None else [predicted, truth], classes)
    legend_columns = 2 * len(panels)
    legend_rows = -(-len(handles) // legend_columns)
    panel_height = PANEL_INCHES * min(image.shape[0] / image.shape[1], TALLEST_PANEL)
    figure = titled_figure(PANEL_INCHES * len(panels), panel_height + 0.45 + 0.2 * legend_rows, title)
    for ax, (name, pixels) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        ax.imshow(pixels, interpolation="nearest")
        ax.set_title(name)
        ax.set_axis_off()
    layout = dict(loc="outside lower center", ncols=legend_columns, columnspacing=1.5, handlelength=1.2)
    figure.legend(handles=handles, frameon=False, **layout)
    return figure


def _legend(maps: list[np.ndarray], classes: Classes) -> list[Patch]:
    """The classes in the maps (h, w) in their order; of many, the LEGEND_CLASSES with most pixels."""
    pixels = np.bincount(np.stack(maps).ravel(), minlength=classes.void + 1)
    shown = sorted(label for label in np.argsort(-pixels, kind="stable")[:LEGEND_CLASSES] if pixels[label])
    names = [*classes.names, "void"]
    handles = [Patch(facecolor=classes.palette[k] / 255, edgecolor="0.5", label=names[k]) for k in shown]
    if (more := np.count_nonzero(pixels) - len(shown)) > 0:
        handles.append(Patch(facecolor="none", edgecolor="none", label=f"and {more} more"))
    return handles


def _scored(name: str, predicted: np.ndarray, truth: np.ndarray | None, classes: Classes) -> str:
    """The panel's name, with this image's scores if there is a truth."""
    if truth is None or (truth == classes.void).all():
        return name
    labels = (torch.from_numpy(each)[None].long() for each in (predicted, truth))
    ratios = confusion_ratios(confusion_matrices(*labels, len(classes.names))[0].tolist(), classes.names)
    return f"{name}: {ratios['pixel_accuracy']:.0%} of pixels right, mIoU {ratios['miou']:.0%}"


def find_truth(name: str, data_dir: Path | None, files: Iterable[Path]) -> dict[Path, tuple[Pair, MaskFiles]]:
    """Image and mask files by the image's resolved path, from the data set called name and folders around the files."""
    paths = [each for path in files for each in (path.absolute(), path.resolve())]  # a link's folder, and its target's
    around = [path.parent.parent for path in paths] if name == "camvid" else []
    found = {}
    for place in {place.resolve(): place for place in [*around, data_folder(name, data_dir)]}:
        try:
            data = find_masks(name, place, download=False)
        except UserError:  # not a folder of this data set
            continue
        found |= {pair.image.resolve(): (pair, data) for part in data.pairs.values() for pair in part}
    return found


Drawing = tuple[Figure, bool]  # a picture, and whether it shows a ground truth


def draw_masks(run: TrainedRun, masks: dict[Path, tuple[Pair, MaskFiles]], path: Path) -> Drawing:
    """The picture of a segmentation run. Raises BadFile."""
    image, truth = read_image(path), None
    if path.resolve() in masks:
        truth = read_pair(*masks[path.resolve()])[1]
    predicted = predict(partial(run.answer, run.model), image, run.sizes.img_size, run.device)
    title = f"{printable(path.name)}: {run.title}"
    return draw(image, predicted, truth, CLASSES[run.train["dataset"]], title), truth is not None


def draw_detections(run: TrainedRun, boxes: dict[Path, np.ndarray], threshold: float, path: Path) -> Drawing:
    """The picture of a detection run. Raises BadFile."""
    image, truth = read_image(path), boxes.get(path.resolve())
    found = detect(run.model, image, run.sizes.img_size, run.device, threshold)
    title = f"{printable(path.name)}: {run.title}"
    return draw_boxes(image, found, truth, run.config["data"]["class_names"], title), truth is not None


def main(options: Options) -> None:
    files = image_files(options.images)
    run = TrainedRun(options.run, options.data_dir, options.device, any_model=True)
    name = run.train.get("dataset", "")
    draw_one: Callable[[Path], Drawing]
    if run.labels_pixels:
        masks = find_truth(name, options.data_dir, files)
        of_data = {pair.mask.resolve() for pair, _ in masks.values()}
        files = [path for path in files if path.resolve() not in of_data]
        draw_one = partial(draw_masks, run, masks)
    elif task_of(run.config) == "detection":
        truth = find_boxes(name, options.data_dir, run.config["data"]["class_names"])
        draw_one = partial(draw_detections, run, truth, options.threshold)
    else:
        raise UserError(f"{options.run} is not a segmentation or detection run: give one, as runs/bdh_unet/seed0")
    if not files:
        raise UserError("these are masks, not images: name image files, or folders that contain some")
    output = options.output_dir / run.file_name(run.stem)
    with_truth, bad = 0, []
    for path, picture in progress(list(zip(files, picture_names(files), strict=True)), unit="img"):
        try:
            figure, has_truth = draw_one(path)
        except BadFile as error:
            bad.append(str(error))
            continue
        save_png(figure, output / picture)
        with_truth += has_truth
    n = len(files) - len(bad)
    if n:
        print(f"{options.run}\n-> {output}: {n} picture{'s' * (n != 1)}, {with_truth} with ground truth")
    raise_for_bad(bad, n, "drawn")


if __name__ == "__main__":
    run_script(main, __doc__)
