"""Masks whose files would be read wrongly or left out without a word: what is read, and what is refused."""

import shutil
import struct
import unicodedata
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from training import SegmentationConfig, UserError
from tests.camvid_data import write_camvid
from training.data import segmentation
from training.data.classes import ADE20K, CAMVID, VOC
from training.data.image_files import TURNS, open_upright
from training.data.mask_files import BadFile, mask_shape, read_labels
from training.data.masks import ColourMasks, find_masks
from training.data.segmentation import MaskBatches

LABELS = np.repeat(np.arange(12, dtype=np.uint8), 2).reshape(4, 6)
VOC_LABELS = np.array([[0, 15], [7, 255]], dtype=np.uint8)


def grey(pixels, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def with_palette(pixels, colours, path):
    image = Image.fromarray(pixels).convert("P")
    image.putdata(pixels.flatten().tolist())
    image.putpalette(np.asarray(colours, dtype=np.uint8).flatten().tolist())
    image.save(path)


def voc_palette():
    """(256, 3): void's colour is the last."""
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[: VOC.void], palette[255] = VOC.colours, VOC.void_colour
    return palette


def read_voc(path):
    return read_labels(path, VOC, {VOC.void: 255, 255: VOC.void})


def problems(name, folder):
    return find_masks(name, folder, download=False).problems


# ---------------------------------------------------------------------------- how pixels become labels


def test_a_palette_in_another_order_is_read_by_its_colours(tmp_path):
    """What a program makes that stores pictures smaller."""
    palette = voc_palette()
    with_palette(VOC_LABELS, palette, tmp_path / "original.png")
    values, places = np.unique(VOC_LABELS, return_inverse=True)
    order = [2, 0, 3, 1]
    smaller = np.argsort(order)[places].reshape(2, 2).astype(np.uint8)
    with_palette(smaller, palette[values[order]], tmp_path / "smaller.png")
    assert not np.array_equal(smaller, VOC_LABELS)
    for name in ("original", "smaller"):
        assert read_voc(tmp_path / f"{name}.png").tolist() == [[0, 15], [7, VOC.void]]


def test_a_palette_of_greys_is_read_by_its_values(tmp_path):
    with_palette(LABELS, np.repeat(np.arange(256)[:, None], 3, axis=1), tmp_path / "a.png")
    assert np.array_equal(read_labels(tmp_path / "a.png", CAMVID, {}), LABELS)


@pytest.mark.parametrize("colours", [[(9, 8, 7)] * 12, np.repeat(np.arange(12)[::-1, None], 3, axis=1)])
def test_a_palette_of_other_colours_is_refused(colours, tmp_path):
    with_palette(LABELS, colours, tmp_path / "a.png")
    with pytest.raises(BadFile, match=r"a\.png has the colour .* for the value 0 in its palette.*without a palette"):
        read_labels(tmp_path / "a.png", CAMVID, {})


def test_a_palette_that_is_too_short_is_refused(tmp_path):
    with_palette(VOC_LABELS, voc_palette()[:21], tmp_path / "a.png")
    with pytest.raises(BadFile, match="has no colour for the value 255 in its palette"):
        read_voc(tmp_path / "a.png")


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_values_of_few_bits_are_read_as_they_are(bits, tmp_path):
    labels = np.arange(32, dtype=np.uint8).reshape(4, 8) % min(12, 2**bits)
    write_png(labels, bits, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "L" and np.array(image).max() > 100  # as Pillow shows them
    assert np.array_equal(read_labels(tmp_path / "a.png", CAMVID, {}), labels)


def write_png(pixels, bits, path):
    """A grey PNG of 2 or 4 bits, which Pillow does not write. pixels: rows of whole bytes."""
    n = 8 // bits
    shifts = bits * np.arange(n)[::-1]
    rows = (pixels.reshape(len(pixels), -1, n) << shifts).sum(-1).astype(np.uint8)
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", pixels.shape[1], len(pixels), bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", content), (b"IEND", b"")]
    written = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(written))


@pytest.mark.parametrize("how", [dict(format="JPEG"), dict(format="TIFF", compression="jpeg")], ids=str)
def test_masks_in_jpeg_are_refused(how, tmp_path):
    write_camvid(tmp_path, "colours", n_train=1, n_val=1)
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "a.png", **how)  # whatever its name is
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "b.png", **how)
    for name, read in (("a", read_voc), ("b", ColourMasks(tmp_path / "class_dict.csv"))):
        with pytest.raises(BadFile, match=rf"{name}\.png is compressed as JPEG.*PNG"):
            read(tmp_path / f"{name}.png")


@pytest.mark.parametrize("mode", ["L", "P"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_tiff_that_is_stored_turned(mode, compression, orientation, tmp_path):
    image = Image.fromarray(LABELS)
    if mode == "P":
        image = image.convert("P")
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = TURNS[{6: 8, 8: 6}.get(orientation, orientation)]
    image.transpose(undo).save(tmp_path / "a.tif", exif=exif, compression=compression)
    assert np.array_equal(read_labels(tmp_path / "a.tif", CAMVID, {}), LABELS)
    assert open_upright(tmp_path / "a.tif").size == (6, 4) and mask_shape(tmp_path / "a.tif") == (4, 6)


def test_a_mask_in_bmp(tmp_path):
    grey(LABELS, tmp_path / "a.bmp")
    assert np.array_equal(read_labels(tmp_path / "a.bmp", CAMVID, {}), LABELS)


# ---------------------------------------------------------------------------- which files are paired


@pytest.fixture
def camvid(tmp_path):
    write_camvid(tmp_path / "data_camvid", n_train=2, n_val=1)
    return tmp_path / "data_camvid"


def names(pairs):
    return [(pair.image.name, pair.mask.name) for pair in pairs]


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        (["a_L", "b_L"], ["a_L", "b_L"]),
        (["a", "a_L"], ["a", "a_L"]),
        (["a", "a_L"], ["a_L", "a_L_L"]),
        (["a", "b_L"], ["a_L", "b_L"]),
        (["a_L"], ["a_L_L"]),
    ],
)
def test_images_whose_names_end_in_l(images, masks, camvid):
    for folder, new in (("train", images), ("trainannot", masks)):
        old = sorted((camvid / folder).iterdir())
        pixels = old[0].read_bytes()
        for path in old:
            path.unlink()
        for name in new:
            (camvid / folder / f"{name}.png").write_bytes(pixels)
    files = find_masks("camvid", camvid)
    expected = [(f"{image}.png", f"{mask}.png") for image, mask in zip(images, masks, strict=True)]
    assert names(files.pairs["train"]) == expected and not files.problems


def test_names_of_composed_and_of_single_letters(camvid):
    for folder, form in (("train", "NFD"), ("trainannot", "NFC")):
        (camvid / folder / "train_001.png").rename(camvid / folder / unicodedata.normalize(form, "straße_é.png"))
    files = find_masks("camvid", camvid)
    assert len(files.pairs["train"]) == 2 and not files.problems


def test_folders_with_images_inside_a_part_are_refused(camvid):
    shutil.copytree(camvid / "val", camvid / "train" / "more" / "deep")
    (camvid / "trainannot" / "notes").mkdir()
    (said,) = problems("camvid", camvid)
    assert said.startswith(f"{camvid / 'train' / 'more'} is a folder with images, which are not read: move them")


def test_a_broken_link_is_missing(camvid, call_script, capsys):
    mask = camvid / "valannot" / "val_000.png"
    mask.unlink()
    mask.symlink_to("nowhere")
    (said,) = problems("camvid", camvid)
    assert said == f"{mask} is missing: restore it"
    assert call_script("tools/verify_camvid.py", "--data-dir", camvid) == 1
    assert capsys.readouterr().err.count(str(mask)) == 1


# ---------------------------------------------------------------------------- Pascal VOC and Cityscapes


@pytest.fixture
def voc(tmp_path):
    """The folder VOC2012 with the images a, b and c."""
    root = tmp_path / "data_voc" / "VOCdevkit" / "VOC2012"
    for part, listed in (("train", "ab"), ("val", "c")):
        for name in listed:
            grey(np.zeros((4, 4, 3)), root / "JPEGImages" / f"{name}.jpg")
            grey(np.zeros((4, 4)), root / "SegmentationClass" / f"{name}.png")
        file = root / "ImageSets" / "Segmentation" / f"{part}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(listed))
    return root


@pytest.fixture
def city(tmp_path):
    """Cityscapes with the images 0 and 1 of one city in each part."""
    root = tmp_path / "data_cityscapes"
    for part in ("train", "val"):
        for name in "01":
            grey(np.zeros((4, 4, 3)), root / "leftImg8bit" / part / "ulm" / f"{name}_leftImg8bit.png")
            for kind in ("labelIds", "color"):
                grey(np.zeros((4, 4)), root / "gtFine" / part / "ulm" / f"{name}_gtFine_{kind}.png")
    return root


@pytest.mark.parametrize("lost", ["JPEGImages/b.jpg", "SegmentationClass/c.png"])
def test_a_listed_file_of_voc_is_missing_at_the_start(lost, voc, monkeypatch):
    (voc / lost).unlink()
    assert problems("voc", voc.parents[1]) == [f"{voc / lost} is missing: restore it"]
    monkeypatch.setattr(segmentation, "fits_in_memory", lambda n_bytes, device: False)
    config = SegmentationConfig(epochs=1, batch_size=2, learning_rate=1e-3, weight_decay=0.0, dataset="voc")
    with pytest.raises(UserError, match="is missing: restore it"):
        MaskBatches(find_masks("voc", voc.parents[1]), config, 16, torch.device("cpu"))


def test_a_line_of_voc_is_repeated(voc):
    file = voc / "ImageSets" / "Segmentation" / "train.txt"
    file.write_text("a\n\nb\na\na\n")
    files = find_masks("voc", voc.parents[1])
    assert files.problems == [f"{file} lists a 3 times: remove the repeated lines"]
    assert [pair.image.stem for pair in files.pairs["train"]] == ["a", "b"]


def test_files_of_cityscapes_without_a_partner(city):
    assert problems("cityscapes", city) == []
    image = city / "leftImg8bit" / "train" / "ulm" / "0_leftImg8bit.png"
    mask = city / "gtFine" / "val" / "ulm" / "1_gtFine_labelIds.png"
    copy = image.with_name("1_leftImg8bit copy.png")
    shutil.copy(image, copy)
    image.unlink()
    mask.unlink()
    assert [said.split(":")[0] for said in problems("cityscapes", city)] == [
        f"{copy} is not called NAME_leftImg8bit.png, as Cityscapes' images are",
        f"{city}/gtFine/train/ulm/0_gtFine_labelIds.png has no image in {city}/leftImg8bit/train",
        f"{city}/leftImg8bit/val/ulm/1_leftImg8bit.png has no mask in {city}/gtFine/val",
    ]


def test_an_image_of_cityscapes_with_two_endings(city):
    image = city / "leftImg8bit" / "train" / "ulm" / "0_leftImg8bit.png"
    shutil.copy(image, image.with_suffix(".bmp"))
    files = find_masks("cityscapes", city)
    assert len(files.pairs["train"]) == 2
    assert files.problems == [f"{image.with_suffix('.bmp')} and {image.name} have the same name: remove one of them"]


def test_the_palette_of_ade20k_is_its_classes(tmp_path):
    labels = np.array([[0, 1], [150, 3]], dtype=np.uint8)
    renamed = {0: ADE20K.void} | {label + 1: label for label in range(ADE20K.void)}
    with_palette(labels, [ADE20K.void_colour, *ADE20K.colours], tmp_path / "a.png")
    assert read_labels(tmp_path / "a.png", ADE20K, renamed).tolist() == [[150, 0], [149, 2]]
