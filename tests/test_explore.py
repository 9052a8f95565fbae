"""explore.py without a browser: what is computed, how exactly it is stored, how large the page is, what is refused."""

import re

import numpy as np
import pytest
import torch

from training import UserError
from interpretability import explore
from interpretability.common.explore_encoding import Strongest, encode_neurons, pack, quantise
from interpretability.common.trained import TrainedRun
from interpretability.explore import LARGEST_PAGE, N_NEURONS, STEPS, look_inside, make_page, to_json
from models.baselines import ViTConfig
from models.vision_bdh import v2_config
from tests.explored import MODELS, data_of, numbers, scores_of, traced, traced_scores, train_runs
from tests.inspecting import check_error, train_unet
from training.data import load_dataset

SCRIPT = "interpretability/explore.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, experiment_in):
    return train_runs(experiment_in, tmp_path_factory.mktemp("work") / "runs", MODELS)


@pytest.fixture(params=MODELS)
def run(request, runs, data_dir):
    return TrainedRun(runs[request.param], data_dir, "cpu")


@pytest.fixture
def v2(runs, data_dir):
    return TrainedRun(runs["v2"], data_dir, "cpu")


# ---------------------------------------------------------------------------- what is computed and stored


def test_scores_are_off_by_half_a_step_at_most(run):
    """Of every query, at every level and head; in a symmetric map by half a step of the query and of the key."""
    data = data_of(make_page(run, [4, 9]))
    assert data["steps"] == 127 and [image["number"] for image in data["images"]] == [4, 9]
    for image in data["images"]:
        exact = traced_scores(traced(run, image["number"])[0])
        stored, steps = scores_of(data, image)
        assert steps == pytest.approx(np.abs(exact).max(-1) / 127)
        assert (np.abs(stored - exact) <= 0.5001 * steps[..., None]).all()
        assert stored.min() < 0 if run.adapter.signed else stored.min() >= 0
        halved = numbers(image["codes"], np.int8).size < exact.size
        assert halved == (run.folder.parent.name == "v2")


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", ["signed", "symmetric", "weights"])
def test_quantised(steps, kind):
    """Queries of very different scales, one without any score; the largest of each is stored exactly."""
    rng = np.random.default_rng(7)
    scores = rng.normal(size=(2, 3, 9, 9))
    if kind == "symmetric":
        sizes = 10.0 ** rng.uniform(-3, 3, (2, 3, 9, 1))
        scores = (scores + scores.swapaxes(-1, -2)) * sizes * sizes.swapaxes(-1, -2)
        scores[0, 1, 4] = scores[0, 1, :, 4] = 0
    elif kind == "weights":
        scores = np.exp(4 * scores) / np.exp(4 * scores).sum(-1, keepdims=True)
    else:
        scores *= 10.0 ** rng.uniform(-3, 3, (2, 3, 9, 1))
        scores[0, 1, 4] = 0
    scores = scores.astype(np.float32)
    codes, limits = quantise(scores, steps)
    assert codes.dtype == np.int8 and codes.shape == (2, 3, *((45,) if kind == "symmetric" else (9, 9)))
    assert abs(codes).max() == steps and np.array_equal(limits, abs(scores).max(-1))
    grid = dict(class_tokens=0, grid=[3, 3], levels=2, heads=3, steps=steps)
    stored, step = scores_of(grid, {"codes": pack(codes), "limits": pack(limits)})
    half = 0.5001 * np.minimum(step[..., :, None], step[..., None, :] if kind == "symmetric" else np.inf)
    assert (np.abs(stored - scores) <= half).all() and (np.abs(stored - scores) > 0.3 * half).any()
    assert np.abs(stored).max(-1) == pytest.approx(limits)


def test_classes_of_every_level(run, data_dir):
    """The last level's are the model's output; truth and order come from the data."""
    labels = load_dataset("cifar10", data_dir).test_labels
    data = data_of(make_page(run, [11, 0]))
    assert data["part"] == "Test" and data["classes"] == [f"class {label}" for label in range(10)]
    for image in data["images"]:
        trace, output = traced(run, image["number"])
        assert image["label"] == labels[image["number"]]
        logits = [trace.logits(level)[0] for level in trace.levels]
        assert torch.allclose(logits[-1], output, atol=1e-5) and len(image["levels"]) == len(logits)
        for told, each in zip(image["levels"], logits, strict=True):
            exact = np.exp(each.double().numpy()) / np.exp(each.double().numpy()).sum()
            assert [top["class"] for top in told["top"]] == list(np.argsort(-exact)[:3])
            assert [top["probability"] for top in told["top"]] == pytest.approx(sorted(exact)[:-4:-1], abs=6e-5)
            assert told["truth"] == pytest.approx(exact[image["label"]], abs=6e-5)


def test_neurons(run):
    """The five most active of each patch over all heads, and how many are active at all."""
    data = data_of(make_page(run, [5]))
    image = data["images"][0]
    if run.folder.parent.name in ("vit", "deit"):
        assert data["neurons"] is None and "neurons" not in image
        assert "This list is for BDH models only" in data["notes"]["neurons"]
        return
    assert data["neurons"]["per_head"] == 16 and data["neurons"]["top"] == N_NEURONS
    assert [each["name"] for each in data["neurons"]["quantities"]] == ["x_sparse", "y_sparse", "gated"]
    trace, _ = traced(run, 5)
    tokens = 16 + data["class_tokens"]
    stored = numbers(image["neurons"]["numbers"], "<u2").reshape(3, 3, tokens, N_NEURONS)
    values = numbers(image["neurons"]["values"], "<u2").reshape(stored.shape) / 65535
    active = numbers(image["neurons"]["active"], "<u4").reshape(3, 3, tokens)
    for level in range(3):
        for quantity, exact in enumerate(trace.activity(level)):
            for token in range(tokens):
                of_token = {
                    (head, neuron): float(exact[0, head, token, neuron]) for head in range(2) for neuron in range(16)
                }
                largest = sorted(of_token.values(), reverse=True)[:N_NEURONS]
                scale = image["neurons"]["scales"][level][quantity]
                assert values[level, quantity, token] * scale == pytest.approx(
                    np.clip(largest, 0, None), abs=scale / 1e5
                )
                chosen = [of_token[divmod(int(number), 16)] for number in stored[level, quantity, token]]
                assert chosen == pytest.approx(largest)
                assert active[level, quantity, token] == sum(value > 0 for value in of_token.values())


def test_many_neurons_need_wider_numbers():
    strongest = Strongest(np.full((1, 1, 1, 1), 70_000), np.ones((1, 1, 1, 1), np.float32), np.ones((1, 1, 1), int))
    assert numbers(encode_neurons(strongest, 80_000)["numbers"], "<u4").tolist() == [70_000]
    silent = encode_neurons(Strongest(strongest.numbers * 0, strongest.values * 0, strongest.active * 0), 80_000)
    assert numbers(silent["values"], "<u2").tolist() == [0] and silent["scales"] == [[0.0]]


def test_one_image_at_a_time(v2):
    """What is seen of an image does not depend on the others of the page."""
    assert data_of(make_page(v2, [3, 8, 1]))["images"][1] == data_of(make_page(v2, [8]))["images"][0]


# ---------------------------------------------------------------------------- the file


def test_the_page_stands_alone(v2):
    page = make_page(v2, [0])
    assert page.count("<script") == page.count("</script>") == 3 and page.count("<style>") == 1
    assert "default-src 'none'" in page and "<title>v2, seed 0</title>" in page
    own = page.replace(to_json(data_of(page)), "")
    assert len(own) < len(page) - 5000
    assert not re.search(r"(src|href)=|https?:|url\(|@import|fetch\(|import\(", own)


def test_names_cannot_break_out_of_the_data():
    text = to_json({"classes": ["</script><script>alert(1)</script>", "a < b", "Ünï"]})
    assert "<" not in text and "\\u003c/script>" in text


def largest_page(config, rng):
    """Characters of the page's numbers with scores and neurons that are pure noise, which no packing makes smaller."""
    L, H, T = config.n_layer, config.n_head, 64
    is_bdh = hasattr(config, "n_neurons")
    scores = rng.uniform(-1, 1, (L, H, T + (not is_bdh), T + (not is_bdh))).astype(np.float32)
    image = 0
    if is_bdh:
        scores = np.tril(scores) + np.tril(scores, -1).swapaxes(-1, -2)
        total = H * config.n_neurons
        shape = (L, 3, T, N_NEURONS)
        values = np.sort(rng.uniform(size=shape))[..., ::-1].astype(np.float32)
        strongest = Strongest(rng.integers(total, size=shape), values, rng.integers(total, size=shape[:3]))
        image = len(to_json(encode_neurons(strongest, total)))
    codes, limits = quantise(scores if is_bdh else abs(scores), STEPS[0 if is_bdh else -1])
    return image + len(pack(codes)) + len(pack(limits))


@pytest.mark.parametrize("config", [v2_config(), ViTConfig()], ids=["v2", "vit_tiny"])
def test_64_images_fit_at_full_size(config):
    """Whatever the scores are; 10 kB an image for the picture and classes, 50 kB for the page around them."""
    assert 64 * (largest_page(config, np.random.default_rng(3)) + 10_000) + 50_000 < LARGEST_PAGE


def test_coarser_steps_where_the_page_would_be_too_large(v2, monkeypatch):
    """The finest that fit, for all images alike; then a refusal that names a number of images that fits."""
    pages = {}
    for steps in STEPS:
        monkeypatch.setattr(explore, "STEPS", (steps,))
        pages[steps] = make_page(v2, range(6))
    monkeypatch.undo()
    sizes = {steps: len(page.encode()) for steps, page in pages.items()}
    assert sizes[127] > sizes[63] > sizes[31]
    for steps, page in pages.items():
        monkeypatch.setattr(explore, "LARGEST_PAGE", sizes[steps] + 40)
        assert make_page(v2, range(6)) == page and data_of(page)["steps"] == steps
    monkeypatch.setattr(explore, "LARGEST_PAGE", sizes[31] - 1000)
    with pytest.raises(UserError, match=r"a page of 6 images .* exceeds .*: give --images 5") as refusal:
        make_page(v2, range(6))
    assert "16 patches at 3 levels in 2 heads" in str(refusal.value)
    assert len(data_of(make_page(v2, range(5)))["images"]) == 5
    monkeypatch.setattr(explore, "LARGEST_PAGE", 1000)
    with pytest.raises(UserError, match=r"one image.*visualize_attention"):
        make_page(v2, range(6))


def test_numbers_that_are_not_finite(v2):
    with torch.no_grad():
        v2.model.encoder.fill_(float("nan"))
    assert not np.isfinite(look_inside(v2.model, v2.pixels(v2.samples([0]).images)).scores).all()
    with pytest.raises(UserError, match="NaN or infinite values on image 2"):
        make_page(v2, [2])


# ---------------------------------------------------------------------------- the script


def test_script(call_script, runs, data_dir, tmp_path, capsys):
    where = ("--run", runs["v2"], "--data-dir", data_dir, "--output-dir", tmp_path / "out", "--device", "cpu")
    assert call_script(SCRIPT, *where, "--images", 4) == 0
    path = tmp_path / "out" / "v2_seed0" / "explore.html"
    assert f"{path} (0.1 MB)" in capsys.readouterr().out
    assert [image["number"] for image in data_of(path.read_text())["images"]] == [0, 10, 20, 30]
    assert call_script(SCRIPT, *where, "--indices", 7, 3) == 0
    assert [image["number"] for image in data_of(path.read_text())["images"]] == [7, 3]
    before = path.read_bytes()
    capsys.readouterr()
    for flags, said in (
        (("--images", 0), "give --images 1 or more"),
        (("--indices", 40), "there is no test image 40: numbers go from 0 to 39"),
        (("--indices",), "no images chosen"),
    ):
        assert call_script(SCRIPT, *where, *flags) == 1
        check_error(capsys, said)
    assert path.read_bytes() == before


def test_a_model_of_pixels_is_refused(call_script, tmp_path, capsys):
    run = train_unet(tmp_path, img_size=(32, 48))
    capsys.readouterr()
    assert call_script(SCRIPT, "--run", run, "--data-dir", tmp_path, "--output-dir", tmp_path / "out") == 1
    check_error(capsys, "is a BDHUNet, which has no logits")
    assert not (tmp_path / "out").exists()
