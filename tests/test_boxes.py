"""Detection data in COCO's format: boxes, flips, damaged files; and the tool that makes such data."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from training import UserError, fit
from tests.camvid_data import write_camvid
from tests.inspecting import check_error
from tests.scenes import CLASS_NAMES, annotated, as_pixels, change, detection_trial, write_scenes
from training.data.box_batches import FlipWithBoxes
from training.data.boxes import find_scenes


@pytest.fixture
def trial(tmp_path):
    return partial(detection_trial, tmp_path, tmp_path / "runs")


@pytest.mark.parametrize("names", [("train", "val"), ("train2017", "val2017")])
def test_boxes_are_where_the_pixels_are(names, tmp_path):
    write_scenes(tmp_path / "all", n_train=5)
    for old, new in zip(("train", "val"), names, strict=True):
        (tmp_path / "all" / old).rename(tmp_path / "all" / new)
        annotations = tmp_path / "all" / "annotations"
        (annotations / f"instances_{old}.json").rename(annotations / f"instances_{new}.json")
    files = find_scenes(tmp_path / "all")
    assert files.class_names == CLASS_NAMES and not files.problems and [*files.parts] == ["train", "val"]
    image = np.asarray(Image.open(files.parts["train"].paths[0]))
    ((x0, y0, x1, y1),) = as_pixels(files.parts["train"].boxes[0], (48, 32))
    inside = image[y0:y1, x0:x1].reshape(-1, 3)
    assert (inside == inside[0]).all() and (x1 - x0, y1 - y0) == (12, 12)
    padded = files.parts["train"].targets(files.n_boxes)
    assert ((padded[..., 0] >= 0).sum(1) == [len(each) for each in files.parts["train"].boxes]).all()


def test_a_flip_moves_boxes_with_their_pixels():
    images, targets = torch.zeros(6, 1, 20, 30), torch.full((6, 2, 6), -1.0)
    for i in range(6):
        images[i, :, 3:9, i : i + 10] = 1
        targets[i, 0] = torch.tensor([i, (i + 5) / 30, 6 / 20, 10 / 30, 6 / 20, 0])
    flip = FlipWithBoxes()
    (flipped,) = flip.draw(6, 20, 30, torch.Generator().manual_seed(0))
    after, moved = flip.apply(images, targets, flipped)
    assert 0 < flipped.sum() < 6
    for i, image in enumerate(after):
        rows, columns = np.nonzero(image[0].numpy())
        assert as_pixels(moved[i, :1], (30, 20)) == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
        assert (columns.min() == i) == (not flipped[i]) and moved[i, 0, 0] == i and moved[i, 1, 0] == -1


def test_crowds_empty_boxes_and_numbers_of_categories(tmp_path, capsys):
    folder = write_scenes(tmp_path / "data_coco")

    def edit(content):
        first = content["annotations"][0]
        box = first["bbox"]
        content["annotations"] += [first | {"iscrowd": 1}, first | {"bbox": [*box[:3], 0]}]
        content["annotations"] += [content["annotations"][-1] | {"id": n} for n in (-1, -2)]
        for entry in (*content["annotations"], *content["categories"]):
            key = "category_id" if "bbox" in entry else "id"
            entry[key] = 90 - 3 * entry[key]  # COCO's have gaps, too
        first["bbox"] = [box[0], box[1], box[2], 32.4 - box[1]]  # a little beyond the border

    labels = [int(each[0, 0]) for each in (find_scenes(folder).parts[part].boxes[0] for part in ("train", "val"))]
    for part in ("train", "val"):
        change(annotated(folder, part), edit)
    files = find_scenes(folder)
    assert files.class_names == CLASS_NAMES[::-1] and not files.problems
    assert "left out: 3 boxes without an area" in files.notes[0]
    assert "2 boxes in " in files.notes[1] and "repeat another one" in files.notes[1]
    train, val = (files.parts[part].boxes[0] for part in ("train", "val"))
    assert train[:, 0].tolist() == [9 - labels[0]] and val[:, [0, 5]].tolist() == [
        [9 - labels[1], 0],
        [9 - labels[1], 1],
    ]
    assert as_pixels(train, (48, 32))[0][3] == 32


def rename_categories(content):
    content["categories"][0]["name"] = "another"


def boxes_as_shares(content):
    for annotation in content["annotations"]:
        annotation["bbox"] = [each / size for each, size in zip(annotation["bbox"], (48, 32, 48, 32), strict=True)]


def turn_by_exif(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)


BAD = {
    "no such folder": (lambda folder: folder.rename(folder.with_name("elsewhere")), "train and val missing"),
    "no val": (lambda folder: annotated(folder, "val").unlink(), r"\(val missing\)"),
    "empty": (lambda folder: annotated(folder).write_text(""), r"instances_train.json is not in COCO's format"),
    "no JSON": (lambda folder: annotated(folder).write_text("{"), r"instances_train.json is not in COCO's format"),
    "other JSON": (lambda folder: annotated(folder).write_text("{}"), r"COCO's format \(images: Field required"),
    "three numbers": (
        lambda folder: change(annotated(folder), lambda content: content["annotations"][0]["bbox"].pop()),
        r"instances_train.json is not in COCO's format \(annotations.0.bbox",
    ),
    "no images": (
        lambda folder: change(annotated(folder), lambda content: content.update(images=[])),
        "instances_train.json lists no images",
    ),
    "no boxes": (
        lambda folder: change(annotated(folder), lambda content: content.update(annotations=[])),
        "instances_train.json has no boxes to find",
    ),
    "missing image": (lambda folder: (folder / "train" / "000002.png").unlink(), r"000002.png is missing, but listed"),
    "damaged image": (
        lambda folder: (folder / "val" / "000001.png").write_text("no image"),
        r"val/000001.png cannot be read as an image",
    ),
    "another size": (
        lambda folder: Image.new("RGB", (9, 8)).save(folder / "val" / "000001.png"),
        "000001.png is 9 x 8 pixels, but annotated as 48 x 32",
    ),
    "box outside": (
        lambda folder: change(annotated(folder), lambda content: content["annotations"][0].update(bbox=[40, 2, 12, 9])),
        r"annotation 0 has the box \[40, 2, 12, 9\] .* not inside its image of 48 x 32",
    ),
    "shares instead of pixels": (
        lambda folder: change(annotated(folder), boxes_as_shares),
        "instances_train.json has no box beyond the first pixel, as if they were shares of the image",
    ),
    "unknown category": (
        lambda folder: change(annotated(folder), lambda content: content["annotations"][0].update(category_id=70)),
        "annotation 0 is of category 70, which is not in",
    ),
    "unknown image": (
        lambda folder: change(annotated(folder, "val"), lambda content: content["annotations"][0].update(image_id=70)),
        "annotation 0 is of image 70, which is not in",
    ),
    "categories with one id": (
        lambda folder: change(
            annotated(folder), lambda content: content["categories"].append(content["categories"][0])
        ),
        "instances_train.json has categories with the same id",
    ),
    "categories with one name": (
        lambda folder: [
            change(annotated(folder, part), lambda content: content["categories"][0].update(name=CLASS_NAMES[3]))
            for part in ("train", "val")
        ],
        "instances_train.json has two categories called 'colour 3': rename or merge them",
    ),
    "a file under two ids": (
        lambda folder: change(annotated(folder), lambda content: content["images"][1].update(file_name="./000000.png")),
        "instances_train.json lists 000000.png under more than one id",
    ),
    "two folders of a part": (
        lambda folder: [
            shutil.copytree(folder / "val", folder / "val2017"),
            shutil.copy(annotated(folder, "val"), annotated(folder, "val2017")),
        ],
        "data_coco holds val/ and val2017/, both with annotations: move one",
    ),
    "annotations without images": (
        lambda folder: shutil.copy(annotated(folder, "val"), annotated(folder, "test")),
        r"instances_test.json exists, but \S+/test with its images does not: add it",
    ),
    "an image on its side": (
        lambda folder: turn_by_exif(folder / "val" / "000001.png"),
        "000001.png is 32 x 48 pixels, but annotated as 48 x 32: it is read upright, as its EXIF.*remove that tag",
    ),
    "width for height": (
        lambda folder: Image.new("RGB", (32, 48)).save(folder / "val" / "000001.png"),
        "000001.png is 32 x 48 pixels, but annotated as 48 x 32: turn the image or correct its annotation",
    ),
    "other categories": (
        lambda folder: change(annotated(folder, "val"), rename_categories),
        "instances_val.json has other categories",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_give_one_message(kind, tmp_path, trial):
    damage, message = BAD[kind]
    damage(write_scenes(tmp_path / "data_coco"))
    run = trial()
    with pytest.raises(UserError, match=message) as error:
        fit(run)
    assert len(str(error.value).splitlines()) <= 2 and not run.folder.exists()


def test_json_as_other_programs_write_it(tmp_path):
    """48.0 for 48, false for 0, and the mark that some editors put before text."""

    def edit(content):
        for image in content["images"]:
            image.update(width=float(image["width"]), height=float(image["height"]))
        for annotation in content["annotations"]:
            annotation["iscrowd"] = bool(annotation.get("iscrowd", 0))
        content["annotations"].append(content["annotations"][0] | {"iscrowd": True})

    folder = write_scenes(tmp_path / "data_coco")
    before = find_scenes(folder)
    change(annotated(folder), edit)
    annotated(folder).write_bytes(b"\xef\xbb\xbf" + annotated(folder).read_bytes())
    after = find_scenes(folder)
    assert after.description == before.description and not after.problems  # the crowd does not train
    annotated(folder).write_bytes(annotated(folder).read_bytes()[3:])
    change(annotated(folder), lambda content: content["images"][0].update(width=48.5))
    with pytest.raises(UserError, match=r"COCO's format \(images\.0\.width: "):
        find_scenes(folder)


def test_test_images_without_annotations_are_noted(tmp_path):
    folder = write_scenes(tmp_path / "data_coco")
    shutil.copytree(folder / "val", folder / "test2017")
    files = find_scenes(folder)
    assert [*files.parts] == ["train", "val"] and not files.problems
    assert files.notes[0].startswith(f"there is no test on {folder / 'test2017'}: ")


@pytest.mark.parametrize(
    ("model", "options", "word"),
    [
        (dict(num_classes=3), {}, "set --num-classes 10"),
        (dict(in_channels=1), {}, "set --in-channels 3"),
        ({}, dict(eval_batch_size=5), "leave out --eval-batch-size"),
    ],
)
def test_what_does_not_fit_is_refused(model, options, word, trial, tmp_path):
    write_scenes(tmp_path / "data_coco", n_train=2, n_val=1)
    with pytest.raises(UserError, match=word):
        fit(trial(model=model, options=options))


# ---------------------------------------------------------------------------- tools/make_detection_data.py


def test_scenes_of_cifar(call_script, data_dir, tmp_path, capsys, cifar_arrays):
    out = tmp_path / "made"
    (tmp_path / "data_cifar10").symlink_to(data_dir / "data_cifar10")
    args = ["--data-dir", tmp_path, "--output", out, "--train", 12, "--val", 5]
    assert call_script("tools/make_detection_data.py", *args) == 0
    files = find_scenes(out)
    assert files.class_names == tuple(cifar_arrays["class_names"]) and not files.problems
    assert {part: len(of) for part, of in files.parts.items()} == {"train": 12, "val": 5}
    for part, source in (("train", "train"), ("val", "test")):
        means = cifar_arrays[f"{source}_images"].mean((1, 2))
        for path, boxes in zip(files.parts[part].paths, files.parts[part].boxes, strict=True):
            pixels = np.asarray(Image.open(path)).astype(float)
            assert pixels.shape == (96, 96, 3) and 1 <= len(boxes) <= 4
            x0, y0, x1, y1 = as_pixels(boxes, (96, 96))[-1]  # the last one, which nothing covers
            of_class = means[cifar_arrays[f"{source}_labels"] == boxes[-1, 0]]
            distance = np.abs(of_class - pixels[y0:y1, x0:x1].mean((0, 1))).max(1)
            assert distance.min() < 3 and 24 <= x1 - x0 <= 44
    before_again = [path.read_bytes() for path in sorted(out.rglob("*.*"))]
    assert call_script("tools/make_detection_data.py", *args) == 1
    check_error(capsys, "exists: remove it")
    again = [*args[:2], *args[4:]]  # into the folder in which the training script looks
    assert call_script("tools/make_detection_data.py", *again) == 0
    assert [path.read_bytes() for path in sorted((tmp_path / "data_coco").rglob("*.*"))] == before_again


def test_boxes_of_camvid(call_script, tmp_path):
    write_camvid(tmp_path / "data_camvid")
    out = tmp_path / "made"
    args = ["--source", "camvid", "--data-dir", tmp_path, "--output", out, "--min-area", 64]
    assert call_script("tools/make_detection_data.py", *args) == 0
    damaged = tmp_path / "data_camvid" / "trainannot" / "train_003.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:60])
    assert call_script("tools/make_detection_data.py", *args[:5], tmp_path / "half") == 1
    assert not (tmp_path / "half").exists()  # nothing that looks complete
    damaged.write_bytes(whole)
    files = find_scenes(out)
    assert files.class_names == ("sign", "car", "pedestrian", "bicyclist") and not files.problems
    for path, boxes in zip(files.parts["train"].paths, files.parts["train"].boxes, strict=True):
        number = int(path.stem)
        mask = np.asarray(Image.open(tmp_path / "data_camvid" / "trainannot" / f"train_{number:03d}.png"))
        cells = sum((mask == label).sum() for label in (6, 8, 9, 10)) // 64
        assert len(boxes) <= cells and (len(boxes) > 0) == (cells > 0)
        for box, (x0, y0, x1, y1) in zip(boxes, as_pixels(boxes, (48, 32)), strict=True):
            assert (mask[y0:y1, x0:x1] == (6, 8, 9, 10)[int(box[0])]).any(axis=0).all()  # every column
