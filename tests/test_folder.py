"""Folders of one's own images: what is loaded, the same streamed as from memory, and what is refused."""

import io
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from training import ClassificationConfig, UserError, fit
from analysis.analyze import analyze
from tests.trials import interrupt, resumed, same_weights, snapshot, weights
from training.data import ImageBatches, batches, load_dataset, split_train
from training.data.batches import MemoryPart, StreamedPart
from training.runs import Run

SIZE = 16
CLASSES = ("cat", "dog", "eel")
CPU = torch.device("cpu")


def random_image(rng, mode, width, height):
    """An image of a mode, of noise around one colour; with a palette, and transparent in places, where the mode can."""
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "P": (3,), "CMYK": (4,)}[mode]
    noise = rng.integers(0, 60, (height, width, *channels)) + rng.integers(0, 190, channels)
    image = Image.fromarray(noise.astype(np.uint8), "RGB" if mode == "P" else mode)
    return image.quantize(17) if mode == "P" else image


def fill(root, per_class, classes=CLASSES, seed=0):
    """root/CLASS/IMAGE of many sizes, modes and formats, some a folder deeper."""
    rng = np.random.default_rng(seed)
    kinds = "png-RGB jpg-RGB png-L png-RGBA png-P JPEG-L jpg-CMYK png-LA bmp-RGB webp-RGB".split()
    for name in classes:
        for i in range(per_class):
            ending, mode = kinds[i % len(kinds)].split("-")
            width, height = (int(side) for side in rng.integers(5, 50, 2))
            path = root / name / ("deeper" if i % 5 == 4 else "") / f"{i}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            random_image(rng, mode, width, height).save(path)
        (root / name / "notes.txt").write_text("not an image")
    return root


@pytest.fixture(scope="module")
def images_dir(tmp_path_factory):
    """train and test, 12 and 5 images a class. For reading only."""
    folder = tmp_path_factory.mktemp("images") / "pets"
    fill(folder / "train", 12)
    fill(folder / "test", 5, seed=1)
    return folder


@pytest.fixture
def own(images_dir, tmp_path):
    """A copy of images_dir, the test's own to damage."""
    return shutil.copytree(images_dir, tmp_path / "own" / "pets")


def as_told(path, channels, size=SIZE):
    """(C, S, S), what the README of an image folder says: the middle square, scaled (bicubic)."""
    image = Image.open(path)
    if image.has_transparency_data:  # composited on white
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB" if channels == 3 else "L")
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return pixels.reshape(size, size, channels).transpose(2, 0, 1)


def image_files(root, name):
    return sorted(str(path) for path in (root / name).rglob("*") if path.is_file() and path.suffix != ".txt")


def assert_holds(images, labels, root, channels=3):
    """images are those below root, class by class in alphabetical order."""
    paths = [path for name in CLASSES for path in image_files(root, name)]
    expected = {label: [as_told(path, channels) for path in image_files(root, CLASSES[label])] for label in range(3)}
    assert images.shape == (len(paths), channels, SIZE, SIZE)
    assert labels.dtype == np.int64 and labels.tolist() == sorted(labels) and len(labels) == len(paths)
    for label, wanted in expected.items():
        found = sorted(np.asarray(images[int(i)]).tobytes() for i in np.flatnonzero(labels == label))
        assert found == sorted(each.tobytes() for each in wanted)


# ---------------------------------------------------------------------------- what is loaded


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_their_middle_square_scaled(channels, images_dir):
    dataset = load_dataset("folder", images_dir, SIZE, channels)
    assert dataset.class_names == CLASSES
    assert_holds(dataset.train_images, dataset.train_labels, images_dir / "train", channels)
    assert_holds(dataset.test_images, dataset.test_labels, images_dir / "test", channels)
    assert dataset.train_images[0].dtype == np.uint8


@pytest.mark.parametrize("wide", [False, True])
def test_the_middle_square_of_the_right_size_is_not_changed(wide, tmp_path):
    """Not of a wide image squeezed: what lies left and right of its middle is cut."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE * (3 if wide else 1), 3), dtype=np.uint8)
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "1.png")
    found = load_dataset("folder", tmp_path, SIZE, 3).train_images[0]
    assert np.array_equal(found, (pixels[:, SIZE : 2 * SIZE] if wide else pixels).transpose(2, 0, 1))


@pytest.mark.parametrize("layout", ["test", "val", "test and val", "train only", "classes directly"])
def test_layouts(layout, images_dir, tmp_path):
    root = tmp_path / "own"
    if layout == "classes directly":
        shutil.copytree(images_dir / "train", root)
    else:
        shutil.copytree(images_dir / "train", root / "train")
    for part, seed in (("test", 5), ("val", 6)):
        if part in layout:
            fill(root / part, 2, seed=seed)
    dataset = load_dataset("folder", root, SIZE, 3)
    assert_holds(dataset.train_images, dataset.train_labels, root if layout == "classes directly" else root / "train")
    if "test" in layout:
        assert_holds(dataset.test_images, dataset.test_labels, root / "test")
    else:
        assert len(dataset.test_images) == len(dataset.test_labels) == 0
    if "val" in layout:
        assert_holds(dataset.val_images, dataset.val_labels, root / "val")
    else:
        assert dataset.val_images is dataset.val_labels is None


# ---------------------------------------------------------------------------- streamed


def batches_of(folder, num_workers=0, channels=3):
    dataset = load_dataset("folder", folder, SIZE, channels)
    split = split_train(dataset.train_labels, 0.25, None, seed=0)
    fields = dict(dataset="folder", epochs=1, batch_size=8, learning_rate=1e-3, weight_decay=0.0)
    config = ClassificationConfig(crop_scale_min=0.5, horizontal_flip=True, **fields)
    return ImageBatches(dataset, split, config, 7, CPU, num_workers)


@pytest.mark.parametrize("num_workers, channels", [(0, 3), (0, 1), (2, 3)])
def test_streamed_batches_are_those_from_memory(num_workers, channels, images_dir, monkeypatch):
    in_memory = batches_of(images_dir, channels=channels)
    monkeypatch.setattr(batches, "fits_in_memory", lambda n_bytes, device: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*worker processes")  # of a machine with fewer cores
        streamed = batches_of(images_dir, num_workers, channels)
        asked = [("train_batches", 0), ("train_batches", 1), ("eval_batches", "val"), ("eval_batches", "test")]
        pairs = [[list(getattr(data, name)(which)) for data in (in_memory, streamed)] for name, which in asked]
    assert {type(part) for part in in_memory.parts.values()} == {MemoryPart}
    assert {type(part) for part in streamed.parts.values()} == {StreamedPart}
    for (expected, found), n in zip(pairs, (27, 27, 9, 15), strict=True):
        assert sum(len(labels) for _, labels in expected) == n
        for (images, labels), (images_found, labels_found) in zip(expected, found, strict=True):
            assert torch.equal(images, images_found) and torch.equal(labels, labels_found)
    first, second = (torch.cat([images for images, _ in pairs[epoch][0]]) for epoch in (0, 1))
    assert not torch.equal(first, second)
    assert [streamed.size(part) for part in ("train", "val", "test")] == [27, 9, 15]


@pytest.fixture
def folder_trial(experiment, images_dir):
    """Makes a tiny experiment on images_dir or another folder."""

    def make(name, folder=images_dir, options=None, **train):
        model = dict(img_size=SIZE, num_classes=3) | train.pop("model", {})
        fields = dict(dataset="folder", batch_size=8, crop_scale_min=0.5, horizontal_flip=True) | train
        return experiment(name, model, options={"data_dir": folder, "num_workers": 0} | (options or {}), **fields)

    return make


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_ends_the_same_streamed_or_from_memory(num_workers, folder_trial, monkeypatch, capsys):
    """Dropout is on: reading must not touch the generator that it draws from."""
    trials = [folder_trial(name, options={"num_workers": num_workers}) for name in ("memory", "streamed")]
    summaries = [fit(trials[0])]
    assert "fit in memory" not in capsys.readouterr().out
    monkeypatch.setattr(batches, "fits_in_memory", lambda n_bytes, device: False)
    summaries.append(fit(trials[1]))
    assert "fit in memory" in capsys.readouterr().out
    assert summaries[0] == summaries[1]
    assert same_weights(*(weights(trial.folder) for trial in trials))


def test_only_the_images_that_are_used_have_to_fit(folder_trial, monkeypatch):
    asked = []
    monkeypatch.setattr(batches, "fits_in_memory", lambda n_bytes, device: asked.append(n_bytes) or True)
    fit(folder_trial("limited", epochs=1, train_limit=20))
    assert asked == [(20 + 15) * 3 * SIZE * SIZE]


# ---------------------------------------------------------------------------- damaged files


def png(mode="RGB"):
    buffer = io.BytesIO()
    random_image(np.random.default_rng(0), mode, 30, 30).save(buffer, "png")
    return buffer.getvalue()


def sixteen_bits():
    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 20), 5000, dtype=np.uint16)).save(buffer, "png")
    return buffer.getvalue()


def bomb():
    """A bitmap that says it has 60,000 x 60,000 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "bmp")
    content = bytearray(buffer.getvalue())
    content[18:26] = (60_000).to_bytes(4, "little") * 2
    return bytes(content)


DAMAGES = {
    "empty": lambda: b"",
    "a web page": lambda: b"<html>" * 50,
    "cut short": lambda: png()[:300],
    "a bit flipped": lambda: png()[:100] + bytes([png()[100] ^ 255]) + png()[101:],
    "too large": bomb,
    "16 bits": sixteen_bits,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("way", ["memory", "streamed", "from a worker"])
def test_a_damaged_image_is_named(way, damage, own, monkeypatch):
    path = own / "train" / "dog" / "0.png"
    path.write_bytes(DAMAGES[damage]())
    if way != "memory":
        monkeypatch.setattr(batches, "fits_in_memory", lambda n_bytes, device: False)
    with pytest.raises(UserError) as refused:
        data = batches_of(own, num_workers=1 if way == "from a worker" else 0)
        for _ in [*data.train_batches(0), *data.eval_batches("val")]:
            pass
    message = str(refused.value)
    assert message.startswith(f"{path} cannot be read as an image (") and message.endswith("replace or remove it")
    assert "\n" not in message and refused.value.__suppress_context__
    if damage == "16 bits":
        assert "8 bits" in message


def test_what_keeps_a_run_from_starting_leaves_nothing(folder_trial, own):
    with pytest.raises(UserError, match=r"3 classes.*--num-classes 3"):
        fit(folder_trial("trial", model={"num_classes": 10}))
    (own / "test" / "eel" / "1.jpg").write_bytes(b"")
    trial = folder_trial("damaged", own)
    with pytest.raises(UserError, match=r"1\.jpg"):
        fit(trial)
    assert not trial.options.runs_dir.exists()


# ---------------------------------------------------------------------------- mistakes


MISTAKES = {  # what is done to the folder, and what the message names
    "no such folder": (shutil.rmtree, ["pets", "one folder of images per class"]),
    "no classes": (lambda own: [shutil.rmtree(own), own.mkdir()], ["pets", "one folder of images per class"]),
    "a file": (lambda own: [shutil.rmtree(own), own.touch()], ["pets", "one folder of images per class"]),
    "images but no classes": (
        lambda own: [shutil.rmtree(own), own.mkdir(), (own / "1.png").write_bytes(png())],
        ["pets", "one folder of images per class"],
    ),
    "a class without images": (lambda own: (own / "train" / "hen").mkdir(), ["train", "hen"]),
    "a class only in train": (lambda own: fill(own / "train", 1, classes=["hen"]), ["train", "test", "hen"]),
    "a class only in test": (lambda own: fill(own / "test", 1, classes=["hen"]), ["train", "test", "hen"]),
    "no train": (lambda own: (own / "train").rename(own / "more"), ["test", "train"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message(mistake, own):
    make, words = MISTAKES[mistake]
    make(own)
    with pytest.raises(UserError) as refused:
        load_dataset("folder", own, SIZE, 3)
    message = str(refused.value)
    assert all(word in message for word in words) and "\n" not in message, message


def test_no_folder_and_other_channels_are_refused(images_dir):
    with pytest.raises(UserError, match="--data-dir"):
        load_dataset("folder", None, SIZE, 3)
    with pytest.raises(UserError, match=r"in_channels = 2.*--in-channels"):
        load_dataset("folder", images_dir, SIZE, 2)


# ---------------------------------------------------------------------------- runs


def test_a_run_without_a_test_part_and_what_it_was_trained_on(folder_trial, images_dir, tmp_path):
    trial = folder_trial("trial", images_dir / "train", epochs=1)
    summary = fit(trial)
    assert summary["test"] is None and summary["images"] == {"train": 29, "val": 7, "test": 0}
    assert json.loads((trial.folder / "summary.json").read_text()) == summary
    assert 0 <= summary["best"]["val_accuracy"] <= 1
    config = (trial.folder / "config.json").read_text()
    expected = {"name": "folder train", "class_names": [*CLASSES], "images": {"train": 36, "test": 0}}
    data = json.loads(config)["data"]
    assert len(data.pop("file_names_and_sizes")) == 64 and data == expected and str(images_dir) not in config
    analyze([trial.folder], tmp_path / "plots")


CHANGES = {
    "fewer": lambda folder: [path.unlink() for path in (folder / "train").rglob("*.png")],
    "more": lambda folder: fill(folder / "train", 14),
    "other classes": lambda folder: [
        (folder / part / "dog").rename(folder / part / "ox") for part in ("train", "test")
    ],
    "another class": lambda folder: [fill(folder / part, 2, ["fox"]) for part in ("train", "test")],
    "fewer to test": lambda folder: (folder / "test" / "cat" / "0.png").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_resuming_on_other_images_is_refused(change, folder_trial, own):
    trial = folder_trial("trial", own)
    interrupt(trial, 2)
    before = snapshot(trial.folder)
    CHANGES[change](own)
    with pytest.raises(UserError, match="other data"):
        fit(folder_trial("trial", own, options={"resume": True}))
    assert snapshot(trial.folder) == before


def test_resumed_from_another_place_ends_the_same(folder_trial, images_dir, tmp_path):
    whole, trial = folder_trial("whole"), folder_trial("trial")
    fit(whole)
    interrupt(trial, 2)
    moved = shutil.copytree(images_dir, tmp_path / "elsewhere" / "renamed")
    fit(folder_trial("trial", moved, options={"resume": True}))
    assert same_weights(*(weights(each.folder) for each in (whole, trial)))


SCRIPT_FLAGS = f"""--dataset folder --img-size {SIZE} --num-classes 3 --patch-size 8 --n-layer 1 --n-embd 8 --n-head 2
    --mlp-internal-dim-multiplier 4 --epochs 1 --batch-size 8 --device cpu""".split()


@pytest.mark.parametrize("part", ["", "train"])
def test_a_script_trains_on_a_folder(part, call_script, images_dir, tmp_path, capsys):
    flags = [*SCRIPT_FLAGS, "--data-dir", images_dir / part, "--runs-dir", tmp_path / "runs", "--name", "pets"]
    assert call_script("train_v2_cifar10.py", *flags) == 0
    test = json.loads((tmp_path / "runs" / "pets" / "seed0" / "summary.json").read_text())["test"]
    assert ("no test set" if part else f"{test['accuracy']:.2%}") in capsys.readouterr().out


def test_a_complete_run_is_not_that_of_another_folder(folder_trial, images_dir, tmp_path):
    trial = folder_trial("one", epochs=1)
    summary = fit(trial)
    assert fit(resumed(trial)) == summary and Run(trial.folder).is_complete(trial)
    copy = shutil.copytree(images_dir, tmp_path / "copy" / "renamed")
    same = folder_trial("one", copy, epochs=1)
    assert Run(trial.folder).is_complete(same)  # the same images elsewhere
    next(path for path in copy.rglob("*.*") if path.is_file()).write_bytes(b"another image")
    with pytest.raises(UserError, match="was started on other data"):
        Run(trial.folder).is_complete(same)
    with pytest.raises(UserError, match="was started on other data"):
        fit(resumed(same))
