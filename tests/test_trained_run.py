"""A run opened for inspection: its model, its images in order, and what is refused."""

import dataclasses
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from training import TextConfig, UserError, fit
from interpretability.common.trained import PairChoice, RunChoice, TrainedRun, latest_run, open_run, open_runs
from models.baselines import ResNet20Config
from models.language import BDHConfig
from tests.inspecting import train_unet
from training.augment import normalise
from training.data import DataSet, load_dataset
from training.data.segmentation import scale_image, scale_mask
from training.runs import Run


@pytest.fixture
def run(experiment):
    """Folder of a tiny run on the made-up CIFAR-10."""
    trial = experiment(epochs=1, seed=3, options={"keep_every": 1})
    fit(trial)
    return trial.folder


@pytest.fixture
def opened(run, data_dir):
    return TrainedRun(run, data_dir, "cpu")


def test_the_model_and_its_test_images(opened, data_dir):
    assert not opened.model.training and opened.grid == (4, 4) and opened.stem == "trial_seed3"
    assert (opened.part, opened.n_images, len(opened.class_names)) == ("test", 40, 10)
    data = load_dataset("cifar10", data_dir)
    images, labels = opened.samples([7, 3])
    assert np.array_equal(images.numpy(), data.test_images[[7, 3]])
    assert labels.tolist() == data.test_labels[[7, 3]].tolist()
    pixels, all_labels = (torch.cat(each) for each in zip(*opened.batches(range(40), 16), strict=True))
    assert torch.equal(pixels, normalise(torch.from_numpy(data.test_images)))
    assert all_labels.tolist() == data.test_labels.tolist()
    with torch.no_grad():
        accuracy = (opened.model(pixels).argmax(1) == all_labels).float().mean()
    assert float(accuracy) == pytest.approx(Run(opened.folder).read_summary()["test"]["accuracy"])


def test_names_of_checkpoints(run, opened, data_dir):
    """Each has its own weights and names; best.pt is the run itself."""
    first, last, best = (TrainedRun(run / f"{name}.pt", data_dir, "cpu") for name in ("epoch_000", "last", "best"))
    assert {each.folder for each in (first, last, best)} == {run}
    assert torch.equal(best.model.encoder, opened.model.encoder)
    assert not torch.equal(first.model.encoder, last.model.encoder)
    assert [each.title for each in (best, first)] == ["trial, seed 3", "trial, seed 3, epoch_000"]
    assert [each.file_name("probe") for each in (opened, best, last)] == ["probe", "probe", "probe_last"]
    assert first.stem == opened.stem and first.experiment_title == opened.title


def test_long_names_are_cut_and_stay_apart(opened):
    stems = []
    for ending in ("a", "b", "ä" * 9):
        opened.config["experiment"] = "v2_cifar10+" + "learning_rate=0.001+" * 11 + "ä" * 9 + ending
        stems.append(opened.stem)
    assert len(set(stems)) == 3
    for stem in stems:  # with what visualize_attention.py adds, a file system takes it
        assert len(f"attention_rollout_per_head_patch127-127_versus_epoch_0100_{stem}.png".encode()) <= 255
        assert stem.startswith("v2_cifar10+learning_rate=0.001+") and stem.endswith("_seed3")


def test_images_spread_over_the_part(opened):
    assert opened.choose_images(4) == [0, 10, 20, 30] and opened.choose_images(3) == [0, 13, 26]
    assert opened.choose_images(None) == opened.choose_images(99) == list(range(40))
    assert opened.choose_images(4, (7, 3)) == [7, 3]
    for n, indices in ((0, None), (-2, None), (4, ())):
        with pytest.raises(UserError, match="no images chosen"):
            opened.choose_images(n, indices)


def test_training_images_are_those_of_the_run(run, opened, data_dir):
    """None that it validated with, every class alike, and not augmented."""
    split, data = Run(run).read_split(), load_dataset("cifar10", data_dir)
    numbers = opened.choose_training_images(50)
    places = split.train[numbers]
    assert len(set(places)) == 50
    assert set(np.bincount(data.train_labels[places], minlength=10)) <= {4, 5, 6}
    assert sorted(opened.choose_training_images(10**6)) == list(range(len(split.train)))
    pixels, labels = (torch.cat(each) for each in zip(*opened.training_batches(numbers, 16), strict=True))
    assert torch.equal(pixels, normalise(torch.from_numpy(data.train_images[places])))
    assert labels.tolist() == data.train_labels[places].tolist()
    with pytest.raises(UserError, match="no images chosen"):
        opened.choose_training_images(0)
    (run / "split.npz").unlink()  # as where only weights were exported; it is drawn again
    again = TrainedRun(run, data_dir, "cpu")
    numbers = again.choose_training_images(50)
    assert np.array_equal(again.images.split.train[numbers], places) and np.array_equal(
        again.images.split.val, split.val
    )


def write_photos(folder, data_dir, first, last):
    """Some training images of the made-up CIFAR-10 as PNG files, a folder a class."""
    arrays = load_dataset("cifar10", data_dir)
    for index in range(first, last):
        path = folder / f"class {arrays.train_labels[index]}" / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(arrays.train_images[index].transpose(1, 2, 0)).save(path)


def test_data_with_a_validation_part_and_no_test_part(tmp_path, data_dir, experiment):
    photos = tmp_path / "photos"
    write_photos(photos / "train", data_dir, 0, 60)
    write_photos(photos / "val", data_dir, 60, 100)
    trial = experiment("photos", dataset="folder", epochs=1, options={"data_dir": photos})
    fit(trial)
    opened = TrainedRun(trial.folder, photos, "cpu")
    data = load_dataset("folder", photos)
    assert (opened.part, opened.n_images) == ("validation", 40)
    for samples, images, labels in (
        (opened.samples([7, 39]), data.val_images, data.val_labels),
        (opened.images.training_samples(np.array([7, 39])), data.train_images, data.train_labels),
    ):
        assert np.array_equal(samples.images.numpy(), images[[7, 39]]) and samples.labels.tolist() == [*labels[[7, 39]]]


def test_data_without_a_test_part(tmp_path, data_dir, experiment):
    """The validation images of the run's own split; two runs are compared if they have the same."""
    photos = tmp_path / "photos"
    write_photos(photos, data_dir, 0, 60)
    trial = experiment("photos", dataset="folder", epochs=1, options={"data_dir": photos})
    other = dataclasses.replace(trial, name="other", train=dataclasses.replace(trial.train, seed=1))
    for each in (trial, other):
        fit(each)
    opened = TrainedRun(trial.folder, photos, "cpu")
    split = Run(trial.folder).read_split()
    assert (opened.part, opened.n_images) == ("validation", len(split.val))
    images, labels = opened.samples(range(len(split.val)))
    data = load_dataset("folder", photos)
    assert labels.tolist() == data.train_labels[split.val].tolist()
    assert np.array_equal(images[1].numpy(), data.train_images[int(split.val[1])])
    with pytest.raises(UserError, match="no validation image 60"):
        opened.samples([60])
    choice = PairChoice(run=trial.folder, versus=other.folder, data_dir=photos, device="cpu")
    with pytest.raises(UserError, match="has another validation part: give two runs with the same seed"):
        open_runs(choice)
    assert len(open_runs(dataclasses.replace(choice, versus=trial.folder / "last.pt"))) == 2
    renamed = photos.rename(tmp_path / "renamed")  # the same files
    assert TrainedRun(trial.folder, renamed, "cpu").n_images == len(split.val)
    renamed.rename(photos)
    shutil.copy(next((photos / "class 1").glob("*.png")), photos / "class 1" / "new.png")
    with pytest.raises(UserError, match="other numbers of images"):  # the split's numbers mean other images now
        TrainedRun(trial.folder, photos, "cpu").samples([0])
    shutil.rmtree(photos / "class 0")
    with pytest.raises(UserError, match="other class names"):
        _ = TrainedRun(trial.folder, photos, "cpu").class_names


def test_segmentation(tmp_path):
    """Images and masks at the model's size, of the validation part."""
    opened = TrainedRun(train_unet(tmp_path, img_size=(16, 40)), tmp_path, "cpu")
    assert opened.labels_pixels and opened.grid == (2, 5) and (opened.part, opened.n_images) == ("validation", 2)
    images, labels = opened.samples([1])
    image = np.array(Image.open(tmp_path / "data_camvid" / "val" / "val_001.png"))
    mask = np.array(Image.open(tmp_path / "data_camvid" / "valannot" / "val_001.png"))
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), scale_image(image, (16, 40)))
    assert labels.dtype == torch.int64 and np.array_equal(labels[0].numpy(), scale_mask(mask, (16, 40)))
    opened.require("x_sparse", "scores")
    with pytest.raises(UserError, match="is a BDHUNet, which has no logits: give a run that classifies images"):
        opened.require("logits")
    (tmp_path / "data_camvid" / "val" / "val_001.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"val_001\.png"):
        opened.samples([1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "valannot" / "val_001.png").unlink(), r"val_001\.png has no mask"),
        (
            lambda folder: [
                shutil.copy(folder / each / "val_000.png", folder / each / "a.png") for each in ("val", "valannot")
            ],
            "was trained on other numbers of images of camvid: give its data with --data-dir",
        ),
        (
            lambda folder: [
                (folder / each / "val_000.png").rename(folder / each / "a.png") for each in ("val", "valannot")
            ],
            "was trained on other files of camvid: give its data with --data-dir",
        ),
    ],
)
def test_other_segmentation_data_are_refused(change, said, tmp_path):
    opened = TrainedRun(train_unet(tmp_path), tmp_path, "cpu")
    change(tmp_path / "data_camvid")
    for read in (lambda: opened.samples([0]), lambda: opened.n_images, lambda: opened.choose_training_images(1)):
        with pytest.raises(UserError, match=said):
            read()


def test_data_of_a_run_that_recorded_less_are_used(tmp_path):
    opened = TrainedRun(train_unet(tmp_path), tmp_path, "cpu")
    del opened.config["data"]["file_names_and_sizes"]
    for each in ("val", "valannot"):
        (tmp_path / "data_camvid" / each / "val_000.png").rename(tmp_path / "data_camvid" / each / "a.png")
    assert opened.n_images == 2


def test_a_limit_is_drawn_by_the_runs_seed(tmp_path):
    folder, drawn = train_unet(tmp_path), []
    for seed in range(6):
        opened = TrainedRun(folder, tmp_path, "cpu")
        opened.train |= dict(train_limit=1, seed=seed)
        drawn += [images.sum().item() for images, _ in opened.training_batches(np.array([0]))]
    assert len(set(drawn)) > 1


def test_images_are_cropped_as_in_validation(opened, monkeypatch):
    crops = []
    monkeypatch.setattr(DataSet, "with_eval_crop", lambda self, share: crops.append(share) or self)
    opened.train["eval_crop"] = 0.5
    opened.samples([0])
    assert crops == [0.5]


def test_what_is_refused(opened, tmp_path, data_dir, experiment):
    for index in (40, -1):
        with pytest.raises(UserError, match=f"no test image {index}: numbers go from 0 to 39"):
            opened.samples([0, index])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no weights to open: give a folder"):
        TrainedRun(tmp_path / "empty", None, "cpu")
    with pytest.raises(UserError, match="nowhere does not exist: give a folder"):
        TrainedRun(tmp_path / "nowhere", None, "cpu")
    with pytest.raises(UserError, match=f"runs has no weights to open, but {opened.folder} has: give a folder"):
        TrainedRun(opened.folder.parents[1], None, "cpu")
    trial = dataclasses.replace(experiment("other", epochs=1), model=ResNet20Config())
    fit(trial)
    with pytest.raises(UserError, match="ResNet20 is not supported, only models of"):
        TrainedRun(trial.folder, data_dir, "cpu")
    assert TrainedRun(trial.folder, data_dir, "cpu", any_model=True).title == "other, seed 0"
    text = TextConfig(epochs=1, batch_size=8, learning_rate=1e-3, weight_decay=0.0, context=16, text=tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(bytes(range(256)) * 4)
    model = BDHConfig(n_layer=1, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4)
    trial = dataclasses.replace(trial, name="text", model=model, train=text)
    fit(trial)
    with pytest.raises(UserError, match="its model does not read images"):
        TrainedRun(trial.folder, None, "cpu")


def test_latest_run(tmp_path, run, data_dir, monkeypatch):
    """The one that was finished last; those without a summary or a checkpoint do not count."""
    with pytest.raises(UserError, match="no finished run"):
        latest_run(tmp_path / "none")
    runs = tmp_path / "many" / "runs"
    for age, name in enumerate(("b/seed0", "a/seed1", "c/seed0", "d/seed0")):
        shutil.copytree(run, runs / name)
        os.utime(runs / name / "summary.json", (1e9 + age, 1e9 + age))
    (runs / "d/seed0/best.pt").unlink()
    (runs / "c/seed0/summary.json").unlink()
    assert latest_run(runs) == runs / "a" / "seed1"
    monkeypatch.setattr("interpretability.common.trained.ROOT", tmp_path / "many")
    assert open_run(RunChoice(data_dir=data_dir, device="cpu")).folder == runs / "a" / "seed1"
    assert open_run(RunChoice(run=runs / "b/seed0", device="cpu")).folder == runs / "b" / "seed0"
