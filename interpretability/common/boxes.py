"""What a detection model finds in an image, drawn."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from analysis.plotting.style import PAGE, plain_text, titled_figure
from models.vision_bdh import ImageSize
from training.augment import normalise
from training.config import UserError
from training.data import data_folder
from training.data.boxes import Boxes, find_scenes
from training.data.segmentation import scale_image
from training.detection import predictions

PANEL_INCHES = PAGE / 2
TALLEST_PANEL = 2  # height of a panel in widths; taller images are drawn narrower


def as_input(image: np.ndarray, img_size: ImageSize, device: torch.device) -> Tensor:
    """An image for a model that segments or detects. (h, w, 3) uint8 -> (1, 3, height, width) in [-1, 1]."""
    return normalise(torch.from_numpy(scale_image(image, img_size)).to(device).permute(2, 0, 1)[None])


def detect(model: nn.Module, image: np.ndarray, img_size: ImageSize, device: torch.device, least: float) -> np.ndarray:
    """Boxes with a probability of at least `least`, the most probable first. image: (h, w, 3) uint8 of any size.

    Returns (n, 6): class, probability, and the box as in `bdh_detector.Detections`.
    """
    with torch.inference_mode():
        found = predictions(model(as_input(image, img_size, device)))[0].cpu().numpy()
    found = found[found[:, 1] >= least]
    return found[np.argsort(-found[:, 1])]


def find_boxes(name: str, data_dir: Path | None, class_names: Sequence[str]) -> dict[Path, Boxes]:
    """The boxes of every image of the data set, by the image's resolved path.

    None if its files are not there, or have other classes, which is said on stderr.
    """
    try:
        files = find_scenes(folder := data_folder(name, data_dir))
    except UserError:
        return {}
    if list(files.class_names) != list(class_names):
        print(f"warning: no ground truth is drawn: {folder} has other classes than the run", file=sys.stderr)
        return {}
    return {
        path.resolve(): boxes
        for part in files.parts.values()
        for path, boxes in zip(part.paths, part.boxes, strict=True)
    }


def draw_boxes(
    image: np.ndarray, found: np.ndarray, truth: Boxes | None, class_names: Sequence[str], title: str
) -> Figure:
    """The image with what was found, and beside it with what is there. image: (h, w, 3) uint8.

    found: as `detect` returns it; truth: (n, 6) as in `training.data.boxes`.
    """
    panels = {"found": [(f"{class_names[int(label)]} {p:.0%}", label, box) for label, p, *box in found]}
    if truth is not None:
        panels["truth"] = [
            (class_names[int(label)] + " (crowd)" * int(crowd), label, box) for label, *box, crowd in truth
        ]
    shape = min(image.shape[0] / image.shape[1], TALLEST_PANEL)
    figure = titled_figure(PANEL_INCHES * len(panels), PANEL_INCHES * shape + 0.3, title)
    for ax, (name, boxes) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        ax.imshow(image)
        ax.set_title(f"{name}: {len(boxes)}")
        ax.set_axis_off()
        _outline(ax, boxes, image.shape[:2])
    return figure


def _outline(ax: Axes, boxes: Iterable[tuple[str, float, Sequence[float]]], size: tuple[int, int]) -> None:
    """boxes: text, class, and centre and size as shares of the image. size: the image's height and width."""
    height, width = size
    for text, label, (x, y, w, h) in boxes:
        colour = f"C{int(label) % 10}"
        corner = ((x - w / 2) * width - 0.5, (y - h / 2) * height - 0.5)  # imshow has centres of pixels at integers
        ax.add_patch(Rectangle(corner, w * width, h * height, fill=False, edgecolor=colour, linewidth=1.5))
        style = dict(facecolor=colour, edgecolor="none", alpha=0.8, pad=1)
        ax.text(*corner, plain_text(text), color="white", fontsize=6, va="bottom", bbox=style, clip_on=True)
