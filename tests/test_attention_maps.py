"""Attention of a patch, computed: against whole matrices in numpy, in as little memory as promised."""

import numpy as np
import pytest
import torch

from training import UserError, fit
from interpretability.common import attention_maps as computation
from interpretability.common.attention_maps import attention_maps, look_at, shares
from interpretability.common.recorder import record
from interpretability.common.trained import TrainedRun
from models.baselines import ViTConfig
from models.vision_bdh import v2_config, v3_config
from tests.inspecting import BDH, VIT, train_unet, with_large_weights
from training.data import load_dataset

CONFIGS = {
    "v2": v2_config(**BDH),
    "v3": v3_config(**BDH),
    "softmax": v2_config(attention="softmax", **BDH),
    "class_token": v2_config(pool="cls", **BDH),
    "vit": ViTConfig(mlp_dim=32, **VIT),
}
GRID, PATCH, QUERY = (4, 4), (1, 3), 7


@pytest.fixture(params=CONFIGS)
def model(request):
    return with_large_weights(CONFIGS[request.param].build())


@pytest.fixture
def pixels():
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def all_scores(model, pixels):
    """(levels, H, T, T) float64, and the number of class tokens."""
    with torch.no_grad(), record(model, "scores") as trace:
        model(pixels)
    scores = [trace.scores(level)[0].double().numpy() for level in range(3)]
    return np.stack(scores), trace.adapter.class_tokens


def in_shares(scores):
    return abs(scores) / abs(scores).sum(-1, keepdims=True)


@pytest.mark.parametrize("show", ["scores", "shares"])
def test_maps_are_rows_of_the_scores(model, pixels, show):
    """Of the patch's query, to the patches; heads one by one, or their mean, taken after the shares."""
    scores, first = all_scores(model, pixels)
    rows = (in_shares(scores) if show == "shares" else scores)[:, :, first + QUERY, first:]  # (levels, H, patches)
    heads = attention_maps(model, pixels, PATCH, GRID, [2, 0], show, per_head=True)
    means = attention_maps(model, pixels, PATCH, GRID, [0, 2], show)
    assert list(heads) == list(means) == [0, 2]
    for level in (0, 2):
        expected = rows[level].reshape(2, 4, 4)
        close = dict(rtol=1e-4, atol=1e-5 * abs(expected).max())
        assert np.allclose(heads[level], expected, **close) and np.allclose(means[level], [expected.mean(0)], **close)
    if show == "shares":
        assert (heads[0].sum((1, 2)) < 0.999).all() if first else np.allclose(heads[0].sum((1, 2)), 1, atol=1e-5)


def test_no_rollout_over_levels_alone_where_blocks_have_mixed_tokens_before(pixels):
    model = v2_config(**BDH, blocks_before=1, blocks_after=1).build().eval()
    with pytest.raises(UserError, match="blocks_before"):
        attention_maps(model, pixels, PATCH, GRID, [0], "rollout")
    assert attention_maps(model, pixels, PATCH, GRID, [0], "shares")[0].sum() == pytest.approx(1, abs=1e-5)


def test_shares_count_heads_alike():
    """Whatever the scale and the signs of a head; a head without scores has none; weights are shares already."""
    scores = torch.tensor([[1.0, -3.0, 0.0, 4.0], [200.0, 0.0, -200.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.125, 0.375, 0.0, 0.5], [0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(shares(scores), expected) and torch.equal(shares(expected), expected)
    assert torch.allclose(shares(scores * torch.tensor([[-1e6], [1e-6], [1.0]])), expected)


@pytest.mark.parametrize("at_once", [2**24, 2 * 17 * 3, 1])
def test_rollout(model, pixels, at_once, monkeypatch):
    """Against the product of whole matrices; in blocks of all queries, of 3, and of 1."""
    monkeypatch.setattr(computation, "SCORES_AT_ONCE", at_once)
    scores, first = all_scores(model, pixels)
    n_tokens = first + 16
    product, expected = np.eye(n_tokens), []
    for level in range(3):
        product = (0.5 * in_shares(scores[level]).mean(0) + 0.5 * np.eye(n_tokens)) @ product
        expected.append(product[first + QUERY])
    maps = attention_maps(model, pixels, PATCH, GRID, [2, 1], "rollout")
    assert list(maps) == [1, 2]
    for level, values in maps.items():
        assert values.shape == (1, 4, 4)
        assert np.allclose(values.flatten(), expected[level][first:], atol=1e-6)


def test_a_head_without_scores_leaves_the_token_what_it_has(pixels):
    """So that rows of the rollout still sum to 1."""
    torch.manual_seed(3)
    model = v2_config(**BDH).build().eval()
    with torch.no_grad():
        model.encoder[0] = 0
    maps = attention_maps(model, pixels, PATCH, GRID, [0], "rollout")
    heads = attention_maps(model, pixels, PATCH, GRID, [0], "shares", per_head=True)
    assert not heads[0][0].any() and float(heads[0][1].sum()) == pytest.approx(1)
    expected = heads[0][1] / 4  # half of the mean over two heads
    expected[PATCH] += 0.75
    assert torch.allclose(maps[0][0], expected, atol=1e-6)


@pytest.mark.parametrize("show", ["scores", "shares", "rollout"])
def test_memory_never_holds_the_scores_of_a_level(pixels, monkeypatch, show):
    model = v2_config(**BDH).build().eval()
    shapes, weights = [], model.attn.weights
    monkeypatch.setattr(model.attn, "weights", lambda q, k, first: shapes.append(q.shape) or weights(q, k, first))
    monkeypatch.setattr(computation, "SCORES_AT_ONCE", 2 * 16 * 5)
    attention_maps(model, pixels, PATCH, GRID, range(3), show)
    queries = [shape[2] for shape in shapes]
    assert queries == ([1, 5, 5, 5, 1, 1, 5, 5, 5, 1, 1] if show == "rollout" else [1, 1, 1])


# ---------------------------------------------------------------------------- what a run takes an image for


def test_the_class_of_an_image(experiment, data_dir):
    trial = experiment(epochs=1)
    fit(trial)
    run, data = TrainedRun(trial.folder, data_dir, "cpu"), load_dataset("cifar10", data_dir)
    with torch.no_grad():
        logits = run.model(torch.from_numpy(data.test_images[[9]]).float() / 127.5 - 1)
    seen = look_at(run, 9, PATCH, [0], "scores", per_head=False)
    assert np.array_equal(seen.image.numpy(), data.test_images[9])
    assert seen.truth == data.class_names[data.test_labels[9]]
    assert seen.predicted == data.class_names[int(logits.argmax())]
    assert seen.certainty == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)


def test_the_class_of_an_image_is_what_the_runs_views_say(experiment, data_dir):
    """As the test counted it, with the mirror image; the maps are those of the image."""
    trial = experiment(epochs=1, eval_flip=True)
    fit(trial)
    run = TrainedRun(trial.folder, data_dir, "cpu")
    pixels = run.pixels(run.samples([9]).images)
    with torch.no_grad():
        probabilities = ((run.model(pixels) + run.model(pixels.flip(-1))) / 2).softmax(-1)[0]
    seen = look_at(run, 9, PATCH, [0], "scores", per_head=False)
    assert seen.certainty == pytest.approx(float(probabilities.max()), abs=1e-6)
    assert torch.equal(seen.maps[0], attention_maps(run.model, pixels, PATCH, run.grid, [0])[0])
    assert run.views_note


def test_the_class_of_a_patch(tmp_path):
    """Of most of its pixels, in the mask and in the prediction; void, too."""
    run = TrainedRun(train_unet(tmp_path, n_layer=2), tmp_path, "cpu")  # 4 x 5 patches
    logits = torch.randn(1, 11, 32, 40, generator=torch.Generator().manual_seed(0))
    run.model.register_forward_hook(lambda *_: logits)  # after one epoch it says one class everywhere
    names, patches = [*run.class_names, "void"], [(row, column) for row in range(4) for column in range(5)]
    seen = {}
    for index in range(2):
        labels = run.samples([index]).labels[0]
        for patch in patches:
            at = tuple(slice(8 * first, 8 * first + 8) for first in patch)
            true, predicted = (np.bincount(of[at].ravel(), minlength=12) for of in (labels, logits[0].argmax(0)))
            each = look_at(run, index, patch, [0], "scores", per_head=False)
            assert each.truth == names[true.argmax()] and each.predicted == names[predicted.argmax()]
            assert each.certainty == pytest.approx(predicted.max() / 64)
            seen[index, patch] = each
    assert "void" in {each.truth for each in seen.values()}
    assert len({each.predicted for each in seen.values()}) > 1
