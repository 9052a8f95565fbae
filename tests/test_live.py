"""explore.py --live in a real browser: the model in the page answers as in Python, on images of any size."""

import base64
import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import expect

from interpretability.common.recorder import record
from interpretability.common.trained import TrainedRun
from interpretability.explore import LARGEST_PAGE, make_page
from tests.explored import train_runs
from tests.inspecting import check_error
from training.augment import normalise
from training.data.image_files import ImageFiles

# what the page holds of its last image, decoded as for drawing
ADDED = """async () => {
    const place = data.images.length - 1, image = data.images[place], numbers = await load(place);
    const all = (function_) => Array.from({ length: data.levels }, (_, level) => Array.from({ length: tokens },
        (_, token) => function_(level, token)));
    return {
        name: image.name,
        png: image.png,
        levels: image.levels,
        scores: all((level, token) => mapsOf(numbers, level, token, false).slice(1).map((map) => [...map])),
        neurons: data.neurons && all((level, token) => neuronsOf(image, numbers, level, token)),
    };
}"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, experiment_in, data_dir):
    """Runs, beside each its page with the model, NAME.html."""
    folders = train_runs(experiment_in, tmp_path_factory.mktemp("work") / "runs", ("separate",))
    opened = {name: TrainedRun(folder, data_dir, "cpu") for name, folder in folders.items()}
    for run in opened.values():
        run.folder.with_suffix(".html").write_text(make_page(run, (4, 9), live=True), encoding="utf-8")
    return opened


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Files of the model's own size, large, upright by EXIF only, half transparent, and no image."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    smooth = np.kron(rng.integers(0, 256, (6, 9, 3)), np.ones((30, 25, 1))).astype(np.uint8)  # 225 x 180 pixels
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / "own.png")
    Image.fromarray(smooth).save(folder / "large.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(smooth).save(folder / "turned.jpg", exif=exif, quality=100, subsampling=0)
    alpha = np.full((180, 225, 1), 255, np.uint8)
    alpha[:90] = 0
    Image.fromarray(np.concatenate((smooth, alpha), -1)).save(folder / "transparent.png")
    (folder / "text.png").write_text("no image")
    return folder


@pytest.fixture
def visit(browser, runs):
    """Opens the page of a run; fails at the end where it asked for anything from outside."""
    contexts, asked, said = [], [], []

    def open_page(name):
        contexts.append(browser.new_context())
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(runs[name].folder.with_suffix(".html").as_uri())
        expect(page.locator("#own")).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert asked and all(url.startswith(("file:", "data:", "blob:")) for url in asked)
    assert not said


def check(added, run, path, share=1.0):
    """What the page found is what the model computes from the file, read as classify.py reads it."""
    size = run.sizes.img_size
    image = ImageFiles([str(path)], size, 3, share)[0]
    shown = np.array(Image.open(io.BytesIO(base64.b64decode(added["png"].partition(",")[2]))).convert("RGB"))
    furthest = np.abs(shown.transpose(2, 0, 1).astype(int) - image).max()
    assert furthest <= (3 if path.suffix == ".jpg" else 1)  # decoders of JPEG differ
    pixels = normalise(torch.from_numpy(image)[None])
    with torch.no_grad(), record(run.model) as trace:
        run.model(pixels)
    assert added["name"] == path.name
    for level in trace.levels:
        expected = trace.logits(level).softmax(-1)[0]
        best = [each["class"] for each in added["levels"][level]["top"]]
        assert (expected[best[:-1]] >= expected[best[1:]] - 0.02).all() and expected[best[0]] >= expected.max() - 0.02
        for each in added["levels"][level]["top"]:
            assert each["probability"] == pytest.approx(expected[each["class"]].item(), abs=0.02)
        scores = trace.scores(level)[0].transpose(0, 1).numpy()  # (T, H, T)
        np.testing.assert_allclose(np.array(added["scores"][level]), scores, atol=0.03 * np.abs(scores).max())
        if added["neurons"]:
            activity = trace.activity(level)
            for quantity, values in enumerate(activity):
                strongest = values[0].amax((0, 2))  # of each token
                tolerance = 0.03 * strongest.max().item()
                for place, token in enumerate(added["neurons"][level]):
                    listed = token[quantity]["list"]
                    found = [each["value"] for each in listed]
                    named = [values[0, each["head"], place, each["neuron"]].item() for each in listed]
                    np.testing.assert_allclose(found, named, atol=tolerance)
                    assert max(found, default=0) == pytest.approx(strongest[place].clamp(min=0).item(), abs=tolerance)
                    here = values[0, :, place]  # rounding may move those next to 0 to its other side
                    assert (here > tolerance).sum() <= token[quantity]["active"] <= (here > -tolerance).sum()


def test_the_page_computes_what_the_model_does(visit, runs, photos):
    page = visit("separate")
    for place, file in enumerate(("own.png", "large.png", "turned.jpg", "transparent.png")):
        page.set_input_files("#files", photos / file)
        expect(page.locator("#thumbs img")).to_have_count(3 + place)
        expect(page.locator("#own-says")).to_have_text("1 added at the end")
        check(page.evaluate(ADDED), runs["separate"], photos / file)
    expect(page.locator("#stage-title")).to_have_text("transparent.png")
    expect(page.locator("#verdict")).to_contain_text("Predicted class")
    expect(page.locator("#says li")).to_have_count(5)
    page.locator("#thumbs input").first.check()  # back to an image of the test part
    expect(page.locator("#verdict")).to_contain_text("True class")


def test_images_are_cropped_as_for_the_runs_own_validation(visit, runs, photos):
    page = visit("separate")
    assert page.evaluate("data.share") == 1
    page.evaluate("() => { data.share = 0.8; }")  # of a run with --eval-crop 0.8
    page.set_input_files("#files", photos / "large.png")
    expect(page.locator("#own-says")).to_have_text("1 added at the end")
    check(page.evaluate(ADDED), runs["separate"], photos / "large.png", share=0.8)


def test_a_file_that_is_no_image_is_named_and_the_others_are_shown(visit, photos):
    page = visit("separate")
    page.set_input_files("#files", [photos / "text.png", photos / "own.png"])
    expect(page.locator("#own-says")).to_have_text("1 added at the end; text.png is not an image this browser reads")
    expect(page.locator("#stage-title")).to_have_text("own.png")
    before = page.evaluate("data.images.length")
    page.set_input_files("#files", [photos / "own.png"])  # the same again
    page.wait_for_function("(before) => data.images.length === before + 1", arg=before)


def test_a_page_without_the_model_says_nothing_of_own_images(runs, tmp_path, browser):
    (tmp_path / "page.html").write_text(make_page(runs["separate"], (4,)), encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    expect(page.locator("#verdict")).to_contain_text("True class")
    expect(page.locator("#own")).to_be_hidden()
    page.close()


def test_pages_are_small(runs):
    assert all(run.folder.with_suffix(".html").stat().st_size < LARGEST_PAGE for run in runs.values())


def test_a_missing_package_is_named(runs, data_dir, call_script, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert (
        call_script("interpretability/explore.py", "--run", runs["separate"].folder, "--data-dir", data_dir, "--live")
        == 1
    )
    check_error(
        capsys, "explore.py --live needs onnxscript, which is not installed: pip install -r requirements-export.txt"
    )
