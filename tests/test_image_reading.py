"""How image files are read: upright by EXIF, transparent pixels on white; the files of images with masks."""

import re
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from training import UserError
from tests.camvid_data import write_camvid
from training.data import masks
from training.data.image_files import TURNS, ImageFiles, UnreadableImage
from training.data.mask_files import BadFile, read_image
from training.data.masks import ColourMasks, find_masks
from training.data.segmentation import read_pair

SIZE = 8
UPRIGHT = np.zeros((16, 24, 3), dtype=np.uint8)  # a red top, green and blue below: no turn or flip leaves it alone
UPRIGHT[:8], UPRIGHT[8:, :12], UPRIGHT[8:, 12:] = (250, 0, 0), (0, 250, 0), (0, 0, 250)


def turned(orientation):
    """UPRIGHT as it is stored with that orientation."""
    undo = {6: TURNS[8], 8: TURNS[6]}.get(orientation, TURNS.get(orientation))
    image = Image.fromarray(UPRIGHT)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return (image if undo is None else image.transpose(undo)), exif


@pytest.mark.parametrize("ending", ["png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation, ending, tmp_path):
    image, exif = turned(orientation)
    path = tmp_path / f"a.{ending}"
    image.save(path, exif=exif, **({"lossless": True} if ending == "webp" else {}))
    assert np.array_equal(read_image(path), UPRIGHT)
    found = ImageFiles([str(path)], 16, 3)[0].transpose(1, 2, 0)
    assert np.array_equal(found, UPRIGHT[:, 4:20])


def test_damaged_metadata_do_not_spoil_an_image(tmp_path):
    exif = b"Exif\0\0no TIFF header"
    Image.fromarray(UPRIGHT).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), UPRIGHT)


def test_a_turned_image_and_its_mask(tmp_path, call_script, capsys):
    folder = write_camvid_with_orientation(tmp_path / "data_camvid", 3)
    files = find_masks("camvid", folder)
    image, mask = read_pair(files.pairs["train"][0], files)
    assert np.array_equal(image, np.repeat(mask[..., None] * 20, 3, axis=2))  # the mask fits the upright image
    assert call_script("tools/verify_camvid.py", "--data-dir", folder) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "EXIF orientation: 2 images stored turned" in said and str(folder / "train" / "a.png") in said


def test_a_turned_image_whose_mask_was_turned_along(tmp_path, call_script, capsys):
    folder = write_camvid_with_orientation(tmp_path / "data_camvid", 6, turn_mask=True)
    assert call_script("tools/verify_camvid.py", "--data-dir", folder) == 1
    said = capsys.readouterr().err
    assert "24 x 16" in said and "16 x 24" in said and "turn one of them" in said


def write_camvid_with_orientation(folder, orientation, turn_mask=False):
    """CamVid of one image in each part, grey by its labels, stored turned; the mask upright or turned, too."""
    labels = np.arange(16 * 24).reshape(16, 24).astype(np.uint8) % 11
    exif = turned(orientation)[1]
    undo = {6: TURNS[8]}.get(orientation, TURNS[orientation])
    for part in ("train", "val"):
        (folder / part).mkdir(parents=True)
        (folder / f"{part}annot").mkdir()
        Image.fromarray(np.repeat(labels[..., None] * 20, 3, axis=2)).transpose(undo).save(
            folder / part / "a.png", exif=exif
        )
        mask = Image.fromarray(labels)
        (mask.transpose(undo) if turn_mask else mask).save(folder / f"{part}annot" / "a.png")
    return folder


def test_colour_hidden_by_transparency_is_not_read(tmp_path):
    """Two images that differ in their transparent half only are the same; that half is white."""
    found = []
    for name, hidden in (("a", (0, 0, 0)), ("b", (90, 250, 9))):
        pixels = np.zeros((SIZE, SIZE, 4), dtype=np.uint8)
        pixels[:4], pixels[4:, :, :3] = (200, 40, 40, 255), hidden
        image = Image.fromarray(pixels)
        image.save(tmp_path / f"{name}_rgba.png")
        image.convert("LA").save(tmp_path / f"{name}_la.png")
        image.save(tmp_path / f"{name}.webp", lossless=True, exact=True)
        image.quantize(8).save(tmp_path / f"{name}_palette.png")
        image.convert("RGB").save(tmp_path / f"{name}_colour_key.png", transparency=hidden)
        paths = sorted(map(str, tmp_path.glob(f"{name}*")))
        found.append([[ImageFiles(paths, SIZE, channels)[i] for i in range(5)] for channels in (1, 3)])
        assert np.array_equal(read_image(tmp_path / f"{name}_rgba.png"), found[-1][1][4].transpose(1, 2, 0))
    for one, other in zip(*found, strict=True):
        for a, b in zip(one, other, strict=True):
            assert np.array_equal(a, b) and (a[:, 4:] == 255).all() and (a[:, :4] != 255).any()


def test_partial_transparency_is_mixed_with_white_and_opaque_images_are_kept(tmp_path):
    Image.new("RGBA", (SIZE, SIZE), (100, 0, 200, 51)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0, 0].tolist() == [224, 204, 244]  # a fifth of the colour
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert("RGBA").save(tmp_path / "b.png")
    assert np.array_equal(read_image(tmp_path / "b.png"), pixels)


def test_the_colours_of_a_mask_count_where_they_are_transparent(tmp_path):
    write_camvid(tmp_path, "colours", n_train=1, n_val=1)
    path = tmp_path / "train_labels" / "train_000_L.png"
    read = ColourMasks(tmp_path / "class_dict.csv")
    before = read(path)
    with Image.open(path) as image:
        image.putalpha(0)
        image.save(path)
    assert np.array_equal(read(path), before)


def test_a_moving_picture_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ((200, 30, 30), (30, 200, 30), (30, 30, 200))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert ImageFiles([str(tmp_path / "a.gif")], SIZE, 3)[0][:, 0, 0].tolist() == [200, 30, 30]


def test_an_image_that_may_not_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "open", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
    path, message = tmp_path / "a.png", "a.png cannot be read (Permission denied): make it readable"
    with pytest.raises(UnreadableImage, match=re.escape(message)):
        ImageFiles([str(path)], SIZE, 3)[0]
    with pytest.raises(BadFile, match=re.escape(message)):
        read_image(path)


# ---------------------------------------------------------------------------- images with masks


def test_hidden_files_among_images_with_masks(tmp_path):
    write_camvid(tmp_path, n_train=2, n_val=1)
    before = find_masks("camvid", tmp_path)
    assert before.notes == ()
    for name in ("train/._train_000.png", "trainannot/.DS_Store", "val/notes.txt"):
        (tmp_path / name).write_bytes(b"")
    after = find_masks("camvid", tmp_path)
    assert (after.pairs, after.problems, after.description) == (before.pairs, [], before.description)
    assert after.notes[0].startswith("passed over: 2 hidden") and after.notes[1].startswith("left out: 1 file (.txt)")


def test_hidden_files_beside_the_cities_of_cityscapes(tmp_path):
    for part in ("train", "val"):
        for kind, end in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
            (tmp_path / kind / part / "ulm").mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / kind / part / "ulm" / f"ulm_0_{end}.png")
        (tmp_path / "leftImg8bit" / part / ".DS_Store").touch()
    files = find_masks("cityscapes", tmp_path)
    assert [len(files.pairs[part]) for part in ("train", "val")] == [1, 1] and not files.problems
    assert files.notes[0].startswith("passed over: 2 hidden")


def test_images_with_masks_have_a_fingerprint(tmp_path):
    write_camvid(tmp_path / "a", n_train=2, n_val=1)
    write_camvid(tmp_path / "b", n_train=2, n_val=1)
    one, other = (find_masks("camvid", tmp_path / name).description for name in "ab")
    assert one == other and len(one["file_names_and_sizes"]) == 64
    path = tmp_path / "b" / "trainannot" / "train_000.png"
    path.write_bytes(path.read_bytes() + b"\0")
    assert find_masks("camvid", tmp_path / "b").description != one


def test_masks_that_may_not_be_read(tmp_path, monkeypatch):
    denied = PermissionError(13, "Permission denied", str(tmp_path))
    monkeypatch.setattr(masks, "_find_camvid", mock.Mock(side_effect=denied))
    message = f"{tmp_path} cannot be read (Permission denied): make it readable"
    with pytest.raises(UserError, match=re.escape(message)):
        find_masks("camvid", tmp_path)
