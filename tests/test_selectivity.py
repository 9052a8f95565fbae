"""How selective neurons are: measures against plain formulas, the null against theory, collection against loops."""

import numpy as np
import pytest
import torch
from scipy.stats import hypergeom
from sklearn.metrics import roc_auc_score

from interpretability.common.activity import NO_CLASS
from interpretability.common.selectivity import Responses, Top, collect, measures, p_values, ranked, shuffled
from tests.planted_neurons import batches, random_model, recorded


def made_up(means, labels, top_units=None):
    """Responses at one level. means: (U, M); top_units: (K, M), default: none kept."""
    M = means.shape[1]
    units = np.zeros((1, M), int) if top_units is None else top_units
    top = Top(np.full(units.shape, 0.0 if top_units is None else 1.0, np.float32), units, np.zeros_like(units))
    return Responses(1, np.arange(len(means)), labels, [means.astype(np.float32)], [np.ones(M)], [top])


def null_of(means, labels, n_shuffles):
    of = ranked(made_up(means, labels), 0)
    return measures(of, labels), shuffled(of, labels, n_shuffles, np.random.default_rng(8))


# ---------------------------------------------------------------------------- measures


def test_measures_against_plain_formulas():
    """Classes of several sizes, one without an image; activities with many equals."""
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.repeat([0, 2, 3, 7], [5, 9, 20, 6]))
    means = np.maximum(rng.integers(-6, 9, (40, 50)), 0) * 0.25
    means[:, :10] += 3 * (labels[:, None] == 2)  # some that do tell a class from the rest
    top_units = np.stack([rng.permutation(40)[:6] for _ in range(50)], axis=1)
    of = measures(ranked(made_up(means, labels, top_units), 0), labels)
    for neuron in range(50):
        by_class = {label: means[labels == label, neuron].mean() for label in (0, 2, 3, 7)}
        best = max(by_class, key=by_class.get)
        rest = np.mean([mean for label, mean in by_class.items() if label != best])
        assert of.best[neuron] == best
        assert of.index[neuron] == pytest.approx((by_class[best] - rest) / (by_class[best] + rest), abs=1e-6)
        assert of.auroc[neuron] == pytest.approx(roc_auc_score(labels == best, means[:, neuron]), abs=1e-6)
        assert of.precision[neuron] == pytest.approx(np.mean(labels[top_units[:, neuron]] == best))
    assert set(of.best) == {0, 2, 3, 7} and (of.best[:10] == 2).all() and of.auroc[:10].min() > 0.95


def test_neurons_that_tell_nothing():
    """Equally active for all classes: 0 and 0.5; never active: none."""
    of = measures(ranked(made_up(np.array([[0.7, 0.0]] * 12), np.arange(12) % 4), 0), np.arange(12) % 4)
    assert of.index[0] == pytest.approx(0, abs=1e-6) and of.auroc[0] == 0.5
    assert np.isnan([of.index[1], of.auroc[1], of.precision[1]]).all()


# ---------------------------------------------------------------------------- the null


def test_shuffled_index_is_hypergeometric():
    """Active on m of U images, two classes of as many: the index is |2 K - m| / m, K of them drawn into one class."""
    U, m = 40, 9
    means = (np.arange(U) < m)[:, None] * np.ones((1, 1))
    _, null = null_of(means, np.arange(U) % 2, n_shuffles=4000)
    k = np.arange(m + 1)
    chances, values = hypergeom.pmf(k, U, m, U // 2), np.abs(2 * k - m) / m
    for value in np.unique(values):
        expected = chances[np.isclose(values, value)].sum()
        found = np.isclose(null.index[:, 0], value, atol=1e-5).mean()
        assert abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000) + 1e-4


def test_chance_beats_chance_as_often_as_it_should():
    """Neurons that know nothing of the class: their p is at most 0.1 in a tenth of them."""
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 5, 100)
    means = rng.exponential(size=(100, 3000)) * (rng.random((100, 3000)) < 0.5)
    of, null = null_of(means, labels, n_shuffles=99)
    for name in ("index", "auroc"):
        p = p_values(getattr(of, name), getattr(null, name))
        for level in (0.02, 0.1, 0.5):
            assert abs((p <= level).mean() - level) < 4 * np.sqrt(level * (1 - level) / 3000) + 0.003


def test_a_neuron_active_once_beats_nothing():
    """Its index is 1, and so it is whatever the labels; one that tells a class apart beats every shuffle."""
    labels = np.arange(50) % 5
    means = np.zeros((50, 3))
    means[17, 0] = 2.0
    means[labels == 3, 1] = 1.0
    of, null = null_of(means, labels, n_shuffles=199)
    assert of.index[0] == 1 and p_values(of.index, null.index)[0] == 1
    assert p_values(of.index, null.index)[1] == p_values(of.auroc, null.auroc)[1] == 1 / 200
    assert np.isnan(p_values(of.index, null.index)[2]) and np.isnan(null.index[:, 2]).all()


def test_p_values_count_the_value_itself():
    null = np.array([[0.1, 0.5], [0.2, 0.5], [0.3, 0.5], [0.4, 0.5]])
    assert p_values(np.array([0.25, 0.5]), null).tolist() == [3 / 5, 1.0]
    assert p_values(np.array([0.45, 0.6]), null).tolist() == [1 / 5, 1 / 5]


# ---------------------------------------------------------------------------- collecting


@pytest.mark.parametrize("quantity", ["x_sparse", "y_sparse", "gated"])
@pytest.mark.parametrize("changed", [{}, dict(pool="cls"), dict(activation="gelu")], ids=str)
def test_responses_are_those_of_plain_loops(quantity, changed):
    """Mean over an image's patches, share of patches, strongest patches of different images; over any batches."""
    model, k = random_model(**changed), 3
    images, labels = torch.randn(7, 3, 8, 8), np.random.default_rng(3).integers(0, 4, 7)
    found = collect(model, batches(images, labels, size=3), quantity, k)
    assert np.array_equal(found.labels, labels) and np.array_equal(found.images, np.arange(7)) and found.n_heads == 2
    for level, values in enumerate(np.maximum(recorded(model, images)[quantity], 0)):  # (B, H, T, N)
        assert np.allclose(found.means[level], values.mean(2).reshape(7, 64), atol=1e-5)
        assert np.allclose(found.active[level], (values > 0).mean((0, 2)).ravel())
        for head in range(2):
            for neuron in range(32):
                peaks = sorted(((values[image, head, :, neuron].max(), -image) for image in range(7)), reverse=True)[:k]
                column = head * 32 + neuron
                assert np.allclose(found.top[level].values[:, column], [value for value, _ in peaks], atol=1e-5)
                for value, unit, patch in zip(*(each[:, column] for each in found.top[level]), strict=True):
                    assert values[unit, head, patch, neuron] == pytest.approx(value, abs=1e-5)
                assert len(set(found.top[level].units[:, column])) == k


def test_segments_are_units():
    """All patches of a class in an image; those without a class are in none, but count where shares are counted."""
    model, rng = random_model(unet=True), np.random.default_rng(3)
    images = torch.randn(4, 3, 8, 8)
    classes = rng.choice([NO_CLASS, 0, 2], (4, 16))
    classes[2] = NO_CLASS
    found = collect(model, batches(images, torch.from_numpy(classes), size=3), "gated", k=20)
    expected = [(image, label) for image in (0, 1, 3) for label in (0, 2)]
    assert list(zip(found.images, found.labels, strict=True)) == expected
    values = recorded(model, images)["gated"][1]  # (B, H, T, N)
    assert np.allclose(found.active[1], (values > 0).mean((0, 2)).ravel())
    for unit, (image, label) in enumerate(expected):
        of = values[image][:, classes[image] == label]  # (H, T', N)
        assert np.allclose(found.means[1][unit], of.mean(1).ravel(), atol=1e-5)
        place = found.top[1].units == unit  # all units are kept
        assert (place.sum(0) == 1).all()
        assert np.allclose(found.top[1].values.T[place.T], of.max(1).ravel(), atol=1e-5)
        assert set(found.top[1].patches[place]) <= set(np.flatnonzero(classes[image] == label))
