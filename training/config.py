"""The train config of each task: what decides a run's result besides the model.

This module imports neither PyTorch nor anything else of the project: every other part may import it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from training.augment import Augmentation
    from training.tasks import Task

ROOT = Path(__file__).resolve().parents[1]


class UserError(Exception):
    """Something the user can fix; the message says how."""


OWN_FILES = ("folder", "webdataset", "clips", "coco")  # data sets made of files of the user's choice


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What decides a run's result besides the model, for any task. Each task has a subclass."""

    task: ClassVar[str] = "other"  # what a run of it does: it is stored, and decides which scripts can use the run

    @property
    def of_own_files(self) -> bool:
        """Whether it trains on files of the user's choice: the configuration does not say which."""
        return False

    epochs: int
    """passes over the training set"""
    batch_size: int
    """samples per forward pass, of all processes together"""
    learning_rate: float
    """peak learning rate"""
    weight_decay: float
    """weight decay (decoupled; SGD: L2)"""
    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
    """muon: Muon for hidden matrices, AdamW for embeddings, norms, biases, depthwise convolutions, output layer"""
    adamw_learning_rate: float | None = None
    """peak rate of what muon leaves to AdamW; default: learning_rate"""
    momentum: float = 0.95
    """Nesterov momentum of muon and sgd"""
    betas: tuple[float, float] = (0.9, 0.999)
    """decay rates of AdamW's running averages"""
    decay: Literal["all", "matrices"] = "all"
    """weight decay on all parameters, or not on biases, norms, positions and tokens"""
    schedule: Literal["cosine", "linear", "constant", "trapezoid"] = "cosine"
    """learning rate after the warm-up; trapezoid: constant, then linear to 0 over the last fifth"""
    ema: float | None = None
    """validate and test an exponential moving average of weights and BatchNorm statistics with this decay, as 0.999"""
    warmup_steps: int = 500
    """optimizer steps of linear warm-up, at most a tenth of all steps"""
    max_grad_norm: float = 1.0
    """clip gradients to this norm"""
    grad_accum: int = 1
    """batches accumulated per optimizer step"""
    precision: Literal["float32", "tf32", "bf16", "fp16"] = "tf32"
    """matmul precision; tf32 falls back to float32 where unsupported; fp16 (with loss scaling): GPUs without bf16"""
    compile: bool = False
    """run the model through torch.compile"""
    sync_batchnorm: bool = False
    """with several processes, BatchNorm normalises the whole batch, as one process does; otherwise each process
    normalises its share, and the running statistics of the first one count"""
    start_from: Path | None = None
    """start from these weights of the same model: best.pt or last.pt of a run, or exported .safetensors"""
    seed: int = 0
    """seed of the split, the initial weights and every random draw in training"""

    def __post_init__(self):
        for name in ("epochs", "batch_size", "grad_accum"):
            require(getattr(self, name) >= 1, self, name, "must be at least 1")
        require(self.learning_rate > 0, self, "learning_rate", "must be above 0")
        require(self.max_grad_norm > 0, self, "max_grad_norm", "must be above 0")
        for name in ("weight_decay", "warmup_steps", "seed"):
            require(getattr(self, name) >= 0, self, name, "must not be negative")
        object.__setattr__(self, "betas", tuple(self.betas))  # JSON has lists only
        require(all(0 <= beta < 1 for beta in self.betas), self, "betas", "must be at least 0 and below 1")
        require(0 <= self.momentum < 1, self, "momentum", "must be at least 0 and below 1")
        require(self.ema is None or 0 < self.ema < 1, self, "ema", "must be above 0 and below 1")
        rate, muon = self.adamw_learning_rate, self.optimizer == "muon"
        require(rate is None or (muon and rate > 0), self, "adamw_learning_rate", "is for muon, and above 0")
        default = type(self).momentum
        require(self.optimizer != "adamw" or self.momentum == default, self, "momentum", "is for muon and sgd only")
        require(self.optimizer != "sgd" or self.betas == type(self).betas, self, "betas", "are for adamw and muon")

    def check_new(self) -> None:
        """Raises ValueError for what no new run may have, such as settings without effect; stored runs may."""

    def make_task(self) -> "Task":
        """The task this config trains: data, loss, metric."""
        raise NotImplementedError(f"{type(self).__name__} has no make_task(): see docs/extending.md")

    def make_optimizer(self, model: "nn.Module") -> "Optimizer":
        """The optimizer over the model's parameters; each group's `lr` is its peak rate."""
        from training.optimiser import make_optimizer  # here and below: those modules import this one

        return make_optimizer(model, self)


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig(TrainConfig):
    """Training on data without a validation set of their own."""

    val_fraction: float = 0.2
    """share of the training data held out for validation"""

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.val_fraction < 1, self, "val_fraction", "must be above 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(HeldOutConfig):
    """Image classification."""

    task: ClassVar[str] = "classification"

    dataset: Literal["digits", "cifar10", "cifar100", "imagenet", "folder", "webdataset"]
    """training images; folder: your own, in DATA_DIR/train/CLASS/ and DATA_DIR/test/CLASS/; webdataset: in tar files"""
    crop_scale_min: float = 1.0
    """smallest area of a random crop, as a share of the image; 1 turns crops off"""
    crop_original: bool = False
    """take random crops from the original image instead of the one shrunk to img_size (image files only)"""
    eval_crop: float = 1.0
    """validate and test on the centre of an image, this share of its shorter side, such as 0.875 (image files only)"""
    horizontal_flip: bool = False
    """mirror half of the training images"""
    crop_padding: int = 0
    """shift training images by up to this many pixels (black border)"""
    randaugment: int = 0
    """RandAugment: operations per training image; 0 turns it off"""
    randaugment_magnitude: int = 9
    """strength of RandAugment's operations, 0 to 30"""
    random_erasing: float = 0.0
    """probability of erasing a box of a training image"""
    mixup: float = 0.0
    """mixup: alpha of the Beta distribution, such as 0.8; with cutmix, either is chosen per batch"""
    cutmix: float = 0.0
    """cutmix: alpha of the Beta distribution, such as 1.0"""
    label_smoothing: float = 0.0
    """share of the target spread over all classes"""
    repeat_augment: int = 1
    """augmented copies of an image in its batch; an epoch then sees 1 / n of the images n times"""
    eval_flip: bool = False
    """validate and test with the mean logits of each image and its mirror image"""
    eval_scales: tuple[float, ...] = (1.0,)
    """validate and test with the mean logits of each image at these scales, such as 1 1.25 (models of any size)"""
    train_sizes: tuple[int, ...] = ()
    """train at several sizes: each batch is resized to one of these sides in pixels, drawn at random (models of any
    size); default: img_size"""
    train_limit: int | None = None
    """use only this many training images, drawn by the seed; validation images are taken from them, unless the data
    have a validation set"""

    @property
    def of_own_files(self) -> bool:
        return self.dataset in OWN_FILES

    def __post_init__(self):
        super().__post_init__()
        require(0 < self.crop_scale_min <= 1, self, "crop_scale_min", "must be above 0 and at most 1")
        has_crops = self.crop_scale_min < 1
        require(has_crops or not self.crop_original, self, "crop_original", "needs crops: set crop_scale_min, as 0.08")
        require(0 < self.eval_crop <= 1, self, "eval_crop", "must be above 0 and at most 1")
        require(self.train_limit is None or self.train_limit >= 2, self, "train_limit", "must be at least 2")
        for name in ("crop_padding", "randaugment", "mixup", "cutmix"):
            require(getattr(self, name) >= 0, self, name, "must not be negative")
        require(0 <= self.randaugment_magnitude <= 30, self, "randaugment_magnitude", "must be between 0 and 30")
        for name in ("random_erasing", "label_smoothing"):
            require(0 <= getattr(self, name) < 1, self, name, "must be at least 0 and below 1")
        require(1 <= self.repeat_augment <= self.batch_size, self, "repeat_augment", "must be 1 to batch_size")
        require(self.crop_padding == 0 or self.crop_scale_min == 1, self, "crop_padding", "needs crop_scale_min = 1")
        check_scales(self)
        object.__setattr__(self, "train_sizes", tuple(self.train_sizes))  # JSON has lists only
        distinct = len(set(self.train_sizes)) == len(self.train_sizes)
        require(distinct and min(self.train_sizes, default=1) >= 1, self, "train_sizes", "must be different sizes")

    def check_new(self) -> None:
        divides = self.batch_size % self.repeat_augment == 0
        require(divides, self, "repeat_augment", f"must divide batch_size = {self.batch_size}")
        has_randaugment = self.randaugment > 0 or self.randaugment_magnitude == type(self).randaugment_magnitude
        require(has_randaugment, self, "randaugment_magnitude", "needs operations: set randaugment, as 2")

    def make_task(self) -> "Task":
        from training.tasks import Classification

        return Classification(self)

    def make_augmentations(self, num_classes: int) -> "list[Augmentation]":
        """What training images and labels go through, batch by batch, in this order."""
        from training.augment import CropAndFlip, PadAndCrop, RandomErasing
        from training.mixing import Mix, SmoothLabels
        from training.randaugment import RandAugment

        scale_min = 1.0 if self.crop_original else self.crop_scale_min  # those crops are made when an image is read
        steps = {
            CropAndFlip: (scale_min < 1 or self.horizontal_flip, scale_min, self.horizontal_flip),
            PadAndCrop: (self.crop_padding > 0, self.crop_padding),
            RandAugment: (self.randaugment > 0, self.randaugment, self.randaugment_magnitude),
            RandomErasing: (self.random_erasing > 0, self.random_erasing),
            Mix: (self.mixup > 0 or self.cutmix > 0, self.mixup, self.cutmix, num_classes, self.batch_size),
            SmoothLabels: (self.label_smoothing > 0, self.label_smoothing, num_classes),
        }
        return [step(*arguments) for step, (wanted, *arguments) in steps.items() if wanted]


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig(ClassificationConfig):
    """Pretraining without labels: the model reconstructs masked patches."""

    task: ClassVar[str] = "pretraining"

    def __post_init__(self):
        super().__post_init__()
        for name in ("mixup", "cutmix", "label_smoothing", "eval_flip"):
            require(not getattr(self, name), self, name, "concerns labels, which pretraining does not use")
        require(self.eval_scales == (1.0,), self, "eval_scales", "concerns labels, which pretraining does not use")

    def make_task(self) -> "Task":
        from training.tasks import MaskedImages

        return MaskedImages(self)


@dataclass(frozen=True, kw_only=True)
class VideoConfig(ClassificationConfig):
    """Classification of short clips. What is done to an image is done to all frames of a clip alike."""

    task: ClassVar[str] = "video"

    dataset: Literal["clips"] = "clips"
    """your own clips, in DATA_DIR/train/CLASS/ and DATA_DIR/test/CLASS/: folders of frames, video files or GIFs"""

    def __post_init__(self):
        super().__post_init__()
        require(self.randaugment == 0, self, "randaugment", "is for single images: leave it out")


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(TrainConfig):
    """Semantic segmentation: a class for every pixel."""

    task: ClassVar[str] = "segmentation"

    dataset: Literal["camvid", "voc", "cityscapes", "ade20k"] = "camvid"
    """images and masks to train on"""
    dice_weight: float = 0.5
    """share of the Dice loss; the rest is cross-entropy"""
    horizontal_flip: float = 0.0
    """probability of mirroring a training image"""
    brightness_contrast: float = 0.0
    """probability of changing brightness and contrast, each by at most 20 %"""
    shift_scale_rotate: float = 0.0
    """probability of a shift (up to 1/16), scaling (0.9 to 1.1) and rotation (up to 15 degrees)"""
    scale_min: float = 1.0
    """smallest random scale of a training image before a crop of the model's size, such as 0.5"""
    scale_max: float = 1.0
    """largest random scale, such as 2"""
    class_weighting: Literal["none", "median_frequency"] = "none"
    """cross-entropy weights of the classes: none, or median frequency / frequency"""
    train_val: bool = False
    """train on the training and validation sets; the last epoch is tested, since no set is left to select the best"""
    eval_full_size: bool = False
    """validate against masks at their original size (predictions are upsampled)"""
    eval_flip: bool = False
    """validate and test with the mean class probabilities of each image and its mirror image"""
    eval_scales: tuple[float, ...] = (1.0,)
    """validate and test with the mean class probabilities of each image at these scales, such as 0.75 1 1.25"""
    train_limit: int | None = None
    """use only this many training images, drawn by the seed"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("dice_weight", "horizontal_flip", "brightness_contrast", "shift_scale_rotate"):
            require(0 <= getattr(self, name) <= 1, self, name, "must be between 0 and 1")
        require(0.1 <= self.scale_min <= 1, self, "scale_min", "must be between 0.1 and 1")
        require(1 <= self.scale_max <= 8, self, "scale_max", "must be between 1 and 8")
        check_scales(self)
        require(self.train_limit is None or self.train_limit >= 1, self, "train_limit", "must be at least 1")

    def check_new(self) -> None:
        weighted = self.class_weighting == "none" or self.dice_weight < 1
        require(weighted, self, "class_weighting", "weights the cross-entropy, which dice_weight = 1 turns off")

    def make_task(self) -> "Task":
        from training.tasks import Segmentation

        return Segmentation(self)


@dataclass(frozen=True, kw_only=True)
class DetectionConfig(TrainConfig):
    """Object detection: boxes around objects, and their classes."""

    task: ClassVar[str] = "detection"

    dataset: Literal["coco"] = "coco"
    """images and boxes in COCO's format: COCO 2017, or your own"""
    horizontal_flip: bool = False
    """mirror half of the training images"""
    train_limit: int | None = None
    """use only this many training images, drawn by the seed"""

    @property
    def of_own_files(self) -> bool:
        return True

    def __post_init__(self):
        super().__post_init__()
        require(self.train_limit is None or self.train_limit >= 1, self, "train_limit", "must be at least 1")

    def make_task(self) -> "Task":
        from training.detection import Detection

        return Detection(self)


@dataclass(frozen=True, kw_only=True)
class TextConfig(HeldOutConfig):
    """Language modelling on the bytes of one text."""

    task: ClassVar[str] = "text"

    text: Path | None = None
    """text file; default: the English help topics that come with Python (pydoc_data.topics)"""
    context: int = 128
    """context length in bytes"""
    test_fraction: float = 0.1
    """share of the text, at its end, held out for the test; validation comes before it"""

    @property
    def of_own_files(self) -> bool:
        return self.text is not None

    def __post_init__(self):
        super().__post_init__()
        require(self.context >= 2, self, "context", "must be at least 2")
        require(0 < self.test_fraction < 1, self, "test_fraction", "must be above 0 and below 1")
        require(self.test_fraction + self.val_fraction < 1, self, "test_fraction", "and val_fraction leave no text")

    def make_task(self) -> "Task":
        from training.tasks import LanguageModelling

        return LanguageModelling(self)


def check_scales(config: "ClassificationConfig | SegmentationConfig") -> None:
    """Raises ValueError for impossible eval_scales; makes them a tuple, which JSON does not have."""
    scales = tuple(map(float, config.eval_scales))
    object.__setattr__(config, "eval_scales", scales)
    good = scales and len(set(scales)) == len(scales) and all(0.1 <= scale <= 8 for scale in scales)
    require(good, config, "eval_scales", "must be one or more different numbers between 0.1 and 8")


def require(holds: bool, config: Any, name: str, rule: str) -> None:
    """Raises ValueError, which says the field's value and the rule, unless it holds."""
    if not holds:
        raise ValueError(f"{name} = {getattr(config, name)} {rule}")
