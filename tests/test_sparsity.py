"""Counts of active neurons, what is made of them, and the script."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
import torch

from training import fit
from interpretability.common.activity import NO_CLASS, levels_of, patch_classes
from interpretability.common.trained import TrainedRun
from interpretability.sparsity import (
    Counts,
    count,
    dead_table,
    draw_neurons,
    draw_shares,
    neuron_table,
    over_training,
    share_table,
    training_table,
)
from models.baselines import ViTConfig
from models.masked_bdh import MaskedBDHConfig
from tests.inspecting import BDH, check_error, train_unet
from tests.pictures import check_picture
from tests.planted_neurons import batches, random_model, recorded
from training.runs import load_model

SCRIPT = "interpretability/sparsity.py"

# ---------------------------------------------------------------------------- counting


def test_a_pretraining_model_sees_whole_images():
    """Not its mask token, which would excite the same neurons in every image."""
    torch.manual_seed(0)
    model = MaskedBDHConfig(rotary="none", **BDH).build().eval()
    images = torch.randn(3, 3, 8, 8)
    for level in levels_of(model, [(images, torch.zeros(3, 16, dtype=torch.long))]):
        x_sparse = level.activity.x_sparse  # (B, H, T, N)
        assert x_sparse.shape == (3, 2, 16, 32)
        assert (x_sparse[0] != x_sparse[1]).any(-1).any(0).all()  # of every patch


@pytest.mark.parametrize(
    "changed", [{}, dict(pool="cls"), dict(activation="gelu", gate="sigmoid"), dict(unet=True)], ids=str
)
def test_counts_are_those_of_plain_loops(changed):
    """Patches without a class count but for the classes; a class token counts nowhere; batches are of no matter."""
    model, rng = random_model(**changed), np.random.default_rng(4)
    images = torch.randn(5, 3, 8, 8)
    classes = torch.from_numpy(rng.choice([NO_CLASS, 0, 1, 3], (5, 16)))
    counts = count(model, batches(images, classes, size=2), n_classes=4)
    by_neuron, by_class = np.zeros((3, 3, 2, 32), int), np.zeros((3, 3, 2, 4), int)
    for quantity, values in enumerate(recorded(model, images).values()):
        for (level, image, head, patch, neuron), value in np.ndenumerate(values):
            if value > 0:
                by_neuron[level, quantity, head, neuron] += 1
                if classes[image, patch] != NO_CLASS:
                    by_class[level, quantity, head, classes[image, patch]] += 1
    assert np.array_equal(counts.by_neuron, by_neuron) and by_neuron.max() > 10
    assert np.array_equal(counts.by_class, by_class)
    assert counts.patches == 80 and counts.patches_by_class.tolist() == [int((classes == c).sum()) for c in range(4)]
    assert np.array_equal(count(model, batches(images, classes, size=5), 4).by_class, by_class)


def test_tables_against_means():
    model, rng = random_model(), np.random.default_rng(5)
    images, labels = torch.randn(6, 3, 8, 8), rng.permutation([0, 0, 0, 1, 1, 3])
    counts = count(model, batches(images, labels, size=4), n_classes=4)
    table = share_table(counts, names := ["all", "b", "never seen", "d"])
    assert list(table) == ["level", "head", "class", "quantity", "share"]
    assert len(table) == 3 * 3 * (2 + 1) * (3 + 1) and "never seen" not in set(table["class"])
    active = {name: values > 0 for name, values in recorded(model, images).items()}  # (L, B, H, T, N) each
    for row in table.itertuples():
        of = active[row.quantity][row.level - 1]
        if row.head != "all":
            of = of[:, [row.head - 1]]
        if row._3 != "all classes":
            of = of[labels == names.index(row._3)]
        assert row.share == pytest.approx(of.mean(), abs=1e-12)
    neurons = neuron_table(counts)
    place = neurons[(neurons.level == 2) & (neurons["head"] == 2) & (neurons.neuron == 7)]
    for name, of in active.items():
        assert place[name].item() == pytest.approx(of[1, :, 1, :, 7].mean())
    assert len(neurons) == 3 * 2 * 32


def test_dead_at_every_level():
    """Over all levels only what is dead at each of them; not asked where levels have neurons of their own; as bars."""
    by_neuron = np.array([[10, 0, 0, 10], [10, 7, 0, 0]])[:, None, None].repeat(3, 1)  # (L, Q, H, N), of 10 patches
    counts = Counts(by_neuron, by_neuron.sum(-1, keepdims=True), np.array([10]), 10)
    table = dead_table(counts, 0.99, shared=True)
    gated = table[table.quantity == "gated"]
    assert gated.level.tolist() == [1, 2, "all"] and gated.dead.tolist() == [2, 2, 1]
    assert gated.always_on.tolist() == [2, 1, 1] and gated.share.tolist() == pytest.approx([0.5, 0.425, 0.4625])
    assert dead_table(counts, 0.7, shared=False).query("quantity == 'gated'").always_on.tolist() == [2, 2]
    table = dead_table(counts, 0.99, shared=False)
    assert table.level.unique().tolist() == [1, 2]
    bars = draw_neurons(counts, table, 0.99, "title").subfigs[1].axes[0].containers
    heights = {each.get_label(): [bar.get_height() for bar in each] for each in bars}
    assert heights == {"dead": [50, 50], "always on": [50, 25]}


def test_classes_of_patches():
    """Most pixels decide, of as many the lower label, and void is no class."""
    rng = np.random.default_rng(6)
    labels = rng.integers(0, 4, (3, 6, 12))  # 3 is void
    classes = patch_classes(torch.from_numpy(labels), (2, 4), n_classes=3)
    assert classes.shape == (3, 8)
    for (image, patch), found in np.ndenumerate(classes.numpy()):
        row, column = divmod(patch, 4)
        votes = np.bincount(labels[image, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3].ravel(), minlength=4)
        assert found == (NO_CLASS if votes.argmax() == 3 else votes.argmax())
    assert NO_CLASS in classes
    assert torch.equal(patch_classes(torch.tensor([2, 0]), (2, 4), 3), torch.tensor([[2] * 8, [0] * 8]))


def test_many_classes_are_drawn_in_part():
    """Names with dollars, which are formulas to matplotlib, as they are."""
    names = [f"$class {number:02d}$" for number in range(30)]
    rows = [
        dict(level=level, head=head, quantity=quantity, share=(place * 7 % 30) / 100) | {"class": name}
        for level in (1, 2)
        for head in (1, "all")
        for quantity in ("x_sparse", "y_sparse", "gated")
        for place, name in enumerate([*names, "all classes"])
    ]
    figure = draw_shares(pd.DataFrame(rows), r"run $\frac$")
    figure.draw_without_rendering()
    heat = [ax for ax in figure.subfigs[1].axes if ax.images]
    shown = [label.get_text().replace(r"\$", "$") for label in heat[0].get_yticklabels()]
    falling = sorted(names, key=lambda name: -(int(name[-3:-1]) * 7 % 30))
    assert shown == falling[:10] + falling[-10:]
    assert np.allclose(heat[2].images[0].get_array()[:, 0], [int(name[-3:-1]) * 7 % 30 for name in shown])


# ---------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def run(experiment_in, tmp_path_factory):
    """Folder of a tiny run of two epochs, with the weights before and after each."""
    trial = experiment_in(tmp_path_factory.mktemp("work"), model=dict(n_layer=2), options=dict(keep_every=1))
    fit(trial)
    return trial.folder


def test_script(run, data_dir, call_script, tmp_path, capsys):
    flags = ("--run", run, "--data-dir", data_dir, "--output-dir", "out", "--device", "cpu")
    assert call_script(SCRIPT, *flags, "--checkpoint-images", 9) == 0
    said = capsys.readouterr().out
    assert "40 test images of 16 patches" in said and "3 epochs kept in training" in said and "GELU" not in said
    output = tmp_path / "out" / "trial_seed0"
    for name in ("sparsity", "sparsity_neurons", "sparsity_training"):
        check_picture(output / f"{name}.png")
    opened = TrainedRun(run, data_dir, "cpu")
    pixels, labels = next(opened.batches(range(40)))
    active = recorded(opened.model, pixels)["gated"] > 0  # (L, B, H, T, N)
    table = pd.read_csv(output / "sparsity.csv")
    row = table[
        (table.level == 2) & (table["head"] == "2") & (table["class"] == "class 3") & (table.quantity == "gated")
    ]
    assert row.share.item() == pytest.approx(active[1, labels == 3, 1].mean())
    dead = pd.read_csv(output / "sparsity_dead.csv")
    assert dead[(dead.level == "2") & (dead.quantity == "gated")].dead.item() == (~active[1].any((0, 2))).sum()

    series = pd.read_csv(output / "sparsity_training.csv")
    assert list(series) == ["epoch", "level", "quantity", "neurons", "dead", "always_on", "share"]
    assert series.epoch.drop_duplicates().tolist() == [0, 1, 2] and series.epoch.is_monotonic_increasing
    for epoch in range(3):
        model, _ = load_model(run / f"epoch_{epoch:03d}.pt")
        expected = recorded(model, pixels[[k * 40 // 9 for k in range(9)]])["x_sparse"][0] > 0
        of = series[(series.epoch == epoch) & (series.level == "1") & (series.quantity == "x_sparse")]
        assert of.share.item() == pytest.approx(expected.mean())
        assert of.dead.item() == (~expected.any((0, 2))).sum()

    assert call_script(SCRIPT, *flags[2:], "--run", run / "epoch_000.pt", "--images", 3, "--checkpoint-images", 0) == 0
    assert "trial, seed 0, epoch_000: 3 test images" in capsys.readouterr().out
    other = pd.read_csv(output / "sparsity_epoch_000.csv")
    assert len(other) < len(table) and len(pd.read_csv(output / "sparsity.csv")) == len(table)


def test_series_is_in_order_of_epochs_and_without_the_damaged(run, data_dir, tmp_path, capsys):
    """Of ten and two, two comes first; a file that cannot be read is said and left out."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("config.json", "best.pt", "split.npz"):
        (folder / name).write_bytes((run / name).read_bytes())
    for epoch in (10, 2, 1000, 7):
        (folder / f"epoch_{epoch:03d}.pt").write_bytes((run / "epoch_001.pt").read_bytes())
    (folder / "epoch_007.pt").write_bytes(b"no weights")
    epochs = over_training(TrainedRun(folder, data_dir, "cpu"), 2)
    assert list(epochs) == [2, 10, 1000]
    shuffled = {epoch: epochs[epoch] for epoch in (1000, 2, 10)}
    assert training_table(shuffled, 0.99, True).epoch.drop_duplicates().tolist() == [2, 10, 1000]
    warned = capsys.readouterr().err
    assert warned.startswith("warning: epoch 7 is skipped") and warned.count("\n") == 1


def test_neurons_of_levels_with_weights_of_their_own_are_not_counted_over_levels(
    experiment, data_dir, call_script, tmp_path
):
    trial = experiment("own", epochs=1, model=dict(n_layer=2, shared=False), options=dict(keep_every=1))
    fit(trial)
    assert call_script(SCRIPT, "--run", trial.folder, "--data-dir", data_dir, "--output-dir", "out") == 0
    for name in ("sparsity_dead", "sparsity_training"):
        table = pd.read_csv(tmp_path / "out" / "own_seed0" / f"{name}.csv")
        assert set(table.level) == {1, 2}


def test_gelu_is_said_to_have_no_zeros(experiment, data_dir, call_script, tmp_path, capsys):
    trial = experiment("gelu", epochs=1, model=dict(activation="gelu"))
    fit(trial)
    assert call_script(SCRIPT, "--run", trial.folder, "--data-dir", data_dir, "--output-dir", tmp_path) == 0
    said = capsys.readouterr().out
    assert "GELU is zero nowhere" in said
    shares = [float(share) for share in re.findall(r"([\d.]+)%", said)]
    assert shares and max(shares) < 90
    stale = tmp_path / "gelu_seed0" / "sparsity_training.csv"
    assert not stale.exists()  # no weights were kept
    stale.write_text("of an overwritten run")
    assert call_script(SCRIPT, "--run", trial.folder, "--data-dir", data_dir, "--output-dir", tmp_path) == 0
    assert not stale.exists()


def test_segmentation(call_script, tmp_path, capsys):
    """Classes are those of patches."""
    run = train_unet(tmp_path, img_size=(32, 48))
    assert call_script(SCRIPT, "--run", run, "--data-dir", tmp_path, "--output-dir", tmp_path / "out") == 0
    assert "2 validation images of 24 patches" in capsys.readouterr().out
    opened = TrainedRun(run, tmp_path, "cpu")
    pixels, labels = next(opened.batches([0, 1]))
    active = recorded(opened.model, pixels)["x_sparse"][0] > 0  # (B, H, T, N)
    of_patches = labels.unfold(1, 8, 8).unfold(2, 8, 8).flatten(1, 2).flatten(2).mode().values.numpy()  # (B, T)
    table = pd.read_csv(tmp_path / "out" / "unet_seed0" / "sparsity.csv")
    table = table[(table["head"] == "all") & (table.quantity == "x_sparse")].set_index("class").share
    present = sorted(set(of_patches.ravel()) - {11})
    assert list(table.index) == [*(opened.class_names[label] for label in present), "all classes"] and len(present) > 3
    for label in present:
        expected = active.transpose(0, 2, 1, 3)[of_patches == label].mean()
        assert table[opened.class_names[label]] == pytest.approx(expected)


def test_bad_input(run, data_dir, call_script, experiment, tmp_path, capsys):
    """One message each, and nothing is written."""
    vit = ViTConfig(patch_size=8, n_layer=1, n_embd=8, n_head=2, mlp_dim=16)
    vit = dataclasses.replace(experiment("vit", epochs=1), model=vit)
    fit(vit)
    capsys.readouterr()
    for flags, said in (
        (("--run", vit.folder), "has no x_sparse"),
        (("--run", tmp_path), "has no weights to open"),
        (("--run", run, "--images", 0), "give --images 1 or more"),
    ):
        assert call_script(SCRIPT, "--data-dir", data_dir, "--output-dir", tmp_path / "out", *flags) == 1
        check_error(capsys, said)
    for flag, value, said in (
        ("--always-on", 0, "always_on = 0.0 must be above 0"),
        ("--always-on", 1.5, "always_on = 1.5 must be above 0 and at most 1"),
        ("--checkpoint-images", -1, "checkpoint_images = -1 must be at least 0"),
        ("--alway-on", 0.5, "--always-on"),
    ):
        assert call_script(SCRIPT, flag, value) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
