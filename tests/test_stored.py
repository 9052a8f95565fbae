"""What is read back from a run's folder: "the same configuration?", and what resuming makes of damage of every kind."""

import json
import os
import shutil
from unittest import mock

import numpy as np
import pytest
import torch

from training import UserError, fit, loop
from analysis.reading import read_run
from tests.trials import interrupt, read_rows, resumed, same_weights, snapshot, weights
from training.runs import load_model
from training.stored import Damaged, configuration_of, load_checkpoint, read_config, read_metrics, read_split

TRIAL = dict(epochs=3, train_limit=80, crop_scale_min=0.8)


@pytest.fixture(scope="module")
def runs(experiment_in, tmp_path_factory):
    """Folders of runs, for reading only: whole, its twin, another seed's, and two that were stopped."""
    folder = tmp_path_factory.mktemp("runs")
    trials = {name: experiment_in(folder / name, **TRIAL) for name in ("whole", "twin", "stopped", "untested")}
    trials["seed"] = experiment_in(folder / "seed", seed=1, **TRIAL)
    trials["wide"] = experiment_in(folder / "wide", model={"n_embd": 16}, **TRIAL)
    for name in ("whole", "twin", "seed", "wide"):
        fit(trials[name])
    interrupt(trials["stopped"], 3)  # last.pt is of the second epoch, previous.pt of the first
    interrupt(trials["untested"], part="test")
    return {name: trial.folder for name, trial in trials.items()}


@pytest.fixture
def copy_of(runs, experiment):
    """A copy of one of the runs, to be damaged and resumed: the trial."""

    def copy(name):
        trial = resumed(experiment(**TRIAL))
        shutil.copytree(runs[name], trial.folder)
        return trial

    return copy


def ends_as(runs, trial):
    """Whether the resumed trial ends as the run that nothing stopped."""
    fit(trial)
    assert read_rows(trial.folder, measured=False) == read_rows(runs["whole"], measured=False)
    names = ("last.pt", "previous.pt", "best.pt")
    return all(same_weights(weights(trial.folder, name), weights(runs["whole"], name)) for name in names)


# ---------------------------------------------------------------------------- the same configuration?


@pytest.mark.parametrize(
    ("part", "change", "expected"),
    [
        ("model", {"qk": None, "rotary": None}, []),  # an older run lacks fields: they have their defaults
        ("train", {"grad_accum": None, "train_class": None}, []),
        ("train", {"crop_scale_min": None}, ["crop_scale_min: 1.0 -> 0.8"]),  # here the default is another value
        ("model", {"n_layer": 6}, ["n_layer: 6 -> 1"]),
        ("train", {"seed": 3, "epochs": 5}, ["epochs: 5 -> 3", "seed: 3 -> 0"]),
        ("model", {"unknown": 7}, ["unknown: 7 -> None"]),
        ("model", {"model_class": "Other"}, ["model_class: Other -> VisionBDHConfig"]),
    ],
)
def test_the_same_configuration(part, change, expected, runs, experiment):
    stored = read_config(runs["whole"])
    for key, value in change.items():
        where = stored if key.endswith("_class") else stored["config"][part]
        where[key] = value
        if value is None:
            del where[key]
    asked = experiment(**TRIAL).configuration
    assert configuration_of(stored).differences(asked) == expected
    assert configuration_of(stored).differences(asked, ignore=change.keys()) == []


def edit_json(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_resume_asks_it(copy_of, runs):
    trial = copy_of("stopped")
    edit_json(trial.folder / "config.json", lambda config: config["config"]["model"].update(unknown=7))
    with pytest.raises(UserError, match=r"another configuration \(unknown: 7 -> None\)"):
        fit(trial)
    edit_json(trial.folder / "config.json", lambda config: config["config"]["model"].pop("unknown"))
    edit_json(trial.folder / "config.json", lambda config: config["config"]["model"].pop("qk"))
    assert ends_as(runs, trial)


@pytest.mark.parametrize("columns", [9, 8])
def test_a_run_of_an_older_version_resumes(columns, copy_of, runs):
    """Without identities, without a copy of the metrics in its checkpoints, perhaps with fewer columns."""
    trial = copy_of("stopped")
    edit_json(trial.folder / "config.json", lambda config: [config.pop(key) for key in ("run_id", "train_class")])
    with np.load(trial.folder / "split.npz") as arrays:
        np.savez(trial.folder / "split.npz", train=arrays["train"], val=arrays["val"])
    for path in trial.folder.glob("*.pt"):
        state = load_checkpoint(path)
        torch.save({key: value for key, value in state.items() if key not in ("run_id", "history")}, path)
    rows = (trial.folder / "metrics.csv").read_text().splitlines()
    rows = [",".join(row.split(",")[:columns]) for row in [*rows, rows[-1].replace("2,", "3,", 1)]]  # killed in epoch 3
    (trial.folder / "metrics.csv").write_text("\n".join(rows) + "\n3,0.")
    fit(trial)
    assert same_weights(weights(trial.folder), weights(runs["whole"]))
    found, whole = (read_rows(each, measured=False) for each in (trial.folder, runs["whole"]))
    assert found == [{key: row[key] for key in found[0]} for row in whole] and len(found[0]) == columns - 3


# ---------------------------------------------------------------------------- damage

DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "100 bytes": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "garbage": lambda path: path.write_bytes(b"\x80\x02PK\x03\x04\xff" * 400),
    "the letter b": lambda path: path.write_bytes(b"b"),
    "a folder": lambda path: [path.unlink(), path.mkdir()],
}


def replace_state(path, change):
    state = load_checkpoint(path)
    torch.save(change(state), path)


def flip_a_bit(path):
    """In a weight, where torch.load does not notice it."""
    content = bytearray(path.read_bytes())
    content[content.find(weights(path.parent, path.name)["encoder"].numpy().tobytes()) + 5] ^= 16
    path.write_bytes(content)
    torch.load(path, weights_only=True)


OF_LAST = DAMAGES | {
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "a list": lambda path: torch.save([1, 2], path),
    "{}": lambda path: torch.save({}, path),
    "best.pt in its place": lambda path: shutil.copy(path.with_name("best.pt"), path),
    "no optimizer": lambda path: replace_state(path, lambda state: state | {"optimizer": None}),
    "a flipped bit": flip_a_bit,
}


def refused(trial, name=""):
    """The trial is refused with one message, which names the file; nothing but restored metrics was changed."""
    metrics = trial.folder / "metrics.csv"
    before = snapshot(trial.folder) | {metrics: None}
    with pytest.raises(UserError) as error:
        fit(trial)
    message = str(error.value)
    assert str(trial.folder / name) in message and "\n" not in message and "weights_only" not in message, message
    assert snapshot(trial.folder) | {metrics: None} == before
    return message


@pytest.mark.parametrize("damage", OF_LAST)
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(damage, copy_of, runs, capsys):
    trial = copy_of("stopped")
    OF_LAST[damage](trial.folder / "last.pt")
    assert ends_as(runs, trial)
    output = capsys.readouterr().out
    assert "last.pt" in output and "resuming from previous.pt, epoch 1" in output


@pytest.mark.parametrize("origin", ["seed", "twin", "wide", "wide weights"])
def test_a_checkpoint_of_another_run_is_not_resumed(origin, copy_of, runs, capsys):
    """Of another seed, of the same command run elsewhere, of another architecture, whatever its record says."""
    trial = copy_of("stopped")
    last = trial.folder / "last.pt"
    if origin == "wide weights":
        replace_state(last, lambda state: state | {"model": weights(runs["wide"])})
    else:
        shutil.copy(runs[origin] / "last.pt", last)
    assert ends_as(runs, trial)
    assert "resuming from previous.pt, epoch 1" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["missing", "half", "the letter b"])
def test_two_damaged_checkpoints_are_one_message(damage, copy_of):
    trial = copy_of("stopped")
    for name in ("last.pt", "previous.pt"):
        DAMAGES[damage](trial.folder / name)
    message = refused(trial)
    assert "--overwrite" in message and (damage == "missing" or ("last.pt" in message and "previous.pt" in message))


@pytest.mark.parametrize("damage", [*DAMAGES, "a list", "seed", "twin"])
def test_a_damaged_best_checkpoint_is_named(damage, copy_of, runs):
    trial = copy_of("untested")
    replace_state(trial.folder / "last.pt", lambda state: state | {"best": state["best"] | {"epoch": 1}})
    damage_best(trial, damage, runs)
    assert "--overwrite" in refused(trial, "best.pt")


@pytest.mark.parametrize("damage", ["missing", "half", "seed"])
def test_a_damaged_best_checkpoint_is_made_anew_if_the_last_epoch_was_the_best(damage, copy_of, runs):
    trial = copy_of("untested")
    damage_best(trial, damage, runs)
    assert ends_as(runs, trial)


def damage_best(trial, damage, runs):
    best = trial.folder / "best.pt"
    if damage in runs:
        shutil.copy(runs[damage] / "best.pt", best)
    else:
        OF_LAST[damage](best)


# ---------------------------------------------------------------------------- JSON files

OF_JSON = {name: make for name, make in DAMAGES.items() if name != "missing"} | {
    "a string": lambda path: path.write_text('"x"'),
    "[]": lambda path: path.write_text("[]"),
    "{}": lambda path: path.write_text("{}"),
    "null": lambda path: path.write_text("null"),
    "not UTF-8": lambda path: path.write_bytes('{"experiment": "é"}'.encode("latin-1")),
    "too deep": lambda path: path.write_text("[" * 100_000),
}


@pytest.mark.parametrize("damage", OF_JSON)
@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_a_damaged_json_file_is_named(name, damage, copy_of):
    trial = copy_of("whole")
    OF_JSON[damage](trial.folder / name)
    assert ("--overwrite" if name == "config.json" else "remove it") in refused(trial, name)


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        *(
            ("config.json", lambda config, key=key: config.pop(key))
            for key in ("experiment", "config", "model_class", "data", "parameters", "hardware")
        ),
        ("config.json", lambda config: config.update(experiment=3)),
        ("config.json", lambda config: config["config"].update(model=[])),
        ("config.json", lambda config: config["config"]["train"].pop("seed")),
        ("config.json", lambda config: config["config"]["train"].update(epochs="3")),
        ("config.json", lambda config: config["data"].pop("name")),
        ("summary.json", lambda summary: summary.pop("test")),
        ("summary.json", lambda summary: summary.update(test="x")),
        ("summary.json", lambda summary: summary.update(best=None)),
        ("summary.json", lambda summary: summary["best"].update(epoch=1.5)),
        ("summary.json", lambda summary: summary.update(epochs=0)),
    ],
)
def test_a_json_file_of_other_contents_is_named(name, edit, copy_of):
    trial = copy_of("whole")
    edit_json(trial.folder / name, edit)
    refused(trial, name)


def test_a_summary_that_was_removed_comes_back(copy_of, runs):
    trial = copy_of("whole")
    (trial.folder / "summary.json").unlink()
    fit(trial)
    assert (trial.folder / "summary.json").read_text() == (runs["whole"] / "summary.json").read_text()


def test_overwrite_replaces_any_damage(copy_of, runs, experiment):
    trial = copy_of("whole")
    for path in [path for path in trial.folder.iterdir() if path.name != "lock"]:
        DAMAGES["a folder"](path)
    assert ends_as(runs, experiment(**TRIAL, options={"overwrite": True}))


# ---------------------------------------------------------------------------- the split


def save_split(change):
    """Damages split.npz: changes its arrays."""

    def damage(path):
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
        np.savez(path, **(arrays | change(arrays)))

    return damage


OF_SPLIT = {name: make for name, make in DAMAGES.items() if name != "missing"} | {
    "one array": lambda path: np.savez(path, train=np.arange(3)),
    "floats": save_split(lambda split: {"val": split["val"] + 0.5}),
    "2-D": save_split(lambda split: {"train": split["train"][:, None]}),
    "negative": save_split(lambda split: {"val": split["val"] - 500}),
    "twice": save_split(lambda split: {"val": split["train"][:5]}),
    "empty part": save_split(lambda split: {"val": split["val"][:0]}),
    "out of range": save_split(lambda split: {"val": split["val"] + 500}),
    "objects": save_split(lambda split: {"val": np.array([{}, None], dtype=object)}),
}


@pytest.mark.parametrize("damage", [*OF_SPLIT, "seed", "twin"])
def test_a_damaged_split_is_named(damage, copy_of, runs):
    trial = copy_of("stopped")
    if damage in runs:
        shutil.copy(runs[damage] / "split.npz", trial.folder)
    else:
        OF_SPLIT[damage](trial.folder / "split.npz")
    assert "--overwrite" in refused(trial, "split.npz")


def test_a_missing_split_is_drawn_again(copy_of, runs):
    trial = copy_of("stopped")
    (trial.folder / "split.npz").unlink()
    assert ends_as(runs, trial)


# ---------------------------------------------------------------------------- metrics.csv


@pytest.mark.parametrize("damage", [*(name for name in DAMAGES if name != "a folder"), "edited", "semicolons", "twin"])
def test_metrics_are_restored_from_the_checkpoint(damage, copy_of, runs):
    trial = copy_of("stopped")
    path = trial.folder / "metrics.csv"
    if damage == "edited":
        path.write_text(path.read_text().replace(",0.", ",1."))
    elif damage == "semicolons":  # as a spreadsheet saves it
        path.write_text("\ufeff" + path.read_text().replace(",", ";").replace(".", ","), encoding="utf-16")
    elif damage == "twin":
        shutil.copy(runs["seed"] / "metrics.csv", path)
    else:
        DAMAGES[damage](path)
    assert ends_as(runs, trial)


def test_a_folder_in_place_of_the_metrics_is_named(copy_of):
    trial = copy_of("stopped")
    DAMAGES["a folder"](trial.folder / "metrics.csv")
    refused(trial, "metrics.csv")


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("epoch,train_loss,val_loss,epoch_time_sec\n1,2.0,3.0,4.0\n2,1.0,", 1),  # stopped while it wrote
        ("epoch,train_loss,val_loss,epoch_time_sec,val_iou_sky\n1,2.0,3.0,4.0,\n", 1),
        ("", None),
        ("epoch,train_loss,val_loss,epoch_time_sec\n", None),
        ("epoch,train_loss,val_loss,epoch_time_sec\n2,2.0,3.0,4.0\n", None),
        ("epoch,train_loss,val_loss,epoch_time_sec\n1,2.0,3.0,4.0\n1,2.0,3.0,4.0\n", None),
        ("epoch,train_loss,val_loss,epoch_time_sec\n1,2.0,,4.0\n", None),
        ("epoch,train_loss,val_loss,epoch_time_sec\n1,2.0,nan,4.0\n", None),
        ("epoch,train_loss,val_loss,epoch_time_sec\n1,2.0,low,4.0\n", None),
        ("epoch,train_loss,epoch_time_sec\n1,2.0,4.0\n", None),
        ("epoch;train_loss;val_loss;epoch_time_sec\n1;2,0;3,0;4,0\n", None),
        ("1,2.0,3.0,4.0\n2,2.0,3.0,4.0\n", None),
    ],
)
def test_metrics_are_validated_where_they_are_read(content, rows, tmp_path):
    (tmp_path / "metrics.csv").write_text(content)
    if rows is None:
        with pytest.raises(Damaged, match=r"metrics\.csv is damaged .*--resume"):
            read_metrics(tmp_path)
    else:
        assert len(read_metrics(tmp_path)) == rows


# ---------------------------------------------------------------------------- what else is read


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_checkpoint_is_executed(copy_of, tmp_path):
    trial = copy_of("whole")
    torch.save({"epoch": 1, "model": Malicious(tmp_path / "executed")}, trial.folder / "best.pt")
    with pytest.raises(Damaged) as error:
        load_model(trial.folder)
    assert "best.pt" in str(error.value) and "weights_only" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_the_files_of_a_run_carry_its_identity(runs):
    ids = {name: read_config(folder)["run_id"] for name, folder in runs.items()}
    assert len(set(ids.values())) == len(ids)
    for name, folder in runs.items():
        assert {load_checkpoint(path)["run_id"] for path in folder.glob("*.pt")} == {ids[name]}
        assert read_split(folder, read_config(folder)) is not None


def test_the_best_weights_of_a_lost_epoch_are_not_those_of_the_run(experiment, monkeypatch):
    """The best epoch is lost with last.pt, and turns out worse when it is repeated, as on a GPU."""
    values = iter([0.1, 0.2, 0.9, 0.3])  # epochs 1, 2, 3, and 3 again

    def evaluate(session, part):
        return {"loss": 1.0, "accuracy": next(values) if part == "val" else 0.5}

    monkeypatch.setattr(loop, "evaluate", evaluate)
    trial = experiment(epochs=3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "_finish", mock.Mock(side_effect=KeyboardInterrupt))
        fit(trial)
    (trial.folder / "last.pt").write_bytes(b"half")
    assert fit(resumed(trial))["best"] == {"epoch": 3, "val_loss": 1.0, "val_accuracy": 0.3}
    assert read_run(trial.folder).best_epoch == 3
