"""Short clips in one folder per class, in the layouts of `folder`, where a clip is one of

DIR/train/CLASS/CLIP/FRAME   a folder of images, in the order of their names (numbers by value: 9.png before 10.png)
DIR/train/CLASS/CLIP.mp4     a video file, which OpenCV reads
DIR/train/CLASS/CLIP.gif     an animated picture (GIF, WebP, PNG)

Clips may also lie in folders below CLASS; there, a folder that holds nothing but single pictures is one clip.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from training.config import UserError
from training.data.batches import DataSet
from training.data.finding import Finder, ImageFile, Place, is_image, printable, size_of
from training.data.folder import find_parts, read_folders
from training.data.image_files import ImageFiles, UnreadableImage, as_seen, open_image, unreadable

VIDEO_ENDINGS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv"}
ANIMATED_ENDINGS = {".apng", ".gif", ".png", ".webp"}  # several pictures in a .jpg are of one scene


class ClipFiles(ImageFiles):
    """Clips; indexes like an array (N, 3 F, S, S) uint8: the colours of F frames, one frame after another.

    The frames are the middle ones of F equal parts of the clip (TSN: Wang et al. 2016, arXiv 1608.00859); a shorter
    clip repeats frames. Each is scaled and cropped as an image is, all of them alike.
    """

    def _read(self, index: int, fit: Callable[[Image.Image, tuple[int, int]], Image.Image]) -> np.ndarray:
        _, channels, size, _ = self.shape
        path = Path(self._path(index))
        try:
            frames = [np.asarray(fit(frame, (size, size))) for frame in read_frames(path, channels // 3)]
        except Exception as error:  # Pillow and OpenCV raise errors of many kinds for damaged files
            raise UnreadableImage(unreadable(path, "a clip", error, "replace or remove it")) from None
        return np.ascontiguousarray(np.concatenate(frames, axis=2).transpose(2, 0, 1))


def load_clips(data_dir: Path | None, img_size: int, in_channels: int) -> DataSet:
    """The clips below data_dir, in_channels / 3 colour frames of each. Raises UserError."""
    if data_dir is None:
        raise UserError("your own clips (--dataset clips) are needed: name their folder with --data-dir DIR")
    if in_channels % 3:
        raise UserError(
            f"in_channels = {in_channels}, but clips are read in colour: set --in-channels to 3 times the frames"
        )
    finder = Finder()
    open_files = partial(ClipFiles, img_size=img_size, in_channels=in_channels)
    name = f"clips {printable(data_dir.resolve().name)}"
    return read_folders(name, data_dir, find_parts(data_dir, finder), finder, open_files, find_clips)


def find_clips(finder: Finder, folder: str) -> list[ImageFile]:
    """The clips below a class folder at any depth, sorted by path: folders with images in them, and files."""
    clips, waiting = [], [Place.of(folder)]
    while waiting:
        place = waiting.pop()
        entries = finder.list_folder(place.path)
        folders = [entry for entry in entries if entry.is_dir()]
        videos = [entry for entry in entries if not entry.is_dir() and Path(entry.name).suffix.lower() in VIDEO_ENDINGS]
        pictures = finder.list_images(entry for entry in entries if entry not in videos)
        has_frames_alone = pictures and not videos and not folders and not _is_animated(pictures[0])
        if has_frames_alone and place.path != folder:
            clips.append(ImageFile(place.path, sum(picture.size for picture in pictures)))
        else:
            clips += [*pictures, *(ImageFile(entry.path, size_of(entry)) for entry in videos)]
        waiting += place.below(entries)
    return sorted(clips)


def _is_animated(picture: ImageFile) -> bool:
    """Whether a picture has several frames; False if it cannot be read, which is said where it is read."""
    if Path(picture.path).suffix.lower() not in ANIMATED_ENDINGS:
        return False
    try:
        with Image.open(picture.path) as image:
            return getattr(image, "n_frames", 1) > 1
    except Exception:  # Pillow raises errors of many kinds for damaged files
        return False


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Sorting key: digits of a name by value."""
    parts = re.split(r"([0-9]+)", path.name)  # digits at odd places
    return [(int(part) if place % 2 else 0, part) for place, part in enumerate(parts)]


def read_frames(path: Path, n_frames: int) -> list[Image.Image]:
    """n_frames colour frames, spread over the clip. Raises errors of many kinds if it cannot be read."""
    if path.is_dir():
        frames = sorted((each for each in path.iterdir() if is_image(each)), key=_by_number)
        return [open_image(frames[place], "RGB") for place in _spread(n_frames, len(frames))]
    if path.suffix.lower() in VIDEO_ENDINGS:
        return _read_video(path, n_frames)
    with Image.open(path) as picture:
        count = getattr(picture, "n_frames", 1)
        if count == 1:
            raise ValueError(
                "it is a single picture: frames of a clip belong in a folder of their own, single images to a script "
                "such as train_v2_cifar10.py --dataset folder"
            )
        return _chosen((as_seen(frame, "RGB") for frame in ImageSequence.Iterator(picture)), n_frames, count)


def _read_video(path: Path, n_frames: int) -> list[Image.Image]:
    """Decodes the video twice, since the number of frames in its header is often wrong: to count and to read."""
    import cv2  # takes a while to import

    def frames(read: bool) -> Iterator[Image.Image | None]:
        video = cv2.VideoCapture(str(path))
        try:
            while video.grab():
                yield Image.fromarray(cv2.cvtColor(video.retrieve()[1], cv2.COLOR_BGR2RGB)) if read else None
        finally:
            video.release()

    count = sum(1 for _ in frames(read=False))
    if count == 0:
        raise ValueError("OpenCV finds no frames in it")
    return _chosen(frames(read=True), n_frames, count)


def _chosen(frames: Iterator[Image.Image], n_frames: int, count: int) -> list[Image.Image]:
    """n_frames of the count frames, spread over them."""
    wanted = _spread(n_frames, count)
    kept = {place: frame for place, frame in enumerate(frames) if place in wanted}
    return [kept[place] for place in wanted]


def _spread(n: int, count: int) -> list[int]:
    """The middle of each of n equal parts of 0 ... count - 1."""
    return [(2 * i + 1) * count // (2 * n) for i in range(n)]
