"""Where the files of a data set lie."""

import os
from pathlib import Path

from training.config import ROOT

SIGNS = {  # what lies in the folder of a data set, for a --data-dir that is this folder itself
    "camvid": ("trainannot", "train_labels", "val"),
    "voc": ("VOCdevkit",),
    "cityscapes": ("leftImg8bit",),
    "ade20k": ("ADEChallengeData2016", "annotations"),
    "imagenet": ("train",),
    "coco": ("annotations",),
}


def data_folder(name: str, data_dir: Path | None) -> Path:
    """Folder of a data set: data_<name> in data_dir, else in $VISION_BDH_DATA, else beside the scripts.

    data_dir may also be that folder itself.
    """
    root = data_dir or Path(os.environ.get("VISION_BDH_DATA") or ROOT)
    inside = root / f"data_{name}"
    signs = SIGNS.get(name, (f"{name}.npz",))
    is_folder_itself = root.name == inside.name or any(_exists(root / each) for each in signs)
    return root if is_folder_itself and not _exists(inside) else inside


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:  # reported when the data are read
        return False
