"""Where segmentation data are looked for and how they are read; what is wrong with them is said before training."""

import shutil
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from training import SegmentationConfig, UserError
from tests.camvid_data import COLOURS, write_camvid, write_class_dict
from training.data import data_folder
from training.data.classes import CAMVID, CAMVID_FOLD, CITYSCAPES, VOC
from training.data.masks import ColourMasks, find_masks
from training.data.segmentation import MaskBatches

LAYOUTS = ["labels", "colours"]
MASKS = {"labels": "trainannot/train_{:03d}.png", "colours": "train_labels/train_{:03d}_L.png"}
TRAIN = dict(epochs=1, batch_size=2, learning_rate=1e-3, weight_decay=0.0)


def make_batches(name, folder, **fields):
    config = SegmentationConfig(**(TRAIN | dict(dataset=name, horizontal_flip=0.5, shift_scale_rotate=1.0) | fields))
    return MaskBatches(find_masks(name, folder), config, (16, 24), torch.device("cpu"))


@pytest.fixture
def camvid(tmp_path):
    """Writes made-up CamVid in a layout; returns its folder."""

    def write(layout="labels"):
        folder = tmp_path / "data_camvid"
        write_camvid(folder, layout, n_train=4, n_val=2, size=(48, 32))
        return folder

    return write


# ---------------------------------------------------------------------------- CamVid


def test_both_layouts_of_the_same_images_give_the_same_tensors(tmp_path):
    batches = []
    for layout in LAYOUTS:
        write_camvid(tmp_path / layout, layout, n_train=4, n_val=2, size=(48, 32))
        data = make_batches("camvid", tmp_path / layout)
        batches.append([*data.train_batches(0), *data.eval_batches("val")])
    assert len(batches[0]) == 3
    for one, other in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert {label for _, masks in batches[0] for label in masks.unique().tolist()} == set(range(12))


def test_the_fold_has_each_of_the_32_classes_once():
    folded = [name for group in CAMVID_FOLD.values() for name in group]
    assert len(folded) == len(set(folded)) == 32
    assert list(CAMVID_FOLD) == [*CAMVID.names, "void"] and CAMVID.void == 11
    assert [set(group) for group in CAMVID_FOLD.values()] == [set(COLOURS[label]) for label in range(12)]


@pytest.mark.parametrize("comma", [",", ", "])  # copies of the data differ in it
def test_every_colour_is_read_as_the_label_it_is_folded_to(tmp_path, comma):
    table = tmp_path / "class_dict.csv"
    write_class_dict(table)
    table.write_text("\ufeff" + table.read_text().replace(",", comma), encoding="utf-8")
    colours = [(label, colour) for label, group in COLOURS.items() for colour in group.values()]
    Image.fromarray(np.array([[colour for _, colour in colours]], dtype=np.uint8)).save(tmp_path / "mask.png")
    assert ColourMasks(table)(tmp_path / "mask.png").tolist() == [[label for label, _ in colours]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_test_part_is_read_where_there_is_one(camvid, layout):
    folder = camvid(layout)
    suffix = "annot" if layout == "labels" else "_labels"
    shutil.copytree(folder / "val", folder / "test")
    shutil.copytree(folder / f"val{suffix}", folder / f"test{suffix}")
    data = make_batches("camvid", folder)
    assert [data.size(part) for part in ("train", "val", "test")] == [4, 2, 2]
    assert find_masks("camvid", folder).description["images"] == {"train": 4, "val": 2, "test": 2}


def test_palette_masks_and_files_that_are_no_images(camvid):
    folder = camvid()
    before = make_batches("camvid", folder).parts["train"].masks
    path = folder / MASKS["labels"].format(1)
    mask = Image.open(path)
    mask.putpalette(CAMVID.palette.flatten().tolist())
    mask.save(path)
    for name in ("Thumbs.db", ".DS_Store", "notes.txt", "._train_001.png", "._other.png"):
        (folder / "train" / name).touch()
        (folder / "trainannot" / name).touch()
    assert Image.open(path).mode == "P"
    assert np.array_equal(make_batches("camvid", folder).parts["train"].masks, before)


@pytest.mark.parametrize("named", [True, False])
def test_the_folder_may_be_named_or_the_one_above_it(camvid, named, tmp_path, monkeypatch):
    folder = camvid()
    if not named:
        folder = folder.rename(tmp_path / "CamVid")
    assert data_folder("camvid", folder) == folder
    if named:
        (tmp_path / "val").mkdir()  # of something else: the folder of that name goes before
        assert data_folder("camvid", tmp_path) == folder
        monkeypatch.setenv("VISION_BDH_DATA", str(tmp_path))
        assert data_folder("camvid", None) == folder


# ---------------------------------------------------------------------------- what is wrong with CamVid


def save(array, path):
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path)


def sixteen_bits(path):
    Image.fromarray(np.full((32, 48), 5000, dtype=np.uint16)).save(path)


def damage(folder, layout):
    """Each fault: what makes it, and what its message must name."""
    image, mask = folder / "train" / "train_001.png", folder / MASKS[layout].format(1)
    masks_end = mask.parent.name[5:]
    faults = {
        "no mask": (mask.unlink, [image, "has no mask"]),
        "no image": (image.unlink, [mask, "has no image"]),
        "another size": (lambda: save(np.zeros((32, 40, 3)), image), [image, "40 x 32", mask, "48 x 32"]),
        "cut mask": (lambda: mask.write_bytes(mask.read_bytes()[:80]), [mask, "cannot be read"]),
        "text": (lambda: mask.write_text("no image"), [mask, "cannot be read"]),
        "cut image": (lambda: image.write_bytes(image.read_bytes()[:200]), [image, "cannot be read"]),
        "empty image": (lambda: image.write_bytes(b""), [image, "cannot be read"]),
        "empty part": (lambda: [path.unlink() for path in folder.glob("val*/*")], [folder / "val", "holds no images"]),
        "no part": (lambda: remove(*folder.glob("val*")), [folder, "val/", f"val{masks_end}/ missing"]),
        "no masks of a part": (lambda: remove(folder / f"val{masks_end}"), [folder, f"(val{masks_end}/ missing)"]),
        "test without masks": (
            lambda: shutil.copytree(folder / "val", folder / "test"),
            [folder / "test", f"test{masks_end} does not"],
        ),
        "both layouts": (
            lambda: [(folder / name).mkdir(exist_ok=True) for name in ("trainannot", "train_labels")],
            [folder, "both CamVid layouts", "trainannot", "train_labels"],
        ),
        "one name": (lambda: shutil.copy(image, image.with_suffix(".bmp")), ["train_001.bmp", image.name, "same name"]),
        "16 bits": (lambda: sixteen_bits(image), [image, "more than 8 bits"]),
    }
    if layout == "labels":
        faults["label"] = (lambda: save(odd_pixel(3, 12), mask), [mask, "label 12", "row 5, column 7", "0 to 11"])
        faults["colours"] = (lambda: save(np.zeros((32, 48, 3)), mask), [mask, "RGB", "not a label mask"])
        return faults
    table = folder / "class_dict.csv"
    faults["colour"] = (
        lambda: save(odd_pixel((0, 0, 0), (1, 2, 3)), mask),
        [mask, "(1, 2, 3)", "row 5, column 7", "class_dict.csv"],
    )
    faults["no table"] = (table.unlink, [table, "name, r, g, b"])
    faults["binary table"] = (lambda: table.write_bytes(b"PK\x03\x04\xff\xfe"), [table, "name, r, g, b"])
    for name, content, words in (
        ("no columns", "a,b\n1,2\n", ["name, r, g, b"]),
        ("empty table", "", ["name, r, g, b"]),
        ("only a header", "name,r,g,b\n", ["no classes"]),
        ("a colour twice", "name,r,g,b\nSky,1,2,3\nCar,1,2,3\n", ["line 3", "Car"]),
        ("no numbers", "name,r,g,b\nSky,1,x,3\n", ["name, r, g, b"]),
        ("short rows", "name,r,g,b\nSky,1\n", ["name, r, g, b"]),
        ("other classes", "name,r,g,b\nCheese,1,2,3\n", ["Cheese"]),
        ("no colour", "name,r,g,b\nSky,1,2,300\n", ["line 2", "0 to 255"]),
    ):
        faults[name] = (partial(table.write_text, content), [table, *words])
    return faults


def remove(*folders):
    for folder in folders:
        shutil.rmtree(folder)


def odd_pixel(value, odd):
    """A mask of one value but for one pixel."""
    mask = np.full((32, 48, *np.shape(value)), value)
    mask[5, 7] = odd
    return mask


FAULTS = [(layout, fault) for layout in LAYOUTS for fault in damage(Path(), layout)]


@pytest.mark.parametrize(("layout", "fault"), FAULTS)
def test_a_fault_is_told_before_training_starts(layout, fault, camvid):
    folder = camvid(layout)
    make, parts = damage(folder, layout)[fault]
    make()
    with pytest.raises(UserError) as error:
        make_batches("camvid", folder)
    said = str(error.value)
    assert all(str(part) in said for part in parts) and "Errno" not in said, said


def test_several_faults_are_told_together_and_the_rest_counted(camvid):
    folder = camvid()
    broken = [folder / "train" / "train_000.png", folder / "valannot" / "val_001.png"]
    intact = {path: path.read_bytes() for path in broken}
    for path in broken:
        path.write_bytes(b"")
    assert [line.split(" cannot")[0] for line in refusal(folder)[1:]] == [*map(str, broken)]
    for index in range(4):
        (folder / "train" / f"lonely_{index}.png").write_bytes(intact[broken[0]])
        (folder / "valannot" / f"lonely_{index}.png").write_bytes(intact[broken[1]])
    lines = refusal(folder)
    assert lines[0].startswith("8 of the files of camvid cannot be used") and "tools/verify_camvid.py" in lines[0]
    assert len(lines) == 7 and lines[-1] == "and 3 more"


def refusal(folder):
    with pytest.raises(UserError) as error:
        make_batches("camvid", folder)
    return str(error.value).splitlines()


@pytest.mark.parametrize(
    ("name", "place", "words"),
    [
        ("camvid", "nowhere", ["does not hold CamVid", "no such folder", "--data-dir"]),
        ("camvid", "", ["does not hold CamVid", "train/, trainannot/, val/", "--data-dir"]),
        ("cityscapes", "", ["does not hold Cityscapes", "cityscapes-dataset.com"]),
        ("voc", "nowhere", ["could not be downloaded (no network)", "VOCtrainval_11-May-2012.tar"]),
    ],
)
def test_folders_without_the_data(name, place, words, tmp_path, monkeypatch):
    no_network = Mock(side_effect=OSError("no network"))
    monkeypatch.setattr(datasets.voc, "download_and_extract_archive", no_network)
    with pytest.raises(UserError) as error:
        find_masks(name, tmp_path / place)
    assert all(word in str(error.value) for word in [*words, str(tmp_path / place)])


# ---------------------------------------------------------------------------- the checker


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_checker_tells_what_it_found(layout, camvid, call_script, capsys):
    assert call_script("tools/verify_camvid.py", "--data-dir", camvid(layout)) == 0
    said = capsys.readouterr().out
    files = find_masks("camvid", camvid(layout))
    masks = np.stack([files.read_mask(pair.mask) for pair in files.pairs["train"]])
    shares = 100 * np.bincount(masks.ravel(), minlength=12) / masks.size
    for label, name in enumerate([*CAMVID.names, "void"]):
        assert [label, name, f"{shares[label]:.2f}"] == _cells(said, name)[:1] + _cells(said, name)[1:3]
    assert "48 x 32 (4)" in said and "48 x 32 (2)" in said and "no problems: ready to train" in said
    assert ("colours" in said) == (layout == "colours")


def _cells(text, name):
    (line,) = [line for line in text.splitlines() if f" {name} " in line]
    label, *rest = [cell.strip() for cell in line.strip("│").split("│")]
    return [int(label), *rest]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_checker_lists_every_fault_once(layout, camvid, call_script, capsys):
    folder = camvid(layout)
    (folder / "train" / "train_000.png").unlink()
    (folder / MASKS[layout].format(1)).write_text("no image")
    save(np.zeros((8, 8, 3)), folder / "val" / "val_000.png")
    assert call_script("tools/verify_camvid.py", "--data-dir", folder) == 1
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert lines[0] == "error: 3 problems:" and len(lines) == 4
    for line, name, what in zip(lines[1:], ("000", "001", "val_000.png"), ("no image", "read", "8 x 8"), strict=True):
        assert name in line and what in line
    assert "48 x 32 (2)" in captured.out and "no problems" not in captured.out


def test_the_checker_lists_few_of_many_sizes(tmp_path, call_script, capsys):
    assert call_script("tools/verify_camvid.py", "--data-dir", tmp_path) == 1
    assert "does not hold CamVid" in capsys.readouterr().err
    for index in range(10):
        for name, shape in (("train", (index + 1, 8, 3)), ("trainannot", (index + 1, 8))):
            for folder in (name, name.replace("train", "val")):
                (tmp_path / folder).mkdir(exist_ok=True)
                save(np.zeros(shape), tmp_path / folder / f"{index}.png")
    (tmp_path / "val" / "9.png").unlink()
    assert call_script("tools/verify_camvid.py", "--data-dir", tmp_path) == 1
    captured = capsys.readouterr()
    assert "and 2 more sizes" in " ".join(captured.out.split()) and captured.err.startswith("error: 1 problem:\n")


# ---------------------------------------------------------------------------- Pascal VOC and Cityscapes


@pytest.fixture
def voc(tmp_path):
    """Pascal VOC 2012 as torchvision's reader wants it: two images to train on, one to validate with."""
    root = tmp_path / "data_voc" / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for part, names in (("train", "ab"), ("val", "c")):
        (root / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            save(np.full((16, 24, 3), ord(name)), root / "JPEGImages" / f"{name}.jpg")
            mask = np.zeros((16, 24))
            mask[:4], mask[4:8, :12], mask[-1] = 20, ord(name) - 96, 255
            save(mask, root / "SegmentationClass" / f"{name}.png")
    return tmp_path / "data_voc"


def test_voc(voc):
    data = make_batches("voc", voc, horizontal_flip=0.0, shift_scale_rotate=0.0)
    assert [data.size(part) for part in ("train", "val", "test")] == [2, 1, 0]
    ((_, masks),) = data.eval_batches("val")
    expected = np.zeros((16, 24))
    expected[:4], expected[4:8, :12], expected[-1] = 20, 3, VOC.void
    assert VOC.void == 21 and np.array_equal(masks[0], expected)
    assert find_masks("voc", voc).description["class_names"][:2] == ["background", "aeroplane"]


def test_voc_faults(voc, tmp_path, monkeypatch):
    mask = voc / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "c.png"
    save(np.full((16, 24), 21), mask)  # the number that void has here is no label of the files
    with pytest.raises(UserError, match="label 21") as error:
        make_batches("voc", voc)
    assert str(mask) in str(error.value)
    mask.unlink()
    with pytest.raises(UserError, match=r"c\.png is missing"):
        make_batches("voc", voc)
    parts = voc / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation"
    (parts / "val.txt").write_text("c\na\n")
    with pytest.raises(UserError, match=r"val\.txt lists a, which train\.txt lists, too: remove it from one of them"):
        make_batches("voc", voc)
    (parts / "val.txt").write_text("\n")
    with pytest.raises(UserError, match=r"val\.txt lists no images"):
        make_batches("voc", voc)
    (parts / "train.txt").unlink()
    with pytest.raises(UserError, match=r"VOC2012 is incomplete \(.*train\.txt\).*VOCtrainval_11-May-2012\.tar"):
        make_batches("voc", voc)


def test_voc_colours():
    known = {"background": (0, 0, 0), "aeroplane": (128, 0, 0), "car": (128, 128, 128), "person": (192, 128, 128)}
    known |= {"potted_plant": (0, 64, 0), "tv_monitor": (0, 64, 128)}
    assert {name: VOC.colours[VOC.names.index(name)] for name in known} == known
    assert VOC.palette[VOC.void].tolist() == [224, 224, 192] and len(VOC.names) == 21


@pytest.fixture
def cityscapes(tmp_path):
    root = tmp_path / "data_cityscapes"
    for part in ("train", "val"):
        for kind in ("leftImg8bit", "gtFine"):
            (root / kind / part / "ulm").mkdir(parents=True)
        save(np.zeros((16, 24, 3)), root / "leftImg8bit" / part / "ulm" / "ulm_0_leftImg8bit.png")
        ids = np.arange(16 * 24).reshape(16, 24) % 34
        save(ids, root / "gtFine" / part / "ulm" / "ulm_0_gtFine_labelIds.png")
    return root


def test_cityscapes(cityscapes):
    data = make_batches("cityscapes", cityscapes, horizontal_flip=0.0, shift_scale_rotate=0.0)
    ((_, masks),) = data.eval_batches("val")
    train_ids = {each.id: each.train_id for each in datasets.Cityscapes.classes}
    expected = [train_ids[value % 34] for value in range(16 * 24)]
    assert masks.flatten().tolist() == [CITYSCAPES.void if each in (255, -1) else each for each in expected]
    assert CITYSCAPES.void == 19 and CITYSCAPES.names[0] == "road" and CITYSCAPES.names[18] == "bicycle"
    by_name = {each.name.replace(" ", "_"): each.color for each in datasets.Cityscapes.classes}
    assert all(by_name[name] == colour for name, colour in zip(CITYSCAPES.names, CITYSCAPES.colours, strict=True))


def test_cityscapes_in_order_and_without_files_that_are_no_images(cityscapes):
    for city in ("bonn", "zell", "aachen"):
        for kind in ("leftImg8bit", "gtFine"):
            shutil.copytree(cityscapes / kind / "train" / "ulm", cityscapes / kind / "train" / city)
            (cityscapes / kind / "train" / city / "Thumbs.db").touch()
    pairs = find_masks("cityscapes", cityscapes).pairs["train"]
    assert [pair.image.parent.name for pair in pairs] == ["aachen", "bonn", "ulm", "zell"]
    assert all(pair.mask.is_file() and pair.mask.parent.name == pair.image.parent.name for pair in pairs)


def test_cityscapes_faults(cityscapes):
    mask = cityscapes / "gtFine" / "val" / "ulm" / "ulm_0_gtFine_labelIds.png"
    save(np.full((16, 24), 34), mask)
    with pytest.raises(UserError, match=r"labelIds\.png has the label 34.*0 to 33"):
        make_batches("cityscapes", cityscapes)
    mask.unlink()
    with pytest.raises(UserError, match=r"val/ulm/ulm_0_leftImg8bit\.png has no mask in \S+gtFine/val"):
        make_batches("cityscapes", cityscapes)
    shutil.rmtree(cityscapes / "leftImg8bit" / "val" / "ulm")
    with pytest.raises(UserError, match=r"leftImg8bit/val holds no images"):
        make_batches("cityscapes", cityscapes)
