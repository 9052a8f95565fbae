"""Images in tar files, as the webdataset package writes them: NAME.jpg and NAME.cls, the number of its class, in turn.

The files are indexed once, at the start, and images are then read from their places. So order, resuming and sharing
among processes are exact, as for image files; a stream would only be shuffled within a buffer.
"""

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from training.config import UserError
from training.data.batches import DataSet
from training.data.finding import fingerprint, image_endings, printable
from training.data.image_files import ImageFiles, check_channels, open_image

PARTS = ("train", "val", "test")
EXAMPLE = "--data-dir 'DIR/train-{000000..001023}.tar'"
MOST_DIGITS = 6  # of a class: all classes up to the largest get a name
SAMPLE = "each image NAME.jpg needs NAME.cls, the number of its class from 0, beside it in the tar file"

Split = Callable[[str], tuple[str | None, str | None]]  # a name to its key and its endings, of the webdataset package


class TarImages(ImageFiles):
    """Images in tar files; indexes like ImageFiles."""

    def __init__(self, tars: list[Path], places: np.ndarray, img_size: int, in_channels: int):
        """places: (N,) with the fields `tar` (number in tars), `offset`, `size` (in bytes) and `name`."""
        super().__init__([], img_size, in_channels)
        self.tars, self._paths = tars, places
        self.shape = (len(places), in_channels, img_size, img_size)

    def _path(self, index: int) -> str:
        place = self._paths[index]
        return f"{self.tars[place['tar']]}:{place['name'].decode('utf-8', 'surrogateescape')}"

    def _open(self, index: int, mode: str) -> Image.Image:
        place = self._paths[index]
        with self.tars[place["tar"]].open("rb") as file:
            file.seek(place["offset"])
            return open_image(io.BytesIO(file.read(place["size"])), mode)


def load_webdataset(data_dir: Path | None, img_size: int, in_channels: int) -> DataSet:
    """The images of train*.tar, and of val*.tar and test*.tar beside them. Raises UserError.

    data_dir: the folder, or the training files with braces, DIR/train-{000000..001023}.tar.
    """
    if data_dir is None:
        raise UserError(f"--dataset webdataset reads your tar files: name them with {EXAMPLE}")
    try:
        from webdataset.shardlists import expand_urls
        from webdataset.tariterators import base_plus_ext
    except ImportError:
        raise UserError("--dataset webdataset needs the webdataset package: pip install webdataset") from None
    check_channels(in_channels)
    tars = find_tars(data_dir, expand_urls)
    parts = {part: index_tars(paths, base_plus_ext) for part, paths in tars.items() if paths}
    n_classes = 1 + int(parts["train"][1].max())
    for part, (_, labels) in parts.items():
        if labels.max() >= n_classes:
            raise UserError(f"the {part} part has class {labels.max()}, but the training part ends at {n_classes - 1}")
    arrays = {part: (TarImages(tars[part], places, img_size, in_channels), of) for part, (places, of) in parts.items()}
    images, labels = arrays["train"]
    return DataSet(
        f"webdataset {printable(data_dir.resolve().name)}",
        images,
        labels,
        *arrays.get("test", (images[[]], labels[:0])),
        tuple(map(str, range(n_classes))),
        *arrays.get("val", (None, None)),
        files=fingerprint((f"{part}/{path.name}", path.stat().st_size) for part in tars for path in tars[part]),
    )


def find_tars(data_dir: Path, expand: Callable[[str], list[str]]) -> dict[str, list[Path]]:
    """The files of each part, sorted; only "train" must have some. Raises UserError."""
    folder = data_dir if data_dir.is_dir() else data_dir.parent
    tars = {part: sorted(folder.glob(f"{part}*.tar")) for part in PARTS}
    if folder != data_dir:
        tars["train"] = [Path(name) for name in expand(str(data_dir))]
    if not tars["train"]:
        raise UserError(f"{folder} holds no train*.tar: name the training files with {EXAMPLE}")
    if missing := [path for path in tars["train"] if not path.is_file()]:
        others = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{missing[0]} is missing{others}: name files that exist with {EXAMPLE}")
    training = {path.resolve() for path in tars["train"]}
    for part in PARTS[1:]:
        if both := [path for path in tars[part] if path.resolve() in training]:
            raise UserError(
                f"{both[0]} is named as training data, but {part}*.tar are the {part} part: name it train*.tar, or "
                "leave it out of --data-dir"
            )
    return tars


def index_tars(paths: list[Path], split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Places of the images (see TarImages) and their labels (N,) int64. Raises UserError."""
    places, labels = [], []
    for number, path in enumerate(tqdm(paths, desc="reading the index", unit="tar", leave=False, disable=None)):
        try:
            for (offset, size, name), label in _samples(path, split):
                places.append((number, offset, size, name.encode("utf-8", "surrogateescape")))
                labels.append(label)
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"{path} cannot be read as an uncompressed tar file ({error}): replace it") from None
    if not places:
        raise UserError(f"{paths[0]} holds no images: {SAMPLE}")
    width = max(len(place[3]) for place in places)
    fields = [("tar", np.int32), ("offset", np.int64), ("size", np.int64), ("name", f"S{width}")]
    return np.array(places, dtype=fields), np.array(labels, dtype=np.int64)


def _samples(path: Path, split: Split) -> Iterator[tuple[tuple[int, int, str], int]]:
    """Place and label of each sample; its files follow each other. Raises UserError for an incomplete one."""
    key, image, label = None, None, None
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            tar.members = []  # which would collect all of them
            its_key, ending = split(member.name) if member.isreg() else (None, None)
            if its_key is None:
                continue
            if its_key != key:
                if key is not None:
                    yield _complete(path, key, image, label)
                key, image, label = its_key, None, None
            is_image = f".{ending.lower()}" in image_endings()
            if (is_image and image is not None) or (ending.lower() == "cls" and label is not None):
                raise UserError(f"{path}: {printable(key)} has two {'images' if is_image else 'classes'}: {SAMPLE}")
            if is_image:
                image = (member.offset_data, member.size, member.name)
            elif ending.lower() == "cls":
                label = tar.extractfile(member).read().strip()
        if key is not None:
            yield _complete(path, key, image, label)
        tar.fileobj.seek(tar.offset)  # where tarfile found no further header, it may be damaged or cut off
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"damaged or cut off at byte {tar.offset:,}")


def _complete(path: Path, key: str, image: tuple[int, int, str] | None, label: bytes | None) -> tuple:
    if image is None or label is None or not label.isdigit():
        raise UserError(f"{path}: {printable(key)} has {'no image' if image is None else 'no class'}: {SAMPLE}")
    if len(label) > MOST_DIGITS:
        raise UserError(f"{path}: {printable(key)} has class {label[:20].decode()}..., far above any class: {SAMPLE}")
    return image, int(label)
