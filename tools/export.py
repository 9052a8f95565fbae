"""Takes a trained model away: writes a run's best weights in the forms that other tools read.

* weights: best_bf16.safetensors and a model card, beside config.json: a folder that scripts open like a run. Always the
  best weights; the other forms take those of a checkpoint, too, and have its name in theirs (model_last.onnx).
* torch: model.pt2, a torch.export program.
* onnx: model.onnx.
* int8: model_int8.onnx, calibrated on training images; prints the accuracy of both.
* pruned: pruned_N/, a run with the N neurons per head that are needed most; prints the accuracy of both.

Without --output, the files go into the run's own folder.

    python tools/export.py runs/v2_cifar10/seed0
    python tools/export.py runs/v2_cifar10/seed0 --output results/v2_cifar10/seed0
    python tools/export.py runs/v2_cifar10/seed0 --to torch onnx int8
    python tools/export.py runs/v2_cifar10/seed0 --to pruned --keep 0.5
    python tools/export.py runs/v2_cifar10/seed0/pruned_512 --to int8

Programs and ONNX take images (B, C, height, width) in [-1, 1], any number at once, and for a BDH-UNet of any size that
the patch divides, at least two patches each way (decoder=upernet: above 32 pixels). Each is opened again and held to
the model before its file is there.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro
from torch import Tensor

from interpretability.common.trained import TrainedRun
from tools.exporting.evaluation import SEGMENTATION_BATCH, Predict, Score, score
from tools.exporting.extras import need
from tools.exporting.programs import onnx_answer, write_int8, write_onnx, write_torch
from tools.exporting.pruned import fine_tuning_command, prune, write_pruned
from tools.exporting.weights import check_target, copy_small_files, export_weights
from training.command_line import run_script
from training.config import UserError, require
from training.stored import task_of

CALIBRATION_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to export, and in which forms."""

    run: tyro.conf.Positional[Path]
    """folder of a run, or a checkpoint in it"""
    to: tuple[Literal["weights", "torch", "onnx", "int8", "pruned"], ...] = ("weights",)
    """one or more forms"""
    output: Path | None = None
    """folder for the files; default: the run's own"""
    keep: float = 0.5
    """pruned: share of the neurons to keep"""
    calibration_images: int = 256
    """int8, pruned: training images from which ranges or needed neurons are read"""
    test_images: int | None = None
    """int8, pruned: test only this many images; 0: none; default: all"""
    data_dir: Path | None = None
    """folder that contains data_cifar10 etc.; default: $VISION_BDH_DATA, else the folder of the train scripts; for a
    run on your own images (--dataset folder): their folder"""

    def __post_init__(self):
        if not self.to:
            raise ValueError("to is empty: give at least one form, or leave it out for the weights")
        require(0 < self.keep <= 1, self, "keep", "must be above 0 and at most 1")
        require(self.calibration_images >= 1, self, "calibration_images", "must be at least 1")
        require(self.test_images is None or self.test_images >= 0, self, "test_images", "must not be negative")


class Export:
    """One run, on its way into other forms."""

    def __init__(self, options: Options):
        self.options = options
        self.run = TrainedRun(options.run, options.data_dir, "cpu", any_model=True)
        self.target = options.output or self.run.folder
        if self.target.resolve() != self.run.folder.resolve():
            check_target(self.target, self.run.config)

    def weights(self) -> Path:
        if self.run.checkpoint_name:
            raise UserError(f"--to weights writes a run's best weights: give the folder of {self.options.run}")
        return export_weights(self.run.model, self.run.folder, self.target)

    def torch(self) -> Path:
        path = self._file("model.pt2", "torch")
        print(write_torch(self.run.model, self.run.sizes, path))
        return path

    def onnx(self) -> Path:
        return self._onnx

    @cached_property
    def _onnx(self) -> Path:
        """The ONNX file, written when it is first asked for."""
        path = self._file("model.onnx", "onnx")
        facts = {"experiment": self.run.config["experiment"], "scale": "pixels / 127.5 - 1"}
        if names := self.run.config["data"].get("class_names"):
            facts["class_names"] = list(names)
        print(write_onnx(self.run.model, self.run.sizes, path, facts))
        return path

    def int8(self) -> Path:
        need("onnxruntime", "--to int8")
        path = self._file("model_int8.onnx", "int8")
        write_int8(self._onnx, path, self._training_images())
        print(f"float32: {self._score} -> int8: {self._scored(onnx_answer(path))}")
        return path

    def pruned(self) -> Path:
        self._need_images("pruned")
        model = prune(self.run.model, self._training_images(), self.options.keep)
        n = model.config.n_neurons
        path = write_pruned(model, self.run.config, self.target / self.run.file_name(f"pruned_{n}"))
        print(f"{self.run.sizes.n_neurons} neurons per head: {self._score} -> {n}: {self._scored(model)}")
        command = fine_tuning_command(model, self.run.config, path)
        print(f"to train it further, with fewer epochs and a lower rate than here:\n{command}")
        return path

    def _need_images(self, form: str) -> None:
        """Raises UserError unless the model reads images and answers with classes."""
        fields, finds_boxes = ("img_size", "num_classes"), task_of(self.run.config) == "detection"
        if finds_boxes or not all(hasattr(self.run.sizes, name) for name in fields):
            kind = type(self.run.model).__name__
            raise UserError(
                f"{self.options.run} is a {kind}, which does not classify images: --to {form} needs one that does"
            )

    def _file(self, name: str, form: str) -> Path:
        self._need_images(form)
        copy_small_files(self.run.folder, self.target)
        stem, _, suffix = name.partition(".")
        return self.target / f"{self.run.file_name(stem)}.{suffix}"

    def _training_images(self) -> Iterator[Tensor]:
        """Images that the run was trained on, in batches. Raises UserError if the data are not there."""
        run, n = self.run, self.options.calibration_images
        size = SEGMENTATION_BATCH if run.labels_pixels else CALIBRATION_BATCH
        for images, _ in run.training_batches(run.choose_training_images(n), size):
            yield images

    def _scored(self, predict: Predict) -> Score | str:
        if self.options.test_images == 0:
            return "not tested"
        return score(self.run, predict, self.options.test_images)

    @cached_property
    def _score(self) -> Score | str:
        return self._scored(self.run.model)


def main(options: Options) -> None:
    export = Export(options)
    for form in dict.fromkeys(options.to):
        make: Callable[[], Path] = getattr(export, form)
        path = make()
        print(f"{form}: {path}, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main, __doc__)
