"""Files of a run that parse but are wrong: each reader says one thing that names the file, or leaves the run out."""

import json
import shutil

import numpy as np
import pytest
import torch

from training import UserError
from analysis.reading import find_runs, read_runs
from training.runs import Run, load_model


def change(path, *keys, to=...):
    """Sets the value at keys in a JSON file, or removes it."""
    content = json.loads(path.read_text())
    part = content
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = to
    if to is ...:
        del part[keys[-1]]
    path.write_text(json.dumps(content))


CONFIG = {  # of every reader
    "experiment outside the folder": (("experiment",), "../../other"),
    "no experiment": (("experiment",), ""),
    "dataset of no task": (("config", "train", "dataset"), "nope"),
    "another dataset": (("config", "train", "dataset"), "cifar100"),
    "no dataset": (("config", "train", "dataset"), ...),
    "rate not finite": (("config", "train", "learning_rate"), float("nan")),
    "width of letters": (("config", "model", "n_embd"), "many"),
    "depth not an integer": (("config", "model", "n_layer"), 1.5),
    "depth impossible": (("config", "model", "n_layer"), -1),
    "choice unknown": (("config", "model", "residual"), "zz"),
}
RESULTS = {  # of analysis
    "config.json": {"parameters": (("parameters",), 1), "epochs": (("config", "train", "epochs"), 99)},
    "summary.json": {
        "test accuracy above 1": (("test", "accuracy"), 7.5),
        "test accuracy below 0": (("test", "accuracy"), -1),
        "test accuracy not a number": (("test", "accuracy"), float("nan")),
        "no test accuracy": (("test",), {}),
        "no test although there are test images": (("test",), None),
        "best accuracy of no epoch": (("best", "val_accuracy"), 0.999),
        "no best accuracy": (("best", "val_accuracy"), None),
        "images": (("images",), 3),
    },
}
CHANGES = [("config.json", *each) for each in CONFIG.values()]
CHANGES += [(file, *each) for file, changes in RESULTS.items() for each in changes.values()]
NAMES = [*CONFIG, *(name for changes in RESULTS.values() for name in changes)]


@pytest.mark.parametrize(("file", "keys", "to"), CHANGES, ids=NAMES)
def test_analysis_leaves_the_run_out_by_name(make_run, tmp_path, capsys, file, keys, to):
    folder, _ = make_run()
    good, _ = make_run(seed=1)
    change(folder / file, *keys, to=to)
    assert [run.folder for run in read_runs(find_runs(tmp_path))] == [good]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(folder) in said


@pytest.mark.parametrize(
    ("column", "value"), [("val_accuracy", 75.0), ("val_accuracy", -0.1), ("epoch_time_sec", -5.0)]
)
def test_impossible_metrics_are_left_out_by_name(make_run, capsys, column, value):
    folder, _ = make_run(columns={column: [value] * 5})
    assert not read_runs([folder])
    assert str(folder / "metrics.csv") in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "metrics.csv"])
def test_a_run_that_has_lost_a_file_is_named(make_run, tmp_path, capsys, name):
    folder, _ = make_run()
    (folder / name).unlink()
    assert not read_runs(find_runs(tmp_path))
    assert str(folder / name) in capsys.readouterr().err


def test_a_training_class_that_is_no_config_is_no_traceback(make_run):
    folder, _ = make_run()
    for name in ("ROOT", "UserError", "Nope"):
        change(folder / "config.json", "train_class", to=name)
        assert read_runs([folder])[0].configuration.train_class == name


# ---------------------------------------------------------------------------- weights


def changed_weights(change):
    def damage(folder):
        state = torch.load(folder / "best.pt", weights_only=True)
        change(state)
        torch.save(state, folder / "best.pt")

    return damage


WEIGHTS = {
    "depth of another run": lambda folder: change(folder / "config.json", "config", "model", "n_layer", to=3),
    "gate of another run": lambda folder: change(folder / "config.json", "config", "model", "gate", to="sigmoid"),
    "weights of another run": changed_weights(lambda state: state.update(run_id="another")),
    "integers": changed_weights(lambda state: state["model"].update(encoder=state["model"]["encoder"].long())),
    "not finite": changed_weights(lambda state: state["model"]["encoder"].fill_(float("inf"))),
    "a tensor": lambda folder: torch.save(torch.ones(3), folder / "best.pt"),
}


@pytest.mark.parametrize("damage", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_are_not_the_runs_are_refused(trained_run, tmp_path, damage):
    """With shared weights, another depth or gate would load, and show another model."""
    folder = shutil.copytree(trained_run, tmp_path / "copy" / "seed0")
    damage(folder)
    with pytest.raises(UserError, match=r"best\.pt"):
        load_model(folder)


def test_an_index_beyond_the_images_is_refused(trained_run, tmp_path):
    folder = shutil.copytree(trained_run, tmp_path / "copy" / "seed0")
    with np.load(folder / "split.npz") as arrays:
        split = dict(arrays)
    split["train"][0] = 10**6
    np.savez(folder / "split.npz", **split)
    with pytest.raises(UserError, match=r"split\.npz is damaged"):
        Run(folder).read_split()


@pytest.mark.parametrize(("keys", "to"), CONFIG.values(), ids=CONFIG)
def test_a_config_that_cannot_be_is_refused(trained_run, tmp_path, keys, to):
    folder = shutil.copytree(trained_run, tmp_path / "copy" / "seed0")
    change(folder / "config.json", *keys, to=to)
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(folder)
