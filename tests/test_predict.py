"""interpretability/predict.py: what a segmentation run says of images, drawn."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from camvid_data import write_camvid
from matplotlib.image import imread
from PIL import Image

from interpretability.predict import Truth, draw, predict
from models.bdh_unet import bdh_unet_config
from training import Experiment, RunOptions, SegmentationConfig, fit
from training.masks import CAMVID, find_masks, read_image
from training.runs import load_model

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data_camvid (images of 48 x 32) and a run of a tiny BDH-UNet at 32 x 40 pixels."""
    folder = tmp_path_factory.mktemp("trained")
    write_camvid(folder / "data_camvid", n_train=3, n_val=2, size=(48, 32))
    fit(
        Experiment(
            "unet+a=1",
            bdh_unet_config(img_size=(32, 40), n_layer=1, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4),
            SegmentationConfig(epochs=1, batch_size=2, learning_rate=1e-2, weight_decay=0.0),
            RunOptions(data_dir=folder, runs_dir=folder / "runs", device="cpu", num_workers=0),
        )
    )
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


@pytest.mark.parametrize("size", [(10, 70), (200, 33)])
def test_images_of_any_size(run, size):
    model, _ = load_model(run)
    assert predict(model, np.zeros((*size, 3), dtype=np.uint8), (32, 40), CPU).shape == size


def test_the_truth_is_found_beside_the_image(trained):
    folder = trained / "data_camvid"
    truth = Truth("camvid", trained)
    mask = truth(folder / "val" / "val_001.png")
    files = find_masks("camvid", folder)
    assert np.array_equal(mask, files.read_mask(folder / "valannot" / "val_001.png"))
    assert truth(folder / "valannot" / "val_001.png") is None  # a mask is no image of the data


def test_the_truth_of_another_copy_and_of_a_stranger(trained, tmp_path):
    write_camvid(tmp_path / "copy", layout="colours", n_train=1, n_val=2, size=(48, 32))
    shutil.copy(trained / "data_camvid" / "val" / "val_000.png", tmp_path / "street.png")
    truth = Truth("camvid", trained)
    of_copy = truth(tmp_path / "copy" / "val" / "val_000.png")
    assert of_copy is not None and of_copy.max() <= CAMVID.void
    assert truth(tmp_path / "street.png") is None


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


def test_scores_are_of_this_image():
    image, truth = np.zeros((32, 48, 3), dtype=np.uint8), stripes([3])
    predicted = truth.copy()
    predicted[:8] = 0
    title = draw(image, predicted, truth, CAMVID, "")
    assert title.axes[1].get_title() == "prediction: 75% of pixels right, mIoU 38%"  # road 75, sky 0


def test_no_truth_no_third_panel():
    figure = draw(np.zeros((32, 48, 3), dtype=np.uint8), stripes([3, 4]), None, CAMVID, "a title")
    assert [ax.get_title() for ax in figure.axes] == ["image", "prediction"]


# ---------------------------------------------------------------------------- the script


def test_a_folder_and_a_file(call, run, trained, tmp_path, capsys):
    other = tmp_path / "other" / "street.jpg"
    other.parent.mkdir()
    Image.open(trained / "data_camvid" / "val" / "val_000.png").resize((90, 50)).save(other)
    code, output = call(trained / "data_camvid" / "val", other, "--run", run)
    assert code == 0 and f"-> {output}, 3 pictures" in capsys.readouterr().out
    assert sorted(path.name for path in output.iterdir()) == ["other_street.png", "val_val_000.png", "val_val_001.png"]
    for path in output.iterdir():
        assert imread(path).std() > 0.05
    assert imread(output / "val_val_000.png").shape[1] > 1.3 * imread(output / "other_street.png").shape[1]


@pytest.mark.parametrize("name", ["best.pt", "last.pt", "previous.pt"])
def test_any_checkpoint(name, call, run, trained):
    code, output = call(trained / "data_camvid" / "val" / "val_000.png", "--run", run / name)
    assert code == 0 and (output / "val_val_000.png").is_file()


def test_bad_input(call, run, trained, tmp_path, capsys):
    empty, broken = tmp_path / "empty", tmp_path / "broken.png"
    empty.mkdir()
    broken.write_text("no image")
    image = trained / "data_camvid" / "val" / "val_000.png"
    for args, parts in [
        ((tmp_path / "nowhere.png", "--run", run), ["nowhere.png is not there"]),
        ((empty, "--run", run), ["there is no image"]),
        ((broken, "--run", run), [str(broken), "cannot be read as an image"]),
        ((image, "--run", tmp_path), ["is no run whose model can be read"]),
        ((image, "--run", run / "worst.pt"), ["worst.pt is no run whose model can be read"]),
    ]:
        assert call(*args)[0] == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ") and all(part in said for part in parts), said
    assert call("--run", run)[0] == 1 and "name image files" in capsys.readouterr().err
    assert call(image)[0] == 2


def test_a_run_that_does_not_label_pixels(call, run, trained, experiment, capsys):
    trial = experiment(epochs=1, train_limit=20)
    fit(trial)
    assert call(trained / "data_camvid" / "val", "--run", trial.folder)[0] == 1
    assert "does not label pixels" in capsys.readouterr().err


def test_attention_maps_of_a_segmentation_run_point_here(run, call_script, tmp_path, capsys):
    assert call_script("interpretability/visualize_attention.py", "--run", run, "--output-dir", tmp_path / "maps") == 1
    assert "interpretability/predict.py" in capsys.readouterr().err


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
