"""Data sets and batches. One file per kind of data:

    places        where the files of a data set lie
    arrays        digits, CIFAR-10, CIFAR-100
    folder        images in one folder per class: your own, ImageNet
    clips         short clips in one folder per class: frames, videos, animated pictures
    tar_files     images in tar files, as the webdataset package writes them
    finding       which files are images; hidden files, files left out, fingerprint
    image_files   reading images: orientation, transparency, size
    streaming     image files read in every epoch, by worker processes
    batches       what classification data share: data set, split, batches on the device
    mask_files    images with masks: pairing and reading files
    masks         where those of a data set lie: CamVid, Pascal VOC, Cityscapes, ADE20K
    classes       their classes and colours
    segmentation  batches of images with masks
    boxes         images with boxes in COCO's format, and their batches
    text          the bytes of one text

A new classification data set is a function in a file of its own, a line in DATASETS, and its name in the field
`dataset` of ClassificationConfig.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from training.config import UserError
from training.data.arrays import load_cifar, load_digits
from training.data.batches import DataSet, ImageBatches, Split, draw_split, split_train
from training.data.clips import load_clips
from training.data.folder import load_folder, load_imagenet
from training.data.places import data_folder
from training.data.tar_files import load_webdataset

Loader = Callable[[Path | None, int, int], DataSet]  # data_dir, img_size, in_channels

DATASETS: dict[str, Loader] = {
    "digits": load_digits,
    "cifar10": partial(load_cifar, "cifar10"),
    "cifar100": partial(load_cifar, "cifar100"),
    "imagenet": load_imagenet,
    "folder": load_folder,
    "webdataset": load_webdataset,
    "clips": load_clips,
}


def load_dataset(name: str, data_dir: Path | None, img_size: int = 32, in_channels: int = 3) -> DataSet:
    """The data set `name`; CIFAR is downloaded where it is missing. Raises UserError if it cannot be had.

    img_size, in_channels: what images of a folder are converted to; other data sets have their own size.
    """
    try:
        return DATASETS[name](data_dir, img_size, in_channels)
    except PermissionError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): make it readable") from None


__all__ = ["DATASETS", "DataSet", "ImageBatches", "Split", "data_folder", "draw_split", "load_dataset", "split_train"]
