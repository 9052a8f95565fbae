"""Images read in every epoch: crops of the original, centre crops, ImageNet's folders, and the worker processes."""

import functools
import io
import multiprocessing
import os
import signal
import sys
import tarfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as transforms

from training import ClassificationConfig, UserError, fit, loop
from tests.children import before, kill, launch_in_child, nth
from tests.photos import SIDES, write_photos
from tests.trials import interrupt, read_rows, resumed, same_weights, wait_for, weights, with_options
from training.augment import draw_crop
from training.data import ImageBatches, draw_split, load_dataset, streaming
from training.data.image_files import ImageFiles
from training.launch import train

SIZE, CPU = 16, torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """data_imagenet/train and val, 12 and 4 images of 3 classes. For reading only."""
    folder = tmp_path_factory.mktemp("photos") / "data_imagenet"
    write_photos(folder / "train", 12)
    write_photos(folder / "val", 4, seed=1)
    return folder


def batches_of(folder, num_workers=0, dataset="imagenet", **fields):
    defaults = dict(crop_original=True, crop_scale_min=0.1, eval_crop=0.875, horizontal_flip=True, val_fraction=0.25)
    sizes = dict(epochs=1, batch_size=8, learning_rate=1e-3, weight_decay=0.0)
    config = ClassificationConfig(dataset=dataset, **sizes | defaults | fields)
    data = load_dataset(dataset, folder, SIZE, 3).with_eval_crop(config.eval_crop)
    split = draw_split(data, config.val_fraction, None, config.seed)
    return ImageBatches(data, split, config, 7, CPU, num_workers)


def pixels_of(data, epoch=0):
    return torch.cat([images for images, _ in data.train_batches(epoch)])


# ---------------------------------------------------------------------------- crops


def test_a_training_image_is_a_crop_of_the_original(photos):
    files = ImageFiles([str(photos / "train" / "n01" / f"{i}.JPEG") for i in range(len(SIDES))], SIZE, 3)
    ends = {sides: [] for sides in SIDES}
    for index, (width, height) in enumerate(SIDES):
        for seed in range(20):
            crop = draw_crop(height, width, 0.05, torch.Generator().manual_seed(seed))
            top, left, h, w = crop
            assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width
            assert 0.7 < w / h < 1.4
            with Image.open(files.paths[index]) as image:
                expected = transforms.resized_crop(image, *crop, [SIZE, SIZE], transforms.InterpolationMode.BICUBIC)
            assert np.array_equal(files.random_crop(index, 0.05, seed), np.array(expected).transpose(2, 0, 1))
            ends[width, height] += [left / width, (left + w) / width]
    assert min(ends[160, 20]) < 0.2 and max(ends[160, 20]) > 0.8  # which a first centre crop would lose


@pytest.mark.parametrize("share", [0.875, 0.5])
def test_validation_images_are_scaled_and_cropped_at_the_centre(share, photos):
    data = batches_of(photos, eval_crop=share)
    found = torch.cat([images for images, _ in data.eval_batches("test")])
    files = load_dataset("imagenet", photos, SIZE, 3).test_images
    assert len(files) == len(found) == 12
    for path, image in zip(files.paths, found, strict=True):
        with Image.open(path) as original:
            shrunk = transforms.resize(original, round(SIZE / share), transforms.InterpolationMode.BICUBIC)
        expected = np.array(transforms.center_crop(shrunk, [SIZE, SIZE])).transpose(2, 0, 1) / 127.5 - 1
        assert np.abs(image.numpy() - expected).mean() < 0.05  # scaled once, not first to whole pixels
    whole = torch.cat([images for images, _ in batches_of(photos, eval_crop=1.0).eval_batches("test")])
    assert (whole - found).abs().mean() > 0.01
    assert len(torch.cat([labels for _, labels in data.eval_batches("val")])) == 9


# ---------------------------------------------------------------------------- draws


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_number_of_workers_changes_nothing(num_workers, photos, monkeypatch):
    monkeypatch.setattr(streaming, "cpu_count", lambda: 4)
    alone, together = batches_of(photos), batches_of(photos, num_workers)
    for epoch in (0, 1):
        for (one, labels), (other, same_labels) in zip(
            alone.train_batches(epoch), together.train_batches(epoch), strict=True
        ):
            assert torch.equal(one, other) and torch.equal(labels, same_labels)
        next(together.eval_batches("val"))  # what is read ahead and not asked for does not come up later


def test_crops_differ_by_epoch_seed_and_copy(photos):
    data = batches_of(photos)
    first = pixels_of(data)
    assert torch.equal(first, pixels_of(data))
    for other in (pixels_of(data, epoch=1), pixels_of(batches_of(photos, seed=1))):  # in whatever order
        assert len({image.numpy().tobytes() for image in torch.cat((first, other))}) > 1.8 * len(first)
    images, labels = next(batches_of(photos, repeat_augment=2, horizontal_flip=False).train_batches(0))
    assert torch.equal(labels[0::2], labels[1::2])
    same = [torch.equal(*pair) for pair in zip(images[0::2], images[1::2], strict=True)]
    assert sum(same) <= 1  # of the longest images, the only crop that always fits is the centre


@pytest.fixture
def trial(experiment, photos):
    def make(name, folder=photos, num_workers=2, **fields):
        recipe = dict(crop_original=True, crop_scale_min=0.2, batch_size=8, mixup=0.2) | fields
        options = dict(data_dir=folder, num_workers=num_workers)
        return experiment(name, dict(img_size=SIZE, num_classes=3), options, dataset="imagenet", **recipe)

    return make


def test_a_stopped_run_ends_the_same_with_another_number_of_workers(trial):
    whole, stopped = trial("whole", epochs=3), trial("stopped", epochs=3)
    summary = fit(whole)
    interrupt(stopped, epoch=2)
    assert fit(with_options(resumed(stopped), num_workers=0)) == summary
    assert read_rows(whole.folder, measured=False) == read_rows(stopped.folder, measured=False)
    assert same_weights(weights(whole.folder), weights(stopped.folder))
    assert summary["images"] == {"train": 29, "val": 7, "test": 12}  # the official validation part is tested once


# ---------------------------------------------------------------------------- workers


def test_workers_live_as_long_as_the_run(photos):
    def workers():
        return {each.pid for each in multiprocessing.active_children()} - others

    others = {each.pid for each in multiprocessing.active_children()}
    data = batches_of(photos, num_workers=2)
    seen = []
    for epoch in range(3):
        pixels_of(data, epoch)
        for _ in data.eval_batches("val"):
            pass
        seen.append(workers())
    assert len(seen[0]) >= 1 and seen[0] == seen[1] == seen[2]
    data.parts["train"].reader.stop()
    assert not workers()


def test_a_killed_worker_is_one_message(photos):
    data = batches_of(photos, num_workers=1)
    with pytest.raises(UserError, match="--num-workers"):
        for epoch in range(1000):
            next(data.train_batches(epoch))
            for child in multiprocessing.active_children():
                child.kill()
    assert data.parts["train"].reader.loader._iterator is None


def test_a_killed_worker_is_one_message_wherever_the_main_process_is(experiment, monkeypatch, capsys):
    killed = RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed.")
    monkeypatch.setitem(train.__globals__, "fit", mock.Mock(side_effect=killed))
    with pytest.raises(SystemExit) as end:
        train(experiment())
    assert end.value.code == 1 and capsys.readouterr().err.startswith("error: a process that reads images has ended")


@pytest.mark.parametrize("error", [RuntimeError("DataLoader worker (pid 5) exited"), BrokenPipeError(), ValueError()])
def test_ctrl_c_is_not_hidden_by_what_ended_workers_raise(error, photos, monkeypatch):
    """They have had the Ctrl-C too; ValueError: of a closed queue."""
    reader = batches_of(photos, num_workers=0).parts["train"].reader

    class Loader:
        _iterator = mock.Mock()

        def __iter__(self):
            raise KeyboardInterrupt

    reader.loader = Loader()
    reader.loader._iterator._shutdown_workers.side_effect = error
    with pytest.raises(KeyboardInterrupt):
        list(reader.read("train", [torch.arange(2)]))
    assert reader.loader._iterator is None


def own_group(folder):
    """The process leads a group of its own, which its workers join; the folder tells its number.

    The workers are its children, as a script's are on Linux before Python 3.14.
    """
    multiprocessing.set_start_method("fork", force=True)
    os.setsid()
    (folder / "group").write_text(str(os.getpid()))


def ctrl_c(*args):
    os.killpg(0, signal.SIGINT)  # as a terminal: to the workers, too


def stop_in_the_third_step(folder, how):
    own_group(folder)
    before(loop, "optimizer_step", nth(3, how))


def members(group):
    """Processes of a group that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text().rpartition(") ")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(its_group) == group and state != "Z":
            found.append(path.parent.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")
@pytest.mark.parametrize("end", ["Ctrl-C", "kill -9", "a damaged image"])
def test_no_worker_is_left_behind(end, trial, photos, tmp_path):
    folder, sabotage = photos, functools.partial(own_group, tmp_path)
    if end == "a damaged image":
        folder = tmp_path / "data_imagenet"
        write_photos(folder / "train", 12)
        write_photos(folder / "val", 4)
        (folder / "train" / "n02" / "5.JPEG").write_bytes(b"")
    else:
        how = ctrl_c if end == "Ctrl-C" else kill
        sabotage = functools.partial(stop_in_the_third_step, tmp_path, how)
    code, said = launch_in_child(trial("trial", folder), sabotage)
    wait_for(lambda: not members(int((tmp_path / "group").read_text())), seconds=60)
    if end == "a damaged image":
        assert code == 1 and "5.JPEG cannot be read as an image" in said and "Traceback" not in said
    elif end == "Ctrl-C":
        assert code == 130 and "Add --resume" in said and "Traceback" not in said
    else:
        assert code == -signal.SIGKILL


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("part", ["train", "val"])
def test_imagenet_without_a_part_says_where_it_belongs(part, photos, tmp_path):
    other = {"train": "val", "val": "train"}[part]
    (tmp_path / "data_imagenet").mkdir()
    (tmp_path / "data_imagenet" / other).symlink_to(photos / other)
    with pytest.raises(UserError, match=rf"data_imagenet/{part} is missing: put the images of ILSVRC2012 into"):
        load_dataset("imagenet", tmp_path, SIZE, 3)


def test_imagenet_needs_the_same_classes_in_both_parts(tmp_path):
    write_photos(tmp_path / "data_imagenet" / "train", 2)
    write_photos(tmp_path / "data_imagenet" / "val", 2, classes=("n01", "n03"))
    with pytest.raises(UserError, match=r"different classes \(n02\)"):
        load_dataset("imagenet", tmp_path, SIZE, 3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [(dict(crop_original=True, crop_scale_min=0.5), "--crop-original"), (dict(eval_crop=0.9), "--eval-crop")],
)
def test_arrays_have_no_original(fields, words, experiment):
    with pytest.raises(UserError, match=f"{words} is for image files, which cifar10 does not have"):
        fit(experiment(epochs=1, **fields))


@pytest.mark.parametrize("fields", [dict(crop_original=True), dict(eval_crop=0.0), dict(eval_crop=1.1)])
def test_impossible_crops_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        ClassificationConfig(dataset="folder", epochs=1, batch_size=8, learning_rate=1, weight_decay=0, **fields)


# ---------------------------------------------------------------------------- tar files


def write_tars(source, folder, part, per_tar=7):
    """The images of source/CLASS/ in folder/PART-00000N.tar, by the webdataset package; classes by number."""
    writer = pytest.importorskip("webdataset").ShardWriter
    classes = sorted(path.name for path in source.iterdir())
    with writer(f"{folder}/{part}-%06d.tar", maxcount=per_tar, verbose=0) as shards:
        for path in sorted(source.glob("*/*.JPEG")):
            label = classes.index(path.parent.name)
            shards.write({"__key__": f"{path.parent.name}/{path.stem}", "jpg": path.read_bytes(), "cls": label})
    return len(list(folder.glob(f"{part}-*.tar")))


@pytest.fixture(scope="module")
def tars(photos, tmp_path_factory):
    """train-000000.tar to train-000005.tar and val-000000.tar, the photos. For reading only."""
    folder = tmp_path_factory.mktemp("tars")
    assert (write_tars(photos / "train", folder, "train"), write_tars(photos / "val", folder, "val", 100)) == (6, 1)
    return folder


@pytest.mark.parametrize("name", ["", "train-{000000..000005}.tar"])
def test_tar_files_hold_what_was_written(name, tars, photos):
    found, expected = load_dataset("webdataset", tars / name, SIZE, 3), load_dataset("imagenet", photos, SIZE, 3)
    assert found.class_names == ("0", "1", "2") and len(found.test_labels) == 0
    for images, labels, same_images, same_labels in (
        (found.train_images, found.train_labels, expected.train_images, expected.train_labels),
        (found.val_images, found.val_labels, expected.test_images, expected.test_labels),
    ):
        keys = [path.rpartition(":")[2].removesuffix(".jpg") for path in images.paths]
        names = ["/".join(Path(path).with_suffix("").parts[-2:]) for path in same_images.paths]
        where = {name: i for i, name in enumerate(names)}
        assert len(keys) == len(where) == len(same_labels)
        for i, (key, label) in enumerate(zip(keys, labels, strict=True)):
            assert label == same_labels[where[key]]
            assert np.array_equal(images[i], same_images[where[key]])
            assert np.array_equal(images.random_crop(i, 0.1, 5), same_images.random_crop(where[key], 0.1, 5))


def test_a_run_on_tar_files_resumes_exactly(tars, experiment):
    def trial(name, num_workers):
        options = dict(data_dir=tars, num_workers=num_workers)
        recipe = dict(crop_original=True, crop_scale_min=0.2, eval_crop=0.9, batch_size=8)
        return experiment(name, dict(img_size=SIZE, num_classes=3), options, dataset="webdataset", **recipe)

    whole, stopped = trial("whole", 0), trial("stopped", 2)
    summary = fit(whole)
    interrupt(stopped, epoch=2)
    assert fit(resumed(stopped)) == summary and summary["test"] is None
    assert summary["images"] == {"train": 36, "val": 12, "test": 0}
    assert same_weights(weights(whole.folder), weights(stopped.folder))


def damaged_tar(folder):
    (folder / "train-000001.tar").write_bytes(b"no tar file" * 100)


def bad_header(folder):
    """Of the third sample: tarfile takes it for the end of the archive."""
    path = folder / "train-000001.tar"
    with tarfile.open(path) as tar:
        place = tar.getmembers()[4].offset
    content = path.read_bytes()
    path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])


def cut_between_samples(folder):
    path = folder / "train-000001.tar"
    with tarfile.open(path) as tar:
        place = tar.getmembers()[4].offset
    path.write_bytes(path.read_bytes()[:place])


def wild_class(folder):
    with tarfile.open(folder / "train-000001.tar", "w") as tar:
        tar.add(__file__, "n01/5.jpg")
        entry = tarfile.TarInfo("n01/5.cls")
        entry.size = 30
        tar.addfile(entry, io.BytesIO(b"9" * 30))


def named_like_validation(folder):
    (folder / "train-000001.tar").unlink()
    (folder / "train-000001.tar").symlink_to(folder / "val-000000.tar")


def without_a_class(folder):
    with tarfile.open(folder / "train-000001.tar", "w") as tar:
        tar.add(__file__, "n01/5.jpg")


def two_images(folder):
    with tarfile.open(folder / "train-000001.tar", "w") as tar:
        for ending in ("jpg", "cls", "png"):
            tar.add(__file__, f"n01/5.{ending}")


def damaged_image(folder):
    content = (folder / "train-000001.tar").read_bytes()
    start = content.index(b"\xff\xd8")
    (folder / "train-000001.tar").write_bytes(content[:start] + bytes(50) + content[start + 50 :])


def another_class(folder):
    content = (folder / "val-000000.tar").read_bytes()
    place = content.index(b".cls") // 512 * 512 + 512
    (folder / "val-000000.tar").write_bytes(content[:place] + b"7" + content[place + 1 :])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "train-000003.tar").unlink(), r"train-000003\.tar is missing: name"),
        (damaged_tar, r"train-000001\.tar cannot be read as an uncompressed tar file"),
        (bad_header, r"train-000001\.tar cannot be read as .* \(damaged or cut off at byte \d"),
        (cut_between_samples, r"train-000001\.tar cannot be read as .* \(damaged or cut off at byte \d"),
        (wild_class, r"train-000001\.tar: n01/5 has class 9{20}\.\.\., far above any class"),
        (named_like_validation, r"val-000000\.tar is named as training data, but val\*\.tar are the val part"),
        (without_a_class, r"train-000001\.tar: n01/5 has no class"),
        (two_images, r"train-000001\.tar: n01/5 has two images: "),
        (damaged_image, r"train-000001\.tar:n0\d/\d+\.jpg cannot be read as an image"),
        (another_class, "the val part has class 7, but the training part ends at 2"),
    ],
)
def test_damaged_tar_files_are_named(damage, words, tars, tmp_path):
    for path in tars.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path)
    with pytest.raises(UserError, match=words):
        pixels_of(batches_of(tmp_path / "train-{000000..000005}.tar", dataset="webdataset"))


def test_the_package_is_named_where_it_is_missing(tars, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(UserError, match="pip install webdataset"):
        load_dataset("webdataset", tars, SIZE, 3)
    with pytest.raises(UserError, match=r"--data-dir 'DIR/train-\{000000\.\.001023\}\.tar'"):
        load_dataset("webdataset", None, SIZE, 3)
