"""ADE20K in the layout of its archive, made up: labels, faults, reading in every epoch, a run of the script."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from training import SegmentationConfig, UserError
from tests.trials import read_rows, same_weights, weights
from training.data import data_folder, segmentation
from training.data.classes import ADE20K
from training.data.masks import find_masks
from training.data.segmentation import FilesPart, MaskBatches, MaskPart
from training.tasks import median_frequencies

TRAIN = dict(epochs=1, batch_size=4, learning_rate=1e-3, weight_decay=0.0, dataset="ade20k")
AUGMENTED = dict(horizontal_flip=0.5, brightness_contrast=0.5, shift_scale_rotate=1.0)
CPU = torch.device("cpu")


def write_ade20k(folder, n_train=9, n_val=5):
    """Noise with masks of all labels, 0 (no class) to 150; images of two sizes."""
    rng = np.random.default_rng(0)
    root = folder / "ADEChallengeData2016"
    for part, short, n in (("training", "train", n_train), ("validation", "val", n_val)):
        for kind in ("images", "annotations"):
            (root / kind / part).mkdir(parents=True)
        for number in range(n):
            name, shape = f"ADE_{short}_{number + 1:08d}", (24, 32) if number < 3 else (32, 24)
            Image.fromarray(rng.integers(256, size=(*shape, 3), dtype=np.uint8)).save(
                root / "images" / part / f"{name}.jpg"
            )
            labels = np.resize(np.roll(np.arange(151), number), shape).astype(np.uint8)
            Image.fromarray(labels).save(root / "annotations" / part / f"{name}.png")
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n")
    return root


@pytest.fixture(scope="module")
def ade20k(tmp_path_factory):
    """Folder that holds data_ade20k. For reading only."""
    folder = tmp_path_factory.mktemp("data")
    write_ade20k(folder / "data_ade20k")
    return folder


@pytest.fixture
def read_every_epoch(monkeypatch):
    """As if memory were full."""
    monkeypatch.setattr(segmentation, "fits_in_memory", lambda n_bytes, device: False)


def make_batches(folder, num_workers=0, img_size=(16, 24), **fields):
    config = SegmentationConfig(**(TRAIN | AUGMENTED | fields))
    return MaskBatches(find_masks("ade20k", data_folder("ade20k", folder)), config, img_size, CPU, num_workers)


def batches_of(data):
    """Of two epochs, with validation after each, one after the other as in a run."""
    return [each for epoch in (0, 1) for each in (*data.train_batches(epoch), *data.eval_batches("val"))]


# ---------------------------------------------------------------------------- labels


def test_labels_start_at_zero_and_no_class_is_void(ade20k):
    data = make_batches(ade20k, eval_full_size=True)
    assert [data.size(part) for part in ("train", "val", "test")] == [9, 5, 0]
    masks = [mask for _, masks in data.eval_batches("val") for mask in masks]
    for number, mask in enumerate(masks):
        theirs = np.resize(np.roll(np.arange(151), number), mask.shape)
        assert np.array_equal(mask, np.where(theirs == 0, 150, theirs - 1))
    assert ADE20K.void == 150 and len(set(ADE20K.names)) == len({*ADE20K.colours, ADE20K.void_colour}) - 1 == 150
    known = {1: "wall", 3: "sky", 13: "person", 46: "counter", 90: "television", 128: "bicycle", 150: "flag"}
    assert {number: ADE20K.names[number - 1] for number in known} == known  # numbered as in objectInfo150.txt


def test_the_folder_may_be_the_unpacked_archive_or_hold_it(ade20k):
    inside = ade20k / "data_ade20k"
    for place in (ade20k, inside, inside / "ADEChallengeData2016"):
        files = find_masks("ade20k", data_folder("ade20k", place))
        assert files.description == find_masks("ade20k", inside).description
    assert files.description["images"] == {"train": 9, "val": 5, "test": 0}


def test_faults(tmp_path):
    with pytest.raises(UserError, match=r"ADEChallengeData2016/ lacks images/training/.*ADEChallengeData2016\.zip"):
        find_masks("ade20k", tmp_path)
    root = write_ade20k(tmp_path, 3, 2)
    (root / "annotations" / "validation" / "ADE_val_00000002.png").unlink()
    with pytest.raises(UserError, match=r"ADE_val_00000002\.jpg has no mask") as error:
        make_batches(tmp_path)
    assert "tools/verify_camvid.py --dataset ade20k lists all" in str(error.value)
    (root / "images" / "validation" / "ADE_val_00000002.jpg").unlink()
    Image.fromarray(np.full((24, 32), 151, np.uint8)).save(root / "annotations" / "training" / "ADE_train_00000001.png")
    with pytest.raises(UserError, match=r"has the label 151.*\(those are 0 to 150\)"):
        make_batches(tmp_path)


# ---------------------------------------------------------------------------- data that do not fit in memory


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("fields", [dict(), dict(eval_full_size=True, train_limit=6)], ids=str)
def test_images_read_in_every_epoch_are_those_kept_in_memory(num_workers, fields, ade20k, monkeypatch, capsys):
    kept = make_batches(ade20k, **fields)
    assert all(isinstance(part, MaskPart) for part in kept.parts.values()) and not capsys.readouterr().out
    monkeypatch.setattr(segmentation, "fits_in_memory", lambda n_bytes, device: False)
    read = make_batches(ade20k, num_workers, **fields)
    assert all(isinstance(part, FilesPart) for part in read.parts.values())
    assert "do not fit in memory: they are read again in every epoch" in capsys.readouterr().out
    expected, found = batches_of(kept), batches_of(read)
    assert len(expected) == len(found) == (10 if not fields else 8)
    for one, other in zip(expected, found, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    first = next(read.train_batches(1, first=1))
    assert torch.equal(first[0], list(kept.train_batches(1))[1][0])


def test_masks_that_lie_on_their_side_have_the_shape_that_is_read(tmp_path, read_every_epoch):
    """The shape comes from the header, the mask from the pixels: by EXIF the stored picture is turned."""
    root = write_ade20k(tmp_path, 2, 1)
    mask = root / "annotations" / "validation" / "ADE_val_00000001.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((32, 24), np.uint8)).save(mask, exif=exif)
    data = make_batches(tmp_path, eval_full_size=True)
    ((_, masks),) = data.eval_batches("val")
    assert data.parts["val"].mask_shapes == [masks.shape[1:]] == [(24, 32)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_file_is_named_when_it_is_read(num_workers, tmp_path, read_every_epoch):
    root = write_ade20k(tmp_path, 4, 1)
    (root / "images" / "training" / "ADE_train_00000003.jpg").write_bytes(b"no image")
    data = make_batches(tmp_path, num_workers)
    with pytest.raises(UserError, match=r"^\S+ADE_train_00000003\.jpg cannot be read as an image"):
        list(data.train_batches(0))
    (root / "annotations" / "validation" / "ADE_val_00000001.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"ADE_val_00000001\.png cannot be read as a mask"):
        make_batches(tmp_path, eval_full_size=True)  # its size is needed at the start


def test_class_weights_of_masks_that_are_read_again(ade20k, monkeypatch):
    expected = median_frequencies(make_batches(ade20k).parts["train"].masks, 150)
    monkeypatch.setattr(segmentation, "fits_in_memory", lambda n_bytes, device: False)
    monkeypatch.setattr(segmentation, "READ_AHEAD", 4)
    assert torch.equal(median_frequencies(make_batches(ade20k).parts["train"].each_mask(), 150), expected)


# ---------------------------------------------------------------------------- the scripts


def test_a_run_of_the_script(ade20k, call_script, tmp_path, capsys, monkeypatch):
    """Once with the images in memory, once reading them in every epoch."""
    small = "--dataset ade20k --num-classes 150 --img-size 32 --n-layer 2 --n-embd 16 --n-head 2 --skip-levels 2 1 "
    small += "--mlp-internal-dim-multiplier 4 --epochs 1 --precision float32 --device cpu --num-workers 0"
    where = ["--data-dir", ade20k, "--runs-dir", tmp_path / "runs"]
    assert call_script("train_v4_unet.py", *small.split(), *where, "--name", "kept") == 0
    said = capsys.readouterr().out
    assert "validation mIoU" in said and "IoU flag" not in said  # 150 lines would hide the others
    monkeypatch.setattr(segmentation, "fits_in_memory", lambda n_bytes, device: False)
    assert call_script("train_v4_unet.py", *small.split(), *where, "--name", "read") == 0
    kept, read = (tmp_path / "runs" / name / "seed0" for name in ("kept", "read"))
    assert same_weights(weights(kept), weights(read))
    assert read_rows(kept, measured=False) == read_rows(read, measured=False)
    assert sum(name.startswith("val_iou_") for name in read_rows(kept)[0]) == 150
    summary = json.loads((kept / "summary.json").read_text())
    assert summary["test"] is None and summary["images"] == {"train": 9, "val": 5, "test": 0}
    image = ade20k / "data_ade20k" / "ADEChallengeData2016" / "images" / "validation" / "ADE_val_00000002.jpg"
    output = ["--output-dir", tmp_path / "pictures", "--data-dir", ade20k]
    assert call_script("interpretability/predict.py", image, "--run", kept, *output) == 0
    assert "1 picture, 1 with ground truth" in capsys.readouterr().out


def test_the_checker(ade20k, call_script, capsys):
    assert call_script("tools/verify_camvid.py", "--dataset", "ade20k", "--data-dir", ade20k) == 0
    said = capsys.readouterr().out
    assert "32 x 24 (3)" in said and "24 x 32 (6)" in said and "│ 149" in said and "no problems" in said
