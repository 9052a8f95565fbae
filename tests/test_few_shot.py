"""few_shot.py: episodes, accuracies held to SciPy's distances, planted features, the script on runs."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import t

from training import UserError, fit
from interpretability import few_shot
from interpretability.common.features import head_input
from interpretability.common.trained import TrainedRun
from interpretability.few_shot import (
    PIXELS,
    TRAINED,
    UNTRAINED,
    Options,
    centred,
    draw_episodes,
    episode_accuracies,
    markdown,
    tabulate,
)
from models.baselines import MobileNetV2Config, ResNet20Config, ViTConfig
from models.bdh_unet import bdh_unet_config
from models.masked_bdh import MaskedBDHConfig
from models.vision_bdh import v1_config, v2_config, v4_config
from tests.inspecting import BDH, VIT, check_error, train_masked, with_large_weights
from tests.photos import write_photos
from tests.pictures import check_picture
from training.runs import load_model

SCRIPT = "interpretability/few_shot.py"

# ---------------------------------------------------------------------------- episodes


def test_episodes_have_distinct_classes_and_images_and_use_all_alike():
    rng = np.random.default_rng()
    labels = rng.permutation(np.repeat([3, 5, 6, 9], [12, 12, 20, 12]))
    drawn = draw_episodes(labels, 3, 8, 2000, seed=4)
    assert drawn.shape == (2000, 3, 8)
    assert (np.diff(np.sort(drawn.reshape(2000, -1)), axis=1) > 0).all()  # no image twice
    classes = labels[drawn]
    assert (classes == classes[:, :, :1]).all() and (np.diff(np.sort(classes[:, :, 0]), axis=1) > 0).all()
    for place in range(3):  # each of 4 classes equally often, within 5 standard deviations
        counts = np.unique(classes[:, place, 0], return_counts=True)[1]
        assert (abs(counts - 500) < 5 * np.sqrt(2000 * 0.25 * 0.75)).all()
    of_class = np.bincount(drawn[..., 0][classes[..., 0] == 6], minlength=len(labels))[labels == 6]  # first images
    assert (abs(of_class - 1500 / 20) < 5 * np.sqrt(1500 / 20)).all()
    assert np.array_equal(drawn, draw_episodes(labels, 3, 8, 2000, seed=4))
    assert not np.array_equal(drawn, draw_episodes(labels, 3, 8, 2000, seed=5))


def test_too_few_classes_or_images():
    labels = np.array([0, 0, 0, 1, 1, 1, 1])
    with pytest.raises(UserError, match="--way 3 is more than the 2 classes"):
        draw_episodes(labels, 3, 2, 5, 0)
    with pytest.raises(UserError, match=r"a class has 3 images, and an episode needs 4"):
        draw_episodes(labels, 2, 4, 5, 0)


# ---------------------------------------------------------------------------- accuracies


@pytest.mark.parametrize("shots", [1, 3])
@pytest.mark.parametrize("at_once", [2**23, 100, 1])
def test_accuracies_are_those_of_nearest_centroids(shots, at_once, monkeypatch):
    """SciPy's distances, episode by episode, on features far from 0; in one block, in several, one by one."""
    monkeypatch.setattr(few_shot, "NUMBERS_AT_ONCE", at_once)
    rng = np.random.default_rng()
    labels = np.repeat(np.arange(6), 12)
    features = (1000 + rng.normal(size=(72, 5)) + 2 * np.eye(6, 5)[labels]).astype(np.float32)
    drawn = draw_episodes(labels, 4, 9, 7, 1)
    found = episode_accuracies(torch.from_numpy(features), drawn, shots, 5)
    for episode, accuracy in zip(drawn, found, strict=True):
        means = [features[known].astype(float).mean(0) for known in episode[:, :shots]]
        answers = cdist(features[episode[:, -5:].ravel()], means).argmin(1)
        assert accuracy == pytest.approx((answers == np.repeat(np.arange(4), 5)).mean())
    assert 0.3 < found.mean() < 1


def test_planted_classes_are_found_and_shuffled_ones_are_not():
    rng = np.random.default_rng()
    labels = np.repeat(np.arange(8), 30)
    features = torch.from_numpy(10 * np.eye(8)[labels] + 0.1 * rng.normal(size=(240, 8)))
    apart = draw_episodes(labels, 5, 20, 200, 0)
    shuffled = draw_episodes(rng.permutation(labels), 5, 20, 200, 0)
    for version in (features, centred(features, features[::3])):
        for shots in (1, 5):
            assert (episode_accuracies(version, apart, shots, 15) == 1).all()
            assert abs(episode_accuracies(version, shuffled, shots, 15).mean() - 0.2) < 0.03
    assert (episode_accuracies(torch.full((240, 8), 0.1), apart, 1, 15) == 0.2).all()  # all the same: chance


def test_centring_uses_the_known_images_and_makes_lengths_1():
    rng = np.random.default_rng()
    new, base = rng.normal(3, 1, (20, 4)), rng.normal(1, 1, (30, 4))
    expected = new - base.mean(0)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.allclose(centred(torch.from_numpy(new), torch.from_numpy(base)), expected)


def test_table_pairs_by_episode():
    rng = np.random.default_rng()
    options = Options(shots=(1,), episodes=50)
    sources = [(PIXELS, ""), ("a", TRAINED), ("a", UNTRAINED), ("b", TRAINED), ("b", UNTRAINED)]
    values = dict(zip(sources, rng.random((5, 50)), strict=True))
    results = {source: {("nearest_mean", 1): each, ("centred", 1): each**2} for source, each in values.items()}
    table = tabulate(results, options)
    rows = table[table.method == "nearest_mean"].set_index(["features", "weights"])

    def check(row, name, expected):
        half = t.ppf(0.975, 49) * expected.std(ddof=1) / np.sqrt(50)
        found = row[[name, f"{name}_low", f"{name}_high"]].to_numpy(dtype=float)
        assert np.allclose(found, [expected.mean(), expected.mean() - half, expected.mean() + half])

    for source, each in values.items():
        check(rows.loc[source], "accuracy", each)
    b = values["b", TRAINED]
    check(rows.loc["b", TRAINED], "over_pixels", b - values[PIXELS, ""])
    check(rows.loc["b", TRAINED], "over_untrained", b - values["b", UNTRAINED])
    check(rows.loc["b", TRAINED], "over_first_run", b - values["a", TRAINED])
    assert np.isnan(rows.over_first_run["a", TRAINED]) and np.isnan(rows.over_pixels[PIXELS, ""])
    assert rows.over_untrained.notna().sum() == 2
    text = "\n".join(markdown(table, "t"))
    difference = 100 * (b - values["a", TRAINED])
    assert f"| {difference.mean():+.2f} ± {t.ppf(0.975, 49) * difference.std(ddof=1) / np.sqrt(50):.2f} |" in text


# ---------------------------------------------------------------------------- features


@torch.no_grad()
def test_features_are_what_the_head_reads():
    images = torch.randn(3, 3, 8, 8)
    for config in (v1_config(**BDH), v2_config(pool="cls", **BDH), v4_config(pool="seq", **BDH)):
        model = with_large_weights(config.build())
        assert torch.equal(head_input(model, images), model.features(images))
    for config, path in (
        (ViTConfig(mlp_dim=32, **VIT), "heads"),
        (ResNet20Config(img_size=8), "head"),
        (MobileNetV2Config(setting="fitted"), "classifier"),
    ):
        model = config.build().eval()
        images = torch.randn(2, 3, config.img_size, config.img_size)
        found = head_input(model, images)
        setattr(model, path, torch.nn.Identity())
        assert torch.equal(found, model(images)) and not any(m._forward_hooks for m in model.modules())
    masked = with_large_weights(MaskedBDHConfig(**BDH).build())
    images = torch.randn(3, 3, 8, 8)
    classifier = v1_config(residual=masked.config.residual, **BDH).build().eval()
    encoder = {name: value for name, value in masked.state_dict().items() if not name.startswith("head")}
    classifier.load_state_dict(encoder, strict=False)
    assert torch.allclose(head_input(masked, images), classifier.features(images), atol=1e-5)
    unet = bdh_unet_config(**BDH | dict(patch_size=4)).build().eval()
    with pytest.raises(TypeError, match="does not end in a linear layer"):
        head_input(unet, images)


# ---------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory, experiment_in):
    """Folders of a v2 and of a ResNet-20, trained on the made-up CIFAR-10."""
    folder = tmp_path_factory.mktemp("runs")
    trial = experiment_in(folder, "bdh", epochs=1)
    trials = [trial, dataclasses.replace(trial, name="resnet", model=ResNet20Config())]
    for each in trials:
        fit(each)
    return [each.folder for each in trials]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 3 classes of 6 photographs, whose colours differ."""
    return write_photos(tmp_path_factory.mktemp("photos") / "birds", 6)


def test_untrained_model_has_the_first_weights_of_the_runs_seed(experiment):
    trial = experiment("other seed", epochs=1, seed=1, options=dict(keep_every=1))
    fit(trial)
    run, first = TrainedRun(trial.folder), load_model(trial.folder / "epoch_000.pt")[0].state_dict()
    state = torch.get_rng_state()
    found = run.untrained_model().state_dict()
    assert torch.equal(state, torch.get_rng_state()) and found.keys() == first.keys()
    assert all(torch.equal(value, first[name]) for name, value in found.items())


def test_the_mean_that_is_subtracted_is_of_training_images(runs, photos, data_dir, monkeypatch):
    bases, measure = [], few_shot.measure
    monkeypatch.setattr(few_shot, "measure", lambda new, base, *rest: bases.append(base) or measure(new, base, *rest))
    run = TrainedRun(runs[0], data_dir)
    options = Options(dataset=str(photos), way=3, queries=2, shots=(1,), episodes=2, untrained=False)
    few_shot.measure_all({"bdh": run}, options)
    seen = [images.flatten(1) for images, _ in run.training_batches(run.choose_training_images(2000))]
    assert torch.equal(bases[0], torch.cat(seen))


def test_script(runs, photos, experiment, call_script, data_dir, tmp_path, capsys):
    """Three kinds of models in one table, on the same episodes: the photographs' colours are easy for raw pixels."""
    runs = [*runs, train_masked(experiment)]
    flags = ["--data-dir", data_dir, "--dataset", photos, "--way", 3, "--queries", 2, "--shots", 1, 4]
    flags += ["--episodes", 20, "--output-dir", "out"]
    capsys.readouterr()
    assert call_script(SCRIPT, "--run", *runs, *flags) == 0
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name == "bdh_seed0_versus_resnet_seed0_versus_masked_seed0"
    name = "few_shot_birds_way=3_shots=1,4_queries=2_episodes=20"
    assert {path.name for path in folder.iterdir()} == {f"{name}.{end}" for end in ("csv", "md", "png", "svg")}
    check_picture(folder / f"{name}.png")
    table = pd.read_csv(folder / f"{name}.csv", keep_default_na=False, na_values=[""], dtype={"weights": str})
    table["weights"] = table["weights"].fillna("")
    both = [(who, weights) for who in ("bdh", "resnet", "masked") for weights in (TRAINED, UNTRAINED)]
    sources = table.drop_duplicates(["features", "weights"])[["features", "weights"]].itertuples(index=False)
    assert [tuple(each) for each in sources] == [(PIXELS, ""), *both]
    assert len(table) == 7 * 4 and table.accuracy.between(0, 1).all()
    pixels = table[(table.features == PIXELS) & (table.method == "nearest_mean")].set_index("shots").accuracy
    assert pixels[4] > 0.9
    assert (folder / f"{name}.md").read_text(encoding="utf-8").rstrip("\n") in capsys.readouterr().out
    alone = ["--run", runs[1], *flags, "--no-untrained", "--names", "one"]
    assert call_script(SCRIPT, *alone) == 0
    (single,) = (tmp_path / "out" / "resnet_seed0").glob("*.csv")
    single = pd.read_csv(single).set_index(["features", "method", "shots"]).accuracy
    table = table[table.weights != UNTRAINED].set_index(["features", "method", "shots"]).accuracy
    assert set(single.index.get_level_values(0)) == {PIXELS, "one"}
    for method, shots in (("nearest_mean", 1), ("centred", 4)):
        assert single["one", method, shots] == pytest.approx(table["resnet", method, shots])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dataset", "cifar10"], "was trained on the class class 0 and 9 more of cifar10"),
        (["--dataset", "digits"], "digits has images of 1 x 8 x 8, and .* reads 3 x 32 x 32"),
        (["--dataset", "birbs"], "--dataset birbs is neither a data set nor a folder"),
        (["--names", "a", "b"], "2 --names for 1 run: give one name per run"),
        (["--run", "none"], "none does not exist"),
        ([], "a class has 6 images, and an episode needs 20"),
    ],
)
def test_bad_input(runs, photos, call_script, data_dir, tmp_path, capsys, flags, message):
    where = [] if "--run" in flags else ["--run", runs[0]]
    what = [] if "--dataset" in flags else ["--dataset", photos, "--way", 3]
    assert call_script(SCRIPT, *where, "--data-dir", data_dir, "--output-dir", "out", *what, *flags) == 1
    check_error(capsys, message)
    assert not (tmp_path / "out").exists()


def test_new_data_are_not_looked_for_among_the_runs_own_images(experiment, data_dir, tmp_path, monkeypatch):
    """--data-dir is the folder of its images, in which each folder is a class."""
    own = write_photos(tmp_path / "own", 6)
    trial = experiment("own", model=dict(num_classes=3), dataset="folder", options=dict(data_dir=own))
    fit(trial)
    monkeypatch.setenv("VISION_BDH_DATA", str(data_dir))
    assert few_shot.new_classes(TrainedRun(trial.folder, own), "cifar100", own).name == "cifar100"
    same = write_photos(tmp_path / "same", 6, classes=("N02", "n04"))
    with pytest.raises(UserError, match="trained on the class N02 of"):
        few_shot.new_classes(TrainedRun(trial.folder, own), str(same), own)


def test_runs_of_one_name(runs, photos, call_script, data_dir, capsys):
    assert call_script(SCRIPT, "--run", runs[0], runs[0], "--data-dir", data_dir, "--dataset", photos) == 1
    check_error(capsys, "2 runs are called bdh: tell them apart with --names")


@pytest.mark.parametrize("flags", [["--way", 1], ["--shots", 0, 5], ["--queries", 0], ["--episodes", 1]])
def test_wrong_flags(call_script, capsys, flags):
    assert call_script(SCRIPT, *flags) == 2
    assert "must be" in capsys.readouterr().err
