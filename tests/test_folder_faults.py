"""Image folders as people have them: odd part names, a folder too deep, hidden files, changed files at resume."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from training import ClassificationConfig, UserError, fit
from training.data import ImageBatches, Split, draw_split, finding, load_dataset
from training.data.finding import Finder
from training.data.mask_files import read_image
from training.data.text import load_text
from training.runs import Run

SIZE = 8
COLOURS = {"cat": (200, 30, 30), "dog": (30, 200, 30), "eel": (30, 30, 200)}


def fill(root, n=4, classes=("cat", "dog"), ending="png"):
    """n images in each root/CLASS, all different."""
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            colour = (*COLOURS.get(name, (9, 9, 9))[:2], i)
            Image.new("RGB", (12, 10), colour).save(root / name / f"{i}.{ending}")
    return root


def load(folder, channels=3):
    return load_dataset("folder", folder, SIZE, channels)


def batches_of(dataset, **fields):
    defaults = dict(dataset="folder", epochs=1, batch_size=4, learning_rate=1e-3, weight_decay=0.0)
    config = ClassificationConfig(**(defaults | fields))
    split = draw_split(dataset, config.val_fraction, config.train_limit, config.seed)
    return ImageBatches(dataset, split, config, 4, torch.device("cpu"))


def refusal(call, *args):
    """The one-line message of the UserError that the call raises."""
    with pytest.raises(UserError) as refused:
        call(*args)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture
def trial(experiment):
    """Makes a tiny experiment on a folder of two classes."""

    def make(folder, name="trial", options=None, **train):
        where = {"data_dir": folder, "num_workers": 0} | (options or {})
        fields = dict(dataset="folder", batch_size=4, epochs=1) | train
        return experiment(name, dict(img_size=SIZE, num_classes=2, patch_size=4), options=where, **fields)

    return make


# ---------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    "train, val, test",
    [
        ("train", "val", "test"),
        ("Train", "Valid", "Test"),
        ("TRAINING", "validation", "testing"),
        ("training_set", "validation-set", "test_set"),
        ("train images", "VAL_IMAGES", "test1"),
        ("trainset", "validset", "TestData"),
    ],
)
def test_parts_by_their_usual_names(train, val, test, tmp_path):
    for part, n in ((train, 4), (val, 3), (test, 2)):
        fill(tmp_path / part, n)
    dataset = load(tmp_path)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.description["images"] == {"train": 8, "val": 6, "test": 4}
    for part, images in ((train, dataset.train_images), (val, dataset.val_images), (test, dataset.test_images)):
        assert all(Path(path).is_relative_to(tmp_path / part) for path in images.paths)


@pytest.mark.parametrize("name", ["trainer", "values", "contest", "trains", "protest", "valve", "testament"])
def test_classes_whose_names_begin_like_a_part(name, tmp_path):
    assert load(fill(tmp_path, classes=("aa", name))).class_names == ("aa", name)


def test_other_folders_beside_the_parts_are_told(tmp_path):
    for part in ("train", "test", "pred"):
        fill(tmp_path / part)
    assert load(tmp_path).notes == (f"not used: pred, beside {tmp_path / 'train'}",)


def make_parts(*names):
    return lambda root: [fill(root / name) for name in names]


@pytest.mark.parametrize(
    "make, words",
    [
        (make_parts("train", "Train_set"), ["several", "train", "Train_set"]),
        (make_parts("train", "val", "valid"), ["several", "val", "valid"]),
        (make_parts("test"), ["test", "no folder of training images", "{root}/train"]),
        (make_parts("Validation"), ["Validation", "no folder of training images"]),
        (
            lambda root: fill(root, classes=("bus", "car", "train")),
            ["{root}/train", "4 images and no folders", "class"],
        ),
        (
            lambda root: (fill(root / "train"), fill(root, classes=("test",))),
            ["{root}/test", "4 images and no folders"],
        ),
        (lambda root: (fill(root / "train"), (root / "val" / "cat").mkdir(parents=True)), ["{root}/val", "no images"]),
        (lambda root: (fill(root / "train"), (root / "test").mkdir()), ["{root}/test", "no folders"]),
        (lambda root: (fill(root / "train"), fill(root / "val", classes=("cat", "fox"))), ["{root}/val", "(fox)"]),
        (lambda root: (fill(root / "train"), fill(root / "test", classes=("cat",))), ["{root}/test", "(dog)"]),
    ],
)
def test_parts_that_cannot_be_used(make, words, tmp_path):
    make(tmp_path)
    message = refusal(load, tmp_path)
    assert all(word.format(root=tmp_path) in message for word in words), message


# ---------------------------------------------------------------------------- a validation part


def test_a_validation_part_validates(tmp_path, capsys):
    fill(tmp_path / "train", 10)
    fill(tmp_path / "valid", 3)
    dataset = load(tmp_path)
    data = batches_of(dataset, val_fraction=0.4)
    assert capsys.readouterr().out.splitlines() == [
        f"validation: 6 images of {tmp_path / 'valid'}; --val-fraction is not used"
    ]
    assert [data.size(part) for part in ("train", "val", "test")] == [20, 6, 0]
    images = torch.cat([images for images, _ in data.eval_batches("val")])
    expected = [read_image(tmp_path / "valid" / name / f"{i}.png")[0, 0] for name in ("cat", "dog") for i in range(3)]
    assert ((images[:, :, 0, 0] + 1) * 127.5).round().tolist() == np.array(expected).tolist()
    assert torch.cat([labels for _, labels in data.eval_batches("val")]).tolist() == [0] * 3 + [1] * 3
    assert data.split.val.tolist() == [*range(20, 26)] and data.split.train.tolist() == [*range(20)]


def test_the_limit_concerns_training_images_only(tmp_path):
    fill(tmp_path / "train", 10)
    fill(tmp_path / "val", 3)
    splits = [batches_of(load(tmp_path), train_limit=8, seed=seed).split for seed in (0, 0, 1)]
    assert all(len(split.train) == 8 and len(split.val) == 6 for split in splits)
    assert [sum(split.train < 10) for split in splits] == [4, 4, 4]  # of each class in proportion
    assert splits[0].train.tolist() == splits[1].train.tolist() != splits[2].train.tolist()


def test_a_validation_part_may_lack_a_class(tmp_path):
    fill(tmp_path / "train", classes=("cat", "dog", "eel"))
    fill(tmp_path / "val", 2, classes=("cat", "eel"))
    (tmp_path / "val" / "dog").mkdir()
    dataset = load(tmp_path)
    assert dataset.val_labels.tolist() == [0, 0, 2, 2]
    assert dataset.notes[1] == f"no images of dog in {tmp_path / 'val'}"


@pytest.mark.parametrize("with_test", [True, False])
def test_a_run_with_a_validation_part(with_test, trial, tmp_path, monkeypatch, capsys):
    for part, n in (("train", 8), ("val", 3), *([("test", 2)] if with_test else [])):
        fill(tmp_path / "own" / part, n)
    run = trial(tmp_path / "own", epochs=2)
    summary = fit(run)
    assert f"validation: 6 images of {tmp_path / 'own' / 'val'}" in capsys.readouterr().out
    assert (summary["test"] is not None) == with_test
    assert summary["images"] == {"train": 16, "val": 6, "test": 4 * with_test}
    data = json.loads((run.folder / "config.json").read_text())["data"]
    assert data["validation"] == "own part"
    split, dataset = Run(run.folder).read_split(), load(tmp_path / "own")
    assert dataset.part("val", split)[0].paths.tolist() == dataset.val_images.paths.tolist()
    assert dataset.part("train", split)[0].paths.tolist() == dataset.train_images.paths.tolist()
    (run.folder / "summary.json").unlink()
    assert fit(trial(tmp_path / "own", epochs=2, options={"resume": True})) == summary


def test_a_part_of_a_drawn_split(tmp_path):
    dataset = load(fill(tmp_path))
    images, labels = dataset.part("val", Split(train=np.array([0, 1]), val=np.array([3, 4])))
    assert labels.tolist() == [0, 1] and [Path(path).name for path in images.paths] == ["3.png", "0.png"]
    assert "validation" not in dataset.description


# ---------------------------------------------------------------------------- one class


@pytest.mark.parametrize("between", ["", "more"])
@pytest.mark.parametrize("inside", ["parts", "classes", "train only"])
def test_a_folder_too_deep_is_named(inside, between, tmp_path):
    data = tmp_path / "unzipped" / between
    fill(data / "train" if inside != "classes" else data)
    if inside == "parts":
        fill(data / "test")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "readme.txt").touch()
    message = refusal(load, tmp_path)
    assert "single class" in message and message.endswith(f"--data-dir {data}")
    assert load(data).class_names == ("cat", "dog")


def test_a_part_too_deep_is_named(tmp_path):
    fill(tmp_path / "training_set" / "training_set")
    fill(tmp_path / "test_set" / "test_set")
    message = refusal(load, tmp_path)
    inner = tmp_path / "training_set" / "training_set"
    assert f"The classes look to be in {inner}: move them up into {inner.parent}" in message


def test_a_single_class(tmp_path):
    fill(tmp_path, classes=("cat",))
    assert refusal(load, tmp_path).endswith("a single class: add the folders of the other classes beside it")
    assert "the folder above" in refusal(load, tmp_path / "cat")


# ---------------------------------------------------------------------------- hidden files, other endings


def test_hidden_files_and_folders_are_passed_over(tmp_path, capsys):
    visible = load(fill(fill(tmp_path / "a" / "train").parent / "test").parent)
    root = fill(fill(tmp_path / "b" / "train").parent / "test").parent
    fill(root / "train", classes=(".ipynb_checkpoints", "__MACOSX"))
    fill(root / "train" / "cat", classes=(".ipynb_checkpoints",))
    fill(root, classes=(".git",))
    for path in (root / "train" / "cat" / "._0.png", root / "test" / ".DS_Store"):
        path.write_bytes(b"no image")
    dataset = load(root)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.description | {"name": ""} == visible.description | {"name": ""}
    batches_of(dataset)
    assert capsys.readouterr().out == f"passed over: 6 hidden files or folders, such as {root / '.git'}\n"


def test_every_ending_that_pillow_reads(tmp_path):
    fill(tmp_path, 1, classes=("cat", "dog"))
    endings = ["gif", "jfif", "JPG", "tiff", "webp", "ppm", "jp2", "tga", "ico"]
    for ending in endings:
        fill(tmp_path / "cat", 1, classes=(ending,), ending=ending)
    assert len(load(tmp_path).train_labels) == 2 + len(endings)
    assert batches_of(load(tmp_path), val_fraction=0.3).size("train") > 0  # all are read


def test_what_is_left_out_is_counted(tmp_path):
    fill(tmp_path)
    for name in ("labels.csv", "cat/a.txt", "cat/b.txt", "dog/LICENSE", "dog/c.mp4", "dog/d.pdf", "dog/e.eps"):
        (tmp_path / name).touch()
    Image.new("RGB", (4, 4)).save(tmp_path / "loose.png")
    loose, left_out = load(tmp_path).notes
    assert loose == f"left out: 1 image outside the class folders, such as {tmp_path / 'loose.png'}"
    assert left_out == "left out: 7 files (.txt, no ending, .mp4, .pdf, .eps, .csv): not images"


def test_a_class_without_images_says_what_it_holds(tmp_path):
    fill(tmp_path)
    (tmp_path / "hen").mkdir()
    (tmp_path / "hen" / "a.raw").touch()
    message = refusal(load, tmp_path)
    assert "hen" in message and "left out: 1 file (.raw)" in message


def test_files_are_found_in_the_order_of_torchvision(tmp_path):
    for name in ("b", "a", "Z", "c-d", "c"):
        for inside in ("", "x", "x/y", "x-1", "y.d"):
            fill(tmp_path / name / inside, 1, classes=("z",))
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    dataset = load(tmp_path)
    (tmp_path / "a" / "loop").unlink()
    expected = ImageFolder(str(tmp_path))
    assert [*zip(dataset.train_images.paths, dataset.train_labels, strict=True)] == expected.samples
    assert [*dataset.class_names] == expected.classes


@pytest.mark.parametrize("links", [{"hen/to": "cat", "cat/to": "hen"}, {"hen/a": "hen", "cat/b": "."}])
def test_links_that_lead_in_a_circle_end(links, tmp_path):
    """Each class once, and what a link adds: the other class, or nothing."""
    for name in ("hen", "cat"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / f"{name}.png")
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target, target_is_directory=True)
    found = Finder().all_images(tmp_path / "hen")
    assert [Path(file.path).name for file in found] == ["hen.png", *["cat.png"] * ("hen/to" in links)]


# ---------------------------------------------------------------------------- the fingerprint of the files


CHANGES = {
    "another file": lambda folder: (folder / "cat" / "0.png").rename(folder / "cat" / "0_new.png"),
    "another size": lambda folder: Image.new("RGB", (90, 70), (1, 2, 3)).save(folder / "cat" / "0.png"),
    "another class": lambda folder: [
        (folder / one / "0.png").rename(folder / other / "9.png") for one, other in (("cat", "dog"), ("dog", "cat"))
    ],
}


@pytest.mark.parametrize("part", ["", "train", "val", "test"])
@pytest.mark.parametrize("change", CHANGES)
def test_resuming_on_other_files_is_refused(change, part, trial, tmp_path):
    folder = tmp_path / "own"
    for each in ("train", "val", "test") if part else ("",):
        fill(folder / each)
    run = trial(folder)
    fit(run)
    (run.folder / "summary.json").unlink()
    CHANGES[change](folder / part)
    resumed = trial(folder, options={"resume": True})
    assert "other data (file_names_and_sizes: " in refusal(fit, resumed)


def test_a_run_of_an_older_version_has_no_fingerprint(trial, tmp_path):
    run = trial(fill(tmp_path / "own"))
    summary = fit(run)
    path = run.folder / "config.json"
    config = json.loads(path.read_text())
    del config["data"]["file_names_and_sizes"]
    path.write_text(json.dumps(config))
    (run.folder / "summary.json").unlink()
    assert fit(trial(tmp_path / "own", options={"resume": True})) == summary


def test_the_fingerprint_does_not_depend_on_the_place(tmp_path, monkeypatch):
    one, other = fill(tmp_path / "a" / "own" / "train").parent, fill(tmp_path / "b" / "own" / "Training").parent
    monkeypatch.chdir(other.parent)
    assert load(one).description == load(other).description == load(Path("own")).description


# ---------------------------------------------------------------------------- permissions and names


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    fill(tmp_path / "train")
    closed, real = tmp_path / "train" / "dog", os.scandir

    def scandir(folder):
        if Path(folder) == closed:
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(finding.os, "scandir", scandir)
    assert (
        refusal(load, tmp_path) == f"{tmp_path / 'train' / 'dog'} cannot be read (Permission denied): make it readable"
    )


def odd_name(folder, name):
    """A path whose name is not UTF-8, or a skipped test where the file system refuses it."""
    path = folder / os.fsdecode(name)
    try:
        path.mkdir()
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    path.rmdir()
    return path


def test_names_that_are_not_utf_8(trial, tmp_path, capsys):
    folder = odd_name(tmp_path, b"donn\xe9es")
    fill(folder / "train", 8)
    fill(folder / "val", 2)
    for part in ("train", "val"):
        (folder / part / "cat").rename(folder / part / os.fsdecode(b"chat\xff"))
    (folder / os.fsdecode(b"train/dog/x.\xe9")).touch()
    run = trial(folder)
    fit(run)
    out = capsys.readouterr().out
    assert r"donn\xe9es" in out and r"left out: 1 file (.\xe9)" in out
    data = json.loads((run.folder / "config.json").read_text())["data"]
    assert (data["name"], data["class_names"]) == (r"folder donn\xe9es", [r"chat\xff", "dog"])
    (run.folder / "summary.json").unlink()
    fit(trial(folder, options={"resume": True}))


def test_a_text_whose_name_is_not_utf_8(tmp_path):
    path = odd_name(tmp_path, b"po\xe8me.txt")
    path.write_bytes(b"words")
    text = load_text(path)
    assert text.description["name"] == r"po\xe8me.txt" and text.content == b"words"
