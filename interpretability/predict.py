"""What a trained segmentation model says of images: image, prediction and truth side by side, in the data's colours.

Takes image files, or folders of them, and writes one picture each. The truth is shown where the image lies in the data
set that the run was trained on, or in CamVid's layout (DIR/val/NAME.png with DIR/valannot/NAME.png); pixels that are
void in it count nowhere. Images are scaled to the size that the model was trained at, and the prediction back to
theirs.

    python interpretability/predict.py data_camvid/val --run runs/bdh_unet/seed0
    python interpretability/predict.py street.jpg --run runs/bdh_unet/seed0/last.pt --output-dir pictures
"""

import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import nn
from tqdm import tqdm

from analysis.plotting.style import DPI, PAGE, new_figure
from interpretability.common.trained import stem_of, title_of, with_checkpoint
from models import build_config
from models.vision_bdh import ImageSize
from training.augment import normalise
from training.command_line import run_script
from training.config import ROOT, UserError
from training.data import data_folder
from training.data.masks import CLASSES, BadFile, Classes, MaskFiles, Pair, find_masks, is_image, read_image
from training.data.segmentation import read_pair, scale_image
from training.device import pick_device
from training.metrics import confusion_matrices, confusion_ratios
from training.runs import load_model

PANEL_INCHES = PAGE / 3
TALLEST_PANEL = 3  # times its width; a taller image is drawn narrower


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to predict, and with which model."""

    images: tyro.conf.Positional[tuple[Path, ...]]
    """image files, or folders of them"""
    run: Path
    """folder of a run, such as runs/bdh_unet/seed0, or a checkpoint in it"""
    output_dir: Path = ROOT / "predictions"
    """the pictures go into a folder of the run's name in it, and the checkpoint's, if not the best"""
    data_dir: Path | None = None
    """folder that holds data_camvid and the like; default: $VISION_BDH_DATA, else beside the scripts"""
    device: str = "auto"
    """auto, cuda, cuda:1, mps or cpu"""


def predict(model: nn.Module, image: np.ndarray, img_size: ImageSize, device: torch.device) -> np.ndarray:
    """The most probable class of every pixel. image: (h, w, 3) uint8 of any size -> (h, w) uint8."""
    pixels = normalise(torch.from_numpy(scale_image(image, img_size)).to(device).permute(2, 0, 1)[None])
    with torch.inference_mode():
        logits = F.interpolate(model(pixels).float(), size=image.shape[:2], mode="bilinear", align_corners=False)
    return logits[0].argmax(0).to(torch.uint8).cpu().numpy()


def draw(image: np.ndarray, predicted: np.ndarray, truth: np.ndarray | None, classes: Classes, title: str) -> Figure:
    """The panels and a legend of the classes in them. image: (h, w, 3) uint8; predicted, truth: (h, w) labels."""
    panels = {"image": image, "prediction": classes.palette[predicted]}
    shown = set(np.unique(predicted))
    if truth is not None:
        panels["truth"] = classes.palette[truth]
        shown |= set(np.unique(truth))
    names = [*classes.names, "void"]
    columns_of_legend = 2 * len(panels)
    rows_of_legend = -(-len(shown) // columns_of_legend)
    lines = textwrap.wrap(title, int(15 * PANEL_INCHES * len(panels)))
    panel_height = PANEL_INCHES * min(image.shape[0] / image.shape[1], TALLEST_PANEL)
    height = panel_height + 0.45 + 0.15 * len(lines) + 0.2 * rows_of_legend
    figure = new_figure(PANEL_INCHES * len(panels), height)
    figure.suptitle("\n".join(lines), x=0.01, ha="left")
    for ax, (name, pixels) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        ax.imshow(pixels, interpolation="nearest")
        ax.set_title(name if name != "prediction" else _with_scores(name, predicted, truth, classes))
        ax.set_axis_off()
    handles = [
        Patch(facecolor=classes.palette[label] / 255, edgecolor="0.5", label=names[label]) for label in sorted(shown)
    ]
    layout = dict(loc="outside lower center", ncols=columns_of_legend, columnspacing=1.5, handlelength=1.2)
    figure.legend(handles=handles, frameon=False, **layout)
    return figure


def _with_scores(name: str, predicted: np.ndarray, truth: np.ndarray | None, classes: Classes) -> str:
    """The panel's title, with how good this image's prediction is where the truth is known."""
    if truth is None or (truth == classes.void).all():
        return name
    confusion = confusion_matrices(
        torch.from_numpy(predicted)[None].long(), torch.from_numpy(truth)[None].long(), len(classes.names)
    )
    ratios = confusion_ratios(confusion[0].tolist(), classes.names)
    return f"{name}: {ratios['pixel_accuracy']:.0%} of pixels right, mIoU {ratios['miou']:.0%}"


def image_files(paths: tuple[Path, ...]) -> list[Path]:
    """The files, and those in the folders. Raises UserError where one is not there, or there are none."""
    files = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} is not there: name an image or a folder of images")
        files += sorted(filter(is_image, path.iterdir())) if path.is_dir() else [path]
    if not files:
        raise UserError("there is no image to look at: name image files, or folders that hold some")
    return list({path.resolve(): path for path in files}.values())  # each once


def picture_names(files: list[Path]) -> list[str]:
    """A name for the picture of each file: its folder's and its own, with a number where another has them, too."""
    names, taken = [], Counter()
    for path in files:
        name = f"{path.resolve().parent.name}_{path.stem}"
        taken[name] += 1
        names.append(f"{name}.png" if taken[name] == 1 else f"{name}-{taken[name]}.png")
    return names


class Truth:
    """Finds the masks of images."""

    def __init__(self, name: str, data_dir: Path | None):
        self.name = name
        self.found: dict[Path, dict[Path, tuple[Pair, MaskFiles]]] = {}
        self.place = data_folder(name, data_dir)

    def __call__(self, path: Path) -> np.ndarray | None:
        """(h, w) labels, None where there is no mask. Raises BadFile, also where it is not of the image's size."""
        path = path.resolve()
        for place in [self.place, *([path.parent.parent] if self.name == "camvid" else [])]:
            if path in (pairs := self._pairs(place)):
                pair, files = pairs[path]
                return read_pair(pair, files)[1]
        return None

    def _pairs(self, place: Path) -> dict[Path, tuple[Pair, MaskFiles]]:
        """By the images' resolved paths; listed once."""
        if place not in self.found:
            try:
                files = find_masks(self.name, place, download=False)
                pairs = [pair for of in files.pairs.values() for pair in of]
            except UserError:  # no folder of this data set: an image has no truth there
                pairs = []
            self.found[place] = {pair.image.resolve(): (pair, files) for pair in pairs}
        return self.found[place]


def main(options: Options) -> None:
    files = image_files(options.images)
    model, config = load_model(options.run)
    train = config["config"]["train"]
    if train.get("dataset") not in CLASSES:
        raise UserError(f"{options.run} does not label pixels: give a run of train_bdh_unet.py or its like")
    device = pick_device(options.device)
    model, classes = model.to(device), CLASSES[train["dataset"]]
    img_size = build_config(config["model_class"], config["config"]["model"]).img_size
    truth = Truth(train["dataset"], options.data_dir)
    output = options.output_dir / with_checkpoint(stem_of(config), options.run)
    with_truth = 0
    names = picture_names(files)
    for path, name in tqdm(list(zip(files, names, strict=True)), unit="img", leave=False, disable=None):
        try:
            image, mask = read_image(path), truth(path)
        except BadFile as error:
            raise UserError(str(error)) from None
        title = f"{path.name}: {title_of(config, options.run)}"
        figure = draw(image, predict(model, image, img_size, device), mask, classes, title)
        output.mkdir(parents=True, exist_ok=True)
        figure.savefig(output / name, dpi=DPI)
        with_truth += mask is not None
    pictures = f"{len(files)} picture{'s' * (len(files) != 1)}"
    print(f"{options.run}\n-> {output}, {pictures}, {with_truth or 'none'} with the truth")


if __name__ == "__main__":
    run_script(main, __doc__)
