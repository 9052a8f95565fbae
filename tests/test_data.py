"""Splits, and data files: found, downloaded, or refused with a message that names them."""

import urllib.error
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torchvision
from sklearn.datasets import load_digits

from training import fit
from training.config import ROOT, UserError
from training.data import data_folder, load_dataset, split_train

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 50))


# ---------------------------------------------------------------------------- splits


def same(a, b):
    return np.array_equal(a.train, b.train) and np.array_equal(a.val, b.val)


@pytest.mark.parametrize("limit", [None, 100])
def test_split_follows_the_seed_alone(limit):
    split = split_train(LABELS, 0.2, limit, seed=3)
    np.random.seed(1)
    assert same(split, split_train(LABELS, 0.2, limit, seed=3))
    other = split_train(LABELS, 0.2, limit, seed=4)
    assert not np.array_equal(split.val, other.val) and not np.array_equal(split.train, other.train)


@pytest.mark.parametrize(
    ("val_fraction", "limit", "n_val"),
    [(0.2, None, 100), (0.1, None, 50), (0.013, None, 6), (0.2, 200, 40), (0.4, 2, 1), (0.4, 17, 7), (0.4, 499, 200)],
)
def test_split_is_disjoint_stratified_and_as_large_as_asked(val_fraction, limit, n_val):
    split = split_train(LABELS, val_fraction, limit, seed=0)
    used, n = [*split.train, *split.val], limit or 500
    assert len(split.val) == n_val and len(used) == len(set(used)) == n
    assert n < 500 or sorted(used) == list(range(500))
    for indices in (used, split.val, split.train):
        assert np.ptp(np.bincount(LABELS[indices], minlength=10)) <= (n % 50 > 0) + (n_val % 10 > 0)


def test_validation_is_drawn_from_everywhere():
    val = split_train(LABELS, 0.2, None, seed=0).val
    assert (val < 250).sum() in range(25, 76)  # not the first or the last images of the file


def test_uneven_classes_are_split_in_proportion():
    labels = np.repeat([0, 1, 2], [97, 41, 12])
    split = split_train(labels, 0.2, None, seed=0)
    assert len(split.val) == 30
    for label, exact in enumerate((19.4, 8.2, 2.4)):
        assert abs((labels[split.val] == label).sum() - exact) < 1


def test_a_limit_beyond_the_data_takes_all():
    assert same(split_train(LABELS, 0.2, 10_000, seed=0), split_train(LABELS, 0.2, None, seed=0))


@pytest.mark.parametrize(
    "val_fraction, limit, remedy",
    [
        (0.2, 2, "raise --train-limit or"),
        (0.001, 100, "raise --train-limit or"),
        (0.999, 100, "raise --train-limit or"),
        (0.001, None, "add images or"),
    ],
)
def test_impossible_splits_are_refused(val_fraction, limit, remedy):
    with pytest.raises(UserError, match=f"val_fraction.*{limit or 500} images.*: {remedy} change --val-fraction"):
        split_train(LABELS, val_fraction, limit, seed=0)


@pytest.mark.parametrize(("limit", "said"), [(100, "in 20 classes of 100"), (None, "")])
def test_classes_without_training_images_are_counted(limit, said, experiment, capsys):
    fit(experiment(dataset="cifar100", train_limit=limit, epochs=1, model=dict(num_classes=100)))
    assert ("no image to train on" in (output := capsys.readouterr().out)) == bool(said) and said in output


# ---------------------------------------------------------------------------- where files are


def test_data_folder_is_the_flag_else_the_variable_else_beside_the_scripts(tmp_path, monkeypatch):
    monkeypatch.delenv("VISION_BDH_DATA", raising=False)
    assert data_folder("cifar10", None) == ROOT / "data_cifar10"
    monkeypatch.setenv("VISION_BDH_DATA", str(tmp_path / "variable"))
    assert data_folder("cifar100", None) == tmp_path / "variable" / "data_cifar100"
    assert data_folder("cifar100", tmp_path / "flag") == tmp_path / "flag" / "data_cifar100"
    monkeypatch.setenv("VISION_BDH_DATA", "")
    assert data_folder("cifar10", None) == ROOT / "data_cifar10"


def test_data_folder_may_be_the_folder_itself(tmp_path, monkeypatch):
    own = tmp_path / "data_cifar10"
    assert data_folder("cifar10", own) == own
    assert data_folder("cifar100", own) == own / "data_cifar100"  # another data set's folder is not it
    other = tmp_path / "anything"
    other.mkdir()
    (other / "cifar10.npz").touch()
    assert data_folder("cifar10", other) == other
    monkeypatch.setenv("VISION_BDH_DATA", str(own))
    assert data_folder("cifar10", None) == own


# ---------------------------------------------------------------------------- CIFAR files


@pytest.mark.parametrize("by", ["flag", "variable", "folder itself"])
def test_cifar_is_read_as_it_is(by, data_dir, cifar_arrays, monkeypatch):
    monkeypatch.setenv("VISION_BDH_DATA", str(data_dir if by == "variable" else "/nowhere"))
    dataset = load_dataset("cifar10", {"flag": data_dir, "folder itself": data_dir / "data_cifar10"}.get(by))
    for part in ("train", "test"):
        images = getattr(dataset, f"{part}_images")
        assert images.dtype == np.uint8
        assert np.array_equal(images, cifar_arrays[f"{part}_images"].transpose(0, 3, 1, 2))
        assert np.array_equal(getattr(dataset, f"{part}_labels"), cifar_arrays[f"{part}_labels"])
    assert dataset.class_names == tuple(cifar_arrays["class_names"])


def save(folder, arrays):
    """The arrays as a cifar10.npz in folder; returns its path."""
    path = folder / "cifar10.npz"
    np.savez(path, **arrays)
    return path


def refuses(path):
    """Loads path's folder, which must be refused with a message naming the file; returns the message."""
    with pytest.raises(UserError) as refused:
        load_dataset("cifar10", path.parent)
    assert str(path) in str(refused.value)
    return str(refused.value)


def flipped(content):
    """In the middle of the images."""
    return content[:5000] + bytes([content[5000] ^ 255]) + content[5001:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:1],
        lambda content: content[:100],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-100],
        flipped,
        lambda content: b"<html>" * 50,
    ],
)
def test_damaged_file_is_refused(damage, tmp_path, cifar_arrays):
    path = save(tmp_path, cifar_arrays)
    path.write_bytes(damage(path.read_bytes()))
    refuses(path)
    np.save(path.with_suffix(".npy"), np.zeros(3))
    path.with_suffix(".npy").replace(path)
    refuses(path)


@pytest.mark.parametrize("key", ["train_images", "train_labels", "test_images", "test_labels", "class_names"])
def test_missing_key_is_refused(key, tmp_path, cifar_arrays):
    del cifar_arrays[key]
    assert key in refuses(save(tmp_path, cifar_arrays))


@pytest.mark.parametrize(
    "key, change",
    [
        ("train_images", lambda a: a.astype(np.float32) / 255),
        ("test_images", lambda a: a.astype(np.int64)),
        ("train_images", lambda a: a.transpose(0, 3, 1, 2)),
        ("train_images", lambda a: a.reshape(len(a), -1)),
        ("test_images", lambda a: a[:, :28, :28]),
        ("test_images", lambda a: a[:-1]),
        ("train_images", lambda a: a[:0]),
        ("train_labels", lambda a: a.astype(np.int32)),
        ("train_labels", lambda a: a[:, None]),
        ("train_labels", lambda a: np.where(a == 9, 10, a)),
        ("test_labels", lambda a: a - 1),
        ("class_names", lambda a: a[:9]),
        ("class_names", lambda a: np.array("airplane")),
    ],
)
def test_wrong_dtype_shape_or_range_is_refused(key, change, tmp_path, cifar_arrays):
    cifar_arrays[key] = change(cifar_arrays[key])
    message = refuses(save(tmp_path, cifar_arrays))
    assert key in message or "class_names" in message or key.replace("images", "labels") in message


# ---------------------------------------------------------------------------- downloads


@pytest.fixture
def no_network(monkeypatch):
    """Every attempt to open an address fails at once."""
    urlopen = Mock(side_effect=urllib.error.URLError("no network in tests"))
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return urlopen


@pytest.mark.parametrize("name, archive", [("cifar10", "cifar-10-python"), ("cifar100", "cifar-100-python")])
def test_missing_file_without_network_names_both_ways(name, archive, tmp_path, no_network):
    with pytest.raises(UserError) as refused:
        load_dataset(name, tmp_path)
    message = str(refused.value)
    assert archive in no_network.call_args.args[0].full_url
    for part in (str(tmp_path / f"data_{name}" / f"{name}.npz"), "network", f"{archive}.tar.gz", "--data-dir"):
        assert part in message
    assert not list(tmp_path.iterdir())  # no empty folder, which would be a class without images elsewhere


def test_wrong_archive_is_refused(tmp_path, no_network):
    archive = tmp_path / "data_cifar10" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    archive.write_bytes(b"half an archive")  # torchvision checks it, and asks for another
    with pytest.raises(UserError, match=r"cifar10\.npz"):
        load_dataset("cifar10", tmp_path)
    assert no_network.called
    assert not (tmp_path / "data_cifar10" / "cifar10.npz").exists()


@pytest.fixture
def download(monkeypatch):
    """What is used of torchvision's class, with made-up images."""

    def make(root, train, download):
        n, names = (20 if train else 10), [f"class {label}" for label in range(10)]
        images = np.full((n, 32, 32, 3), n, dtype=np.uint8)
        return SimpleNamespace(data=images, targets=[i % 10 for i in range(n)], classes=names)

    source = Mock(side_effect=make, filename="cifar-10-python.tar.gz")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", source)
    return source


def test_a_download_is_written_once_and_then_read(download, tmp_path):
    first = load_dataset("cifar10", tmp_path)
    assert download.call_count == 2
    again = load_dataset("cifar10", tmp_path)
    assert download.call_count == 2
    assert [path.name for path in (tmp_path / "data_cifar10").iterdir()] == ["cifar10.npz"]
    for dataset in (first, again):
        assert dataset.train_images.shape == (20, 3, 32, 32) and (dataset.train_images == 20).all()
        assert dataset.test_images.shape == (10, 3, 32, 32) and (dataset.test_images == 10).all()
        assert dataset.train_labels.tolist() == [i % 10 for i in range(20)]
        assert dataset.class_names == tuple(f"class {label}" for label in range(10))


def test_a_download_that_cannot_be_stored_leaves_nothing(download, tmp_path, monkeypatch):
    def disk_full(file, **arrays):
        file.write_bytes(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", disk_full)
    with pytest.raises(UserError, match=r"cifar10\.npz cannot be written \(No space left"):
        load_dataset("cifar10", tmp_path)
    assert list((tmp_path / "data_cifar10").iterdir()) == []


# ---------------------------------------------------------------------------- digits


def test_digits():
    dataset = load_dataset("digits", Path("/nowhere"))
    assert dataset.train_images.shape == (len(dataset.train_labels), 1, 8, 8)
    assert len(dataset.train_labels) + len(dataset.test_labels) == 1797
    assert dataset.train_images.dtype == dataset.test_images.dtype == np.uint8
    assert dataset.train_images.min() == 0 and dataset.train_images.max() == 255
    pixels = np.concatenate((dataset.train_images, dataset.test_images))
    assert pixels.mean() == pytest.approx(load_digits().images.mean() * 255 / 16, abs=0.1)  # grey values of 0 to 16
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == np.int64
    assert dataset.class_names == tuple("0123456789")
    # about a fifth of each class is the test part
    shares = np.bincount(dataset.test_labels) / np.bincount([*dataset.train_labels, *dataset.test_labels])
    assert len(shares) == 10 and (abs(shares - 0.2) < 0.01).all()
    np.random.seed(5)
    assert np.array_equal(load_dataset("digits", None).test_images, dataset.test_images)
    every = {image.tobytes() for image in dataset.train_images}
    in_both = sum(image.tobytes() in every for image in dataset.test_images)
    assert in_both <= 3, "test images are among the training images"
