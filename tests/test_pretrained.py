"""The best weights of a run as a small file with a model card, opened like a run and by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from training import UserError
from analysis.tables import accuracy_interval
from models.pretrained import load_pretrained, pretrained_folder, pretrained_names
from tests.inspecting import check_error, train_unet
from tools.exporting.model_card import model_card
from training.loop import fit
from training.runs import load_model
from training.stored import EXPORTED

SCRIPT = "tools/export.py"


@pytest.fixture
def results(trained_run, call_script, tmp_path):
    """A results folder with the run's weights under two names, those of the second with other signs."""
    folders = [tmp_path / "results" / "trial" / f"seed{seed}" for seed in (0, 1)]
    for folder in folders:
        assert call_script(SCRIPT, trained_run, "--output", folder) == 0
    weights = {name: -value for name, value in load_file(folders[1] / EXPORTED).items()}
    save_file(weights, folders[1] / EXPORTED)
    return tmp_path / "results"


def test_a_folder_with_exported_weights_opens_as_the_run_does(trained_run, results):
    copy = results / "trial" / "seed0"
    copied = ["config.json", "metrics.csv", "summary.json"]
    assert sorted(path.name for path in copy.iterdir()) == ["README.md", EXPORTED, *copied]
    assert all((copy / name).read_bytes() == (trained_run / name).read_bytes() for name in copied)
    before, config = load_model(trained_run)
    after, same = load_model(copy)
    assert same == config and not after.training
    parameters = dict(before.named_parameters())
    for name, tensor in after.state_dict().items():
        expected = parameters[name].detach().bfloat16().float() if name in parameters else before.state_dict()[name]
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected)
    assert (copy / EXPORTED).stat().st_size < 2.5 * sum(p.numel() for p in parameters.values()) + 4096
    images = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(after(images), before(images), atol=0.05, rtol=0.05)


def test_the_card_states_the_measured_result_with_its_interval(trained_run, results):
    card = (results / "trial" / "seed0" / "README.md").read_text()
    accuracy = json.loads((trained_run / "summary.json").read_text())["test"]["accuracy"]
    low, high = accuracy_interval(round(40 * accuracy), 40)
    assert low < accuracy < high
    assert f"| {100 * accuracy:.2f} (95 % interval over test images: {100 * low:.2f} to {100 * high:.2f}) |" in card
    assert "192 to train, 48 to validate, 40 to test" in card and "class 9" in card and "CIFAR-10" in card
    assert accuracy_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I, method 3


@pytest.mark.parametrize("name", pretrained_names())
def test_cards_in_the_repository_say_what_is_said_today(name):
    folder = pretrained_folder(name)
    assert (folder / "README.md").read_text() == model_card(folder), "write it again with tools/export.py"


def test_models_are_found_by_name(trained_run, results, tmp_path):
    assert pretrained_names(results) == ["trial", "trial/seed1"]
    assert pretrained_folder("trial", results) == results / "trial" / "seed0"
    first, second = (load_pretrained(name, results).encoder for name in ("trial", "trial/seed1"))
    assert torch.equal(first, load_model(results / "trial" / "seed0")[0].encoder) and torch.equal(second, -first)
    with pytest.raises(UserError, match=r"no pretrained model v9: choose one of trial, trial/seed1$"):
        load_pretrained("v9", results)
    with pytest.raises(UserError, match=r"holds no weights .* yet: train a model"):
        load_pretrained("trial", tmp_path / "empty")


def test_a_checkpoint_is_preferred_to_what_was_exported_from_it(trained_run, results):
    copy = results / "trial" / "seed0"
    shutil.copy(trained_run / "best.pt", copy)
    (copy / EXPORTED).write_bytes(b"damaged")
    assert torch.equal(load_model(copy)[0].encoder, load_model(trained_run)[0].encoder)


def test_nothing_of_another_run_is_replaced_or_described(experiment, trained_run, call_script, tmp_path, capsys):
    other, notes = experiment(epochs=1), tmp_path / "notes"
    fit(other)
    notes.mkdir()
    (notes / "README.md").write_text("mine")
    for target, said in ((other.folder, "holds a run"), (notes, r"README\.md is not the model card of these")):
        before = {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()}
        assert call_script(SCRIPT, trained_run, "--output", target) == 1
        check_error(capsys, said)
        assert before == {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()}
    copy = tmp_path / "copy"
    assert call_script(SCRIPT, trained_run, "--output", copy) == 0
    for form in ("weights", "torch", "pruned"):
        assert call_script(SCRIPT, other.folder, "--to", form, "--output", copy) == 1
        check_error(capsys, "holds another run")
    shutil.rmtree(copy)
    assert call_script(SCRIPT, other.folder, "--output", copy) == 0 and (copy / "README.md").exists()
    (other.folder / "summary.json").unlink()  # as if it had not finished
    assert call_script(SCRIPT, other.folder, "--output", copy) == 1
    check_error(capsys, r"README\.md is not the model card of these weights: move it")
    (copy / "README.md").unlink()
    assert call_script(SCRIPT, other.folder, "--output", copy) == 0
    assert not (copy / "summary.json").exists() and not (copy / "README.md").exists()


def test_a_pruned_model_does_not_replace_the_whole_one(experiment, call_script, capsys):
    whole = experiment(epochs=1)
    fit(whole)
    options = ("--data-dir", whole.options.data_dir, "--to", "pruned", "--test-images", 0)
    assert call_script(SCRIPT, whole.folder, *options) == 0
    (pruned,) = whole.folder.glob("pruned_*")
    copy = whole.folder.parents[1] / "copy"
    assert call_script(SCRIPT, whole.folder, "--output", copy) == 0
    for target, said in ((whole.folder, "holds a run"), (copy, "holds another run")):
        before = {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()}
        assert call_script(SCRIPT, pruned, "--output", target) == 1
        check_error(capsys, said)
        assert before == {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()}
    assert call_script(SCRIPT, whole.folder, *options) == 0  # again, over itself


STORED = [  # what a run's files say, and what its card says then
    ({"config": {"eval_flip": True}, "summary": {"eval_flip": True}}, "mean logits of each image and its mirror image"),
    ({"config": {}, "summary": {"eval_full_size": True}}, "), masks at their original size |"),
    ({"config": {"train_val": True}}, ", the last one |"),
    ({"config": {"precision": "bf16"}}, "before rounding, with --precision bf16)"),
    (
        {"origin": {"library": "imagenet"}},
        "| started from | imagenet weights of the encoder, random ones of the rest |",
    ),
    ({"origin": {"file": "a/best.pt", "taken": []}}, "| started from | the encoder of a/best.pt, random weights"),
    ({"origin": {"file": "a/best.pt"}}, "| started from | a/best.pt |"),
    ({"summary": {"test": None}}, "| best validation accuracy (%) | 50.00 |"),
]


@pytest.mark.parametrize(("stored", "said"), STORED, ids=[said for _, said in STORED])
def test_the_card_says_what_the_run_did(stored, said, trained_run, tmp_path):
    config, summary = (json.loads((trained_run / f"{name}.json").read_text()) for name in ("config", "summary"))
    config["config"]["train"] |= stored.get("config", {})
    config["origin"] = stored.get("origin")
    summary["best"]["val_accuracy"] = 0.5
    for name, content in (("config", config), ("summary", summary | stored.get("summary", {}))):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    card = model_card(tmp_path).replace("\n", " ")
    assert said in card and ("interval" in card) == (said != STORED[-1][1])


def test_a_card_of_a_segmentation_run(call_script, tmp_path):
    folder = train_unet(tmp_path)
    assert call_script(SCRIPT, folder) == 0
    card = (folder / "README.md").read_text()
    assert "| best validation mIoU (%) |" in card and "BDHUNet" in card and "pipeline_tag: image-segmentation" in card


@pytest.mark.parametrize("script", ["visualize_attention", "explore", "probe"])
def test_scripts_open_a_folder_that_has_only_what_was_exported(script, results, data_dir, call_script, tmp_path):
    options = ("--run", results / "trial" / "seed1", "--data-dir", data_dir, "--output-dir", tmp_path / "looks")
    fewer = {"explore": ("--images", 2)}.get(script, ())
    assert call_script(f"interpretability/{script}.py", *options, *fewer) == 0
    assert any((tmp_path / "looks").rglob("*.*"))


def test_what_cannot_be_exported_or_opened_is_refused_with_one_message(results, call_script, tmp_path, capsys):
    assert call_script(SCRIPT, tmp_path) == 1
    check_error(capsys, f"config.json and best.pt or {EXPORTED}")
    copy = results / "trial" / "seed0"
    (copy / EXPORTED).write_bytes(b"damaged")
    assert call_script("interpretability/visualize_attention.py", "--run", copy) == 1
    check_error(capsys, f"{EXPORTED} cannot be read as safetensors")
    (copy / "config.json").unlink()
    assert call_script(SCRIPT, copy) == 1
    check_error(capsys, "config.json")
