"""classify.py: the model's answers for files of any format, the preprocessing of training, bad files."""

import csv
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image, ImageOps

from analysis.plotting.style import save_png
from interpretability.classify import Answer, classify, draw
from interpretability.common.image_choice import image_files, picture_names
from interpretability.common.trained import TrainedRun
from tests.inspecting import check_error, train_unet
from training.augment import normalise
from training.data import load_dataset
from training.data.image_files import ImageFiles
from training.runs import load_model

SCRIPT = "interpretability/classify.py"


def answers(folder):
    (table,) = folder.rglob("classes.csv")
    with table.open(newline="") as file:
        return {row["file"].rpartition("/")[2]: row for row in csv.DictReader(file)}


def check_row(row, expected):
    """expected: probabilities (10,) of the classes."""
    for rank in (1, 2, 3):
        label = int(row[f"class_{rank}"].removeprefix("class "))
        assert float(row[f"probability_{rank}"]) == pytest.approx(expected[label].item(), abs=2e-5)
    assert int(row["class_1"].removeprefix("class ")) == expected.argmax()


def test_test_images_get_the_answers_of_training(trained_run, data_dir, call_script, tmp_path):
    """A folder of the data set's own images, in batches that do not divide their number."""
    data = load_dataset("cifar10", data_dir)
    (tmp_path / "photos").mkdir()
    for index in range(7):
        Image.fromarray(data.test_images[index].transpose(1, 2, 0)).save(tmp_path / "photos" / f"{index}.png")
    options = ("--run", trained_run, "--top", 3, "--batch-size", 4, "--output-dir", tmp_path / "out")
    assert call_script(SCRIPT, tmp_path / "photos", *options) == 0
    with torch.no_grad():
        expected = load_model(trained_run)[0](normalise(torch.from_numpy(data.test_images[:7]))).softmax(-1)
    rows = answers(tmp_path / "out")
    assert len(rows) == 7 and "class_4" not in rows["0.png"] and not list((tmp_path / "out").rglob("*.png"))
    for index in range(7):
        check_row(rows[f"{index}.png"], expected[index])


def test_a_run_that_was_evaluated_with_mirror_images_answers_so(trained_run, tmp_path):
    run, seen = TrainedRun(trained_run), []
    run.train = run.train | {"eval_flip": True}
    Image.fromarray(colours()).save(tmp_path / "a.png")
    (answer,) = classify(run, [tmp_path / "a.png"], 10, 4, seen)
    images = normalise(torch.from_numpy(answer.pixels)[None])
    with torch.no_grad():
        expected = ((run.model(images) + run.model(images.flip(-1))) / 2).softmax(-1)[0]
    assert answer.probabilities == pytest.approx(expected.sort(descending=True).values.tolist(), abs=1e-5)
    assert not torch.allclose(run.model(images), run.model(images.flip(-1)), atol=1e-3)


def colours(size=(48, 40)):
    rows, columns = np.mgrid[: size[1], : size[0]]
    return np.stack((4 * columns, 5 * rows, 255 - 2 * rows - 2 * columns), -1).astype(np.uint8)


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn away
    file = io.BytesIO()
    Image.fromarray(colours()).transpose(Image.Transpose.ROTATE_90).save(file, "png", exif=exif)
    return file.getvalue()


def saved(image, ending):
    file = io.BytesIO()
    image.save(file, ending)
    return file.getvalue()


def deep(ending):
    return saved(Image.fromarray(colours()[..., 0].astype(np.uint16) * 257), ending)


GREY = Image.fromarray(colours()[..., 0])
HALF = Image.fromarray(np.dstack((colours(), np.full((40, 48), 51, np.uint8))))  # a fifth of the colour, on white
FORMATS = {  # bytes of a file, and the picture it shows
    "turned by EXIF.png": (turned, Image.fromarray(colours())),
    "alpha.png": (lambda: saved(HALF, "png"), Image.fromarray((colours() / 5 + 204).round().astype(np.uint8))),
    "palette.gif": (lambda: saved(GREY.quantize(256), "gif"), GREY),
    "grey of 16 bits.png": (lambda: deep("png"), GREY),
    "grey of 16 bits.tif": (lambda: deep("tiff"), GREY),
    "cmyk.tif": (lambda: saved(Image.fromarray(colours()).convert("CMYK"), "tiff"), Image.fromarray(colours())),
    "large.bmp": (lambda: saved(Image.fromarray(colours((500, 300))), "bmp"), Image.fromarray(colours((500, 300)))),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_read_as_a_viewer_shows_them(name, trained_run, call_script, tmp_path):
    make, shown = FORMATS[name]
    (tmp_path / name).write_bytes(make())
    assert call_script(SCRIPT, tmp_path / name, "--run", trained_run, "--output-dir", tmp_path / "out") == 0
    fitted = np.array(ImageOps.fit(shown.convert("RGB"), (32, 32), Image.Resampling.BICUBIC))
    with torch.no_grad():
        expected = load_model(trained_run)[0](normalise(torch.from_numpy(fitted).permute(2, 0, 1)[None])).softmax(-1)[0]
    (row,) = answers(tmp_path / "out").values()
    assert float(row["probability_1"]) == pytest.approx(expected.max().item(), abs=3e-3)  # alpha is rounded
    (picture,) = (tmp_path / "out").rglob("*.png")
    assert picture.stat().st_size > 5000


def test_bad_files_do_not_keep_the_others_from_being_classified(trained_run, call_script, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(saved(GREY, "png"))
    (photos / "b.png").write_bytes(saved(GREY, "png")[:60])
    (photos / "c.jpg").write_bytes(b"<html>")
    assert call_script(SCRIPT, photos, "--run", trained_run, "--output-dir", tmp_path / "out") == 1
    first, second, others = capsys.readouterr().err.splitlines()
    assert "b.png cannot be read as an image" in first and "c.jpg cannot be read as an image" in second
    assert others == "classified all the same: 1"
    assert list(answers(tmp_path / "out")) == ["a.png"]


def test_images_are_cropped_as_for_the_runs_own_validation(trained_run, data_dir, tmp_path):
    run = TrainedRun(trained_run, data_dir, "cpu")
    (tmp_path / "a.png").write_bytes(turned())
    for share in (1.0, 0.5):
        run.train["eval_crop"] = share
        (answer,) = classify(run, [tmp_path / "a.png"], 1, 1, [])
        assert np.array_equal(answer.pixels, ImageFiles([str(tmp_path / "a.png")], 32, 3, share)[0])


def test_images_in_subfolders_are_found_but_not_hidden_ones(tmp_path):
    (tmp_path / "folder.png").mkdir()
    hidden = (".hidden/d.png", "dog/._e.png", "@eaDir/b.png", "__MACOSX/b.png")
    for name in ("b.png", "dog/a.png", "dog/deep/c.jpg", "dog/notes.txt", *hidden):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = image_files((tmp_path, tmp_path / "dog" / "a.png"))
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["b.png", "dog/a.png", "dog/deep/c.jpg"]


def test_pictures_of_all_files_have_names_of_their_own():
    files = [Path(name) for name in ("x/cat.jpg", "x/cat.png", "x/cat-2.jpg", "x/cat-2.png")]
    assert picture_names(files) == ["x_cat.png", "x_cat-2.png", "x_cat-2-2.png", "x_cat-2-3.png"]
    assert picture_names([Path("x/Cat.jpg"), Path("x/cat.png")]) == ["x_Cat.png", "x_cat-2.png"]
    long = [Path("x") / f"{'é' * 120}{ending}.jpg" for ending in "abb"]
    names = picture_names(long)
    assert len(set(names)) == 3 and all(len(name.encode()) <= 255 for name in names)


def test_the_picture_of_a_link_is_named_after_the_link(tmp_path):
    for folder in ("photos", "chosen"):
        (tmp_path / folder).mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    (tmp_path / "chosen" / "cat.jpg").symlink_to(tmp_path / "photos" / "a.jpg")
    assert picture_names([tmp_path / "photos" / ".." / "chosen" / "cat.jpg"]) == ["chosen_cat.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
def test_a_file_name_that_is_not_utf_8(trained_run, call_script, tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    path.write_bytes(saved(GREY, "png"))
    assert call_script(SCRIPT, path, "--run", trained_run, "--output-dir", tmp_path / "out") == 0
    assert len(list((tmp_path / "out").rglob("*.png"))) == 1


def test_mistakes_get_one_message(trained_run, call_script, tmp_path, capsys):
    assert call_script(SCRIPT, tmp_path / "nothing.png", "--run", trained_run) == 1
    check_error(capsys, "nothing.png does not exist")
    (tmp_path / "empty").mkdir()
    assert call_script(SCRIPT, tmp_path / "empty", "--run", trained_run) == 1
    check_error(capsys, "no images")
    (tmp_path / "a.png").write_bytes(saved(GREY, "png"))
    assert call_script(SCRIPT, tmp_path / "a.png", "--run", train_unet(tmp_path / "unet")) == 1
    check_error(capsys, "does not classify images")
    assert call_script(SCRIPT, tmp_path / "a.png", "--run", trained_run, "--top", 0) == 2
    assert "top = 0 must be at least 1" in capsys.readouterr().err


def test_class_names_are_no_formulas(tmp_path):
    answer = Answer(Path("a.png"), np.zeros((3, 8, 8), np.uint8), ["$^$", "US$ and CA$"], [0.7, 0.3])
    save_png(draw(answer, "run"), tmp_path / "a.png")
    assert imread(tmp_path / "a.png").std() > 0.05
