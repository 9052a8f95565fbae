"""interpretability/predict.py: what a segmentation run says of images, drawn."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.image import imread
from PIL import Image
from torchvision import datasets

from training import Experiment, RunOptions, SegmentationConfig, fit
from interpretability.predict import draw, find_truth, predict
from models.baselines import ResNetUNetConfig
from tests.camvid_data import write_camvid
from tests.inspecting import check_error, train_unet
from training.data.classes import CAMVID, CLASSES
from training.data.mask_files import read_image
from training.data.masks import find_masks
from training.data.segmentation import read_pair
from training.runs import load_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data_camvid (images of 48 x 32) and a run of a tiny BDH-UNet at 32 x 40 pixels."""
    folder = tmp_path_factory.mktemp("trained")
    train_unet(folder, name="unet+a=1")
    return folder


@pytest.fixture
def run(trained):
    return trained / "runs" / "unet+a=1" / "seed0"


@pytest.fixture
def call(trained, call_script, tmp_path):
    """Runs the script; returns its exit code and the folder of its pictures."""

    def go(*args):
        code = call_script(
            "interpretability/predict.py", *args, "--data-dir", trained, "--output-dir", tmp_path / "out"
        )
        return code, tmp_path / "out" / "unet+a=1_seed0"

    return go


def stripes(labels, size=(32, 48)):
    return np.resize(labels, size[0])[:, None].repeat(size[1], 1).astype(np.uint8)


def panels_of(figure):
    """By the panel's name: its pixels."""
    return {ax.get_title().partition(":")[0]: ax.get_images()[0].get_array().data for ax in figure.axes}


# ---------------------------------------------------------------------------- the prediction


def test_the_prediction_is_the_models(run, trained):
    """For images of any size."""
    model, _ = load_model(run)
    with torch.no_grad():  # after one epoch it says one class everywhere
        for weight in model.parameters():
            weight.normal_()
    image = read_image(trained / "data_camvid" / "val" / "val_000.png")
    predicted = predict(model, image, (32, 40), CPU)
    scaled = torch.from_numpy(np.array(Image.fromarray(image).resize((40, 32), Image.Resampling.BILINEAR)))
    with torch.no_grad():
        logits = model(scaled.permute(2, 0, 1)[None] / 127.5 - 1)
    expected = F.interpolate(logits, size=(32, 48), mode="bilinear", align_corners=False)[0].argmax(0)
    assert np.array_equal(predicted, expected) and predicted.shape == (32, 48) and len(np.unique(predicted)) > 1
    for size in ((10, 70), (200, 33)):
        assert predict(model, np.zeros((*size, 3), dtype=np.uint8), (32, 40), CPU).shape == size


def truth_of(path, data_dir, name="camvid"):
    pair = find_truth(name, data_dir, [path]).get(path.resolve())
    return pair and read_pair(*pair)[1]


def test_the_truth_is_found(trained, tmp_path):
    """In the data of the run, in another copy beside the image; not of a mask or a stranger."""
    folder = trained / "data_camvid"
    mask = truth_of(folder / "val" / "val_001.png", trained)
    assert np.array_equal(mask, find_masks("camvid", folder).read_mask(folder / "valannot" / "val_001.png"))
    assert truth_of(folder / "valannot" / "val_001.png", trained) is None
    write_camvid(tmp_path / "copy", layout="colours", n_train=1, n_val=2, size=(48, 32))
    shutil.copy(folder / "val" / "val_000.png", tmp_path / "street.png")
    assert truth_of(tmp_path / "copy" / "val" / "val_000.png", trained).max() <= CAMVID.void
    assert truth_of(tmp_path / "street.png", trained) is None


def test_the_truth_of_links_to_images(trained, tmp_path):
    """The masks lie beside the links, whose targets lie together in a folder of their own."""
    folder, pool = tmp_path / "linked", tmp_path / "pool"
    write_camvid(folder, n_train=1, n_val=2, size=(48, 32), seed=1)
    pool.mkdir()
    for path in sorted(folder.glob("*/*.png")):
        target = path.rename(pool / f"{path.parent.name}_{path.name}")
        path.symlink_to(target)
    image = folder / "val" / "val_001.png"
    mask = truth_of(image, trained)
    assert np.array_equal(mask, np.array(Image.open(folder / "valannot" / "val_001.png")))
    assert truth_of(pool / "val_val_001.png", trained) is None


def test_pascal_voc_is_not_downloaded_for_its_truth(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.voc, "download_and_extract_archive", lambda *args, **kwargs: pytest.fail("asked"))
    (tmp_path / "data_voc").mkdir()
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert find_truth("voc", folder, [tmp_path / "street.jpg"]) == {}
    assert not (tmp_path / "nowhere").exists()


def test_the_data_are_listed_once_however_many_images(trained, monkeypatch):
    listed = []
    monkeypatch.setattr(
        "interpretability.predict.find_masks",
        lambda name, folder, **rest: listed.append(folder) or find_masks(name, folder, **rest),
    )
    files = list((trained / "data_camvid" / "train").iterdir())
    assert {path.resolve() for path in files} <= find_truth("camvid", trained, files).keys()
    assert [folder.resolve() for folder in listed] == [(trained / "data_camvid").resolve()]


# ---------------------------------------------------------------------------- the picture


def test_panels_have_the_colours_of_the_classes():
    image = np.random.default_rng(0).integers(256, size=(32, 48, 3)).astype(np.uint8)
    predicted, truth = stripes([3, 0, 8]), stripes([3, 0, 11])
    figure = draw(image, predicted, truth, CAMVID, "a title")
    panels = panels_of(figure)
    assert list(panels) == ["image", "prediction", "truth"]
    assert np.array_equal(panels["image"], image)
    assert panels["prediction"][:3, 0].tolist() == [[128, 64, 128], [128, 128, 128], [64, 0, 128]]
    assert panels["truth"][:3, 0].tolist() == [[128, 64, 128], [128, 128, 128], [0, 0, 0]]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["sky", "road", "car", "void"]
    assert figure.axes[1].get_title() == "prediction: 100% of pixels right, mIoU 100%"  # void counts nowhere


@pytest.mark.parametrize(
    ("truth", "titles"),
    [
        ([3], ["image", "prediction: 75% of pixels right, mIoU 38%", "truth"]),  # road 75, sky 0
        ([CAMVID.void], ["image", "prediction", "truth"]),
        (None, ["image", "prediction"]),
    ],
)
def test_scores_are_of_this_image_if_it_has_a_truth(truth, titles):
    predicted = stripes([3])
    predicted[:8] = 0
    figure = draw(np.zeros((32, 48, 3), dtype=np.uint8), predicted, truth and stripes(truth), CAMVID, "")
    assert [ax.get_title() for ax in figure.axes] == titles


@pytest.mark.parametrize("size", [(1, 1), (2, 900), (900, 2)])
def test_pictures_of_odd_shapes_have_bounds(size):
    figure = draw(np.zeros((*size, 3), dtype=np.uint8), stripes([3], size), stripes([4], size), CAMVID, "a title")
    width, height = figure.get_size_inches()
    assert 5 < width < 20 and 0.5 < height < 20


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("with_truth", [True, False])
def test_the_legend_of_all_classes_fits_in(name, with_truth):
    classes = CLASSES[name]
    predicted, truth = (stripes(range(n), (160, 240)) for n in (classes.void, classes.void + 1))
    predicted[:, :120] = classes.void - 1  # the class with most pixels
    image = np.zeros((160, 240, 3), dtype=np.uint8)
    figure = draw(image, predicted, truth if with_truth else None, classes, "a title")
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, panel = legend.get_window_extent(), figure.axes[0].get_window_extent()
    names = [text.get_text() for text in legend.get_texts()]
    assert classes.names[-1] in names and len(names) == min(classes.void + with_truth, 31)
    assert name != "ade20k" or names[-1] == f"and {120 + with_truth} more"
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0 and box.y1 <= panel.y0


# ---------------------------------------------------------------------------- the script


def test_a_folder_and_a_file(call, run, trained, tmp_path, capsys):
    """Each picture has the colours of the classes in its prediction and truth."""
    other = tmp_path / "other" / "street.jpg"
    other.parent.mkdir()
    folder = trained / "data_camvid" / "val"
    Image.open(folder / "val_000.png").resize((90, 50)).save(other)
    code, output = call(folder, other, "--run", run)
    assert code == 0 and f"-> {output}: 3 pictures, 2 with ground truth" in capsys.readouterr().out
    assert sorted(path.name for path in output.iterdir()) == ["other_street.png", "val_val_000.png", "val_val_001.png"]
    pictures = {path.name: imread(path) for path in output.iterdir()}
    assert all(picture.std() > 0.05 for picture in pictures.values())
    picture = pictures["val_val_000.png"]
    assert picture.shape[1] > 1.3 * pictures["other_street.png"].shape[1]  # which has no third panel
    colours = set(map(tuple, (picture * 255).round().astype(int)[..., :3].reshape(-1, 3).tolist()))
    model, _ = load_model(run)
    predicted = predict(model, read_image(folder / "val_000.png"), (32, 40), CPU)
    shown = set(np.unique(predicted)) | set(np.unique(truth_of(folder / "val_000.png", trained)))
    assert {tuple(CAMVID.palette[label].tolist()) for label in shown} <= colours


def test_every_image_has_a_picture_of_its_own(call, run, trained, tmp_path, capsys):
    image = trained / "data_camvid" / "val" / "val_000.png"
    for folder, names in {"a": ["x.png", "x.bmp", ".x.png", "._x.png"], "b/a": ["x.png"]}.items():
        (tmp_path / folder).mkdir(parents=True)
        for name in names:
            Image.open(image).save(tmp_path / folder / name)
    code, output = call(tmp_path / "a", tmp_path / "b" / "a", tmp_path / "a" / "x.png", "--run", run)
    assert code == 0 and "3 pictures, 0 with ground truth" in capsys.readouterr().out
    assert sorted(path.name for path in output.iterdir()) == ["a_x-2.png", "a_x-3.png", "a_x.png"]


def test_a_resnet_unet(trained, call_script, tmp_path):
    fit(
        Experiment(
            "resnet",
            ResNetUNetConfig(depth=34, img_size=32, num_classes=11, encoder_weights="none"),
            SegmentationConfig(epochs=1, batch_size=3, learning_rate=1e-3, weight_decay=0.0),
            RunOptions(data_dir=trained, runs_dir=tmp_path, device="cpu", num_workers=0),
        )
    )
    image = trained / "data_camvid" / "val" / "val_000.png"
    where = ["--data-dir", trained, "--output-dir", tmp_path / "out"]
    assert call_script("interpretability/predict.py", image, "--run", tmp_path / "resnet" / "seed0", *where) == 0
    assert imread(tmp_path / "out" / "resnet_seed0" / "val_val_000.png").std() > 0.05


def test_any_checkpoint_has_a_folder_of_its_own(call, run, trained):
    for name in ("best.pt", "last.pt", "previous.pt"):
        code, output = call(trained / "data_camvid" / "val" / "val_000.png", "--run", run / name)
        assert code == 0
    names = {path.parent.name for path in output.parent.glob("*/val_val_000.png")}
    assert names == {"unet+a=1_seed0", "unet+a=1_seed0_last", "unet+a=1_seed0_previous"}


def test_bad_input(call, run, trained, tmp_path, experiment, capsys):
    empty, broken = tmp_path / "empty", tmp_path / "broken.png"
    empty.mkdir()
    broken.write_text("no image")
    image = trained / "data_camvid" / "val" / "val_000.png"
    write_camvid(tmp_path / "other", n_train=1, n_val=1)
    mask = tmp_path / "other" / "valannot" / "val_000.png"
    Image.open(mask).resize((24, 16)).save(mask)
    trial = experiment(epochs=1, train_limit=20)
    fit(trial)
    capsys.readouterr()
    for args, said in [
        ((tmp_path / "nowhere.png", "--run", run), r"nowhere.png does not exist"),
        ((empty, "--run", run), "no images: name image files"),
        ((broken, "--run", run), r"broken.png cannot be read as an image"),
        ((image, "--run", tmp_path), "has no weights to open"),
        ((image, "--run", run / "worst.pt"), r"worst.pt does not exist"),
        ((tmp_path / "other" / "val", "--run", run), f"its mask {mask} is 24 x 16"),
        ((image, "--run", trial.folder), "is not a segmentation or detection run"),
        (("--run", run), "name image files"),
    ]:
        assert call(*args)[0] == 1
        check_error(capsys, said)
        assert not (tmp_path / "out").exists()
    assert call(image)[0] == 2


def test_names_of_files_are_no_formulas(call, run, trained, tmp_path):
    shutil.copy(trained / "data_camvid" / "val" / "val_000.png", tmp_path / r"$\frac$.png")
    assert call(tmp_path / r"$\frac$.png", "--run", run)[0] == 0


def test_a_long_name(run, trained, tmp_path, call_script):
    name = "unet+" + "+".join(f"field_{index}=1" for index in range(20))
    copy = tmp_path / "long" / "seed0"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"experiment": name}))
    image = trained / "data_camvid" / "val" / "val_000.png"
    where = ["--data-dir", trained, "--output-dir", tmp_path / "out"]
    assert call_script("interpretability/predict.py", image, "--run", copy, *where) == 0
    (picture,) = (tmp_path / "out").glob("*/*.png")
    short = call_script("interpretability/predict.py", image, "--run", run, *where)
    assert (
        short == 0 and imread(picture).shape[1] == imread(tmp_path / "out" / "unet+a=1_seed0" / picture.name).shape[1]
    )


def test_bad_files_do_not_keep_the_others_from_being_drawn(call, run, trained, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_text("no image")
    shutil.copy(trained / "data_camvid" / "val" / "val_000.png", photos / "b.png")
    code, output = call(photos, "--run", run)
    assert code == 1 and [path.name for path in output.iterdir()] == ["photos_b.png"]
    assert re.search(r"a\.png cannot be read as an image .*\ndrawn all the same: 1\n$", capsys.readouterr().err)
