"""Programs and ONNX files hold what the model computes, for any number and, for a BDH-UNet, any size of images."""

import dataclasses
import functools
import json
import math
import sys

import onnx as library
import pytest
import torch

from training import UserError
from analysis.tables import accuracy_interval
from interpretability.common.trained import TrainedRun
from models.baselines import ViTConfig
from models.bdh_detector import BDHDetectorConfig
from models.bdh_unet import bdh_unet_config
from models.export_form import export_form
from models.language import BDHConfig
from models.masked_bdh import MaskedBDHConfig
from models.video_bdh import v4_video_config
from models.vision_bdh import v1_config, v2_config, v3_config
from tests.inspecting import check_error, train_unet, with_large_weights
from tools.exporting import programs
from tools.exporting.evaluation import Score, score
from tools.exporting.programs import difference, onnx_answer, onnx_session, write_int8, write_onnx, write_torch
from training.loop import fit
from training.runs import load_model
from training.stored import EXPORTED

SIZES = dict(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4)
FORMS = {
    "v1": v1_config(**SIZES, rotary="axial", pool="cls"),
    "v3, own weights for each level": v3_config(**SIZES, shared=False),
    "everything else": v2_config(**SIZES, qk="separate", gate="sigmoid", activation="gelu", attention="softmax"),
    "BDH-UNet": bdh_unet_config(**SIZES, img_size=(32, 40), skips=True, skip_levels=(2, 1)),
    "video": v4_video_config(**SIZES, n_frames=3, in_channels=9, pos_embed=True, pool="cls"),
    "masked patches": MaskedBDHConfig(**SIZES),
    "detector": BDHDetectorConfig(**SIZES, img_size=32),
    "ViT": ViTConfig(n_layer=1, n_embd=16, n_head=2, mlp_dim=16),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_export_form_computes_the_model(name):
    model = with_large_weights(FORMS[name].build()).double()
    form = export_form(model)
    channels, width = FORMS[name].in_channels, 40 if name == "BDH-UNet" else 32
    images = torch.rand(3, channels, 32, width, dtype=torch.float64) * 2 - 1
    torch.testing.assert_close(form(images), model(images), atol=1e-11, rtol=1e-9)
    if name != "ViT":  # every weight of a product is a matrix
        inputs = {"pos_embed", "pos_frame", "cls_token", "mask_token", "query_tokens", "encoder.pos_embed"}
        stacked = {key for key, value in form.named_parameters() if value.dim() == 3 and "mixing" not in key}
        assert not stacked - inputs
        assert hasattr(model, "encoder")  # the model itself is unchanged


def test_the_export_form_of_the_language_model():
    model = with_large_weights(BDHConfig(**SIZES).build()).double()
    idx = torch.arange(12).view(2, 6)
    torch.testing.assert_close(export_form(model)(idx)[0], model(idx)[0], atol=1e-11, rtol=1e-9)


BRIDGES = dict(skips=True, skip_levels=(2, 1), bridges="attention")
PROGRAMS = {"v2": v2_config(**SIZES, patch_size=8), "BDH-UNet": bdh_unet_config(**SIZES, **BRIDGES, img_size=32)}
PROGRAMS["hybrid"] = v2_config(**SIZES, patch_size=8, blocks_before=1, blocks_after=1, pool="cls")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Each model with its config, its program and its ONNX file."""
    folder = tmp_path_factory.mktemp("exported")
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "open_program", functools.cache(programs.open_program))  # for both files
        for name, config in PROGRAMS.items():
            model = with_large_weights(config.build())
            program, onnx = folder / f"{name}.pt2", folder / f"{name}.onnx"
            assert "largest difference" in write_torch(model, config, program)
            write_onnx(model, config, onnx, {"class_names": ["cat", "dog"]})
            made[name] = (model, config, program, onnx)
    assert sorted(path.suffix for path in folder.iterdir()) == [".onnx"] * len(PROGRAMS) + [".pt2"] * len(PROGRAMS)
    return made


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_files_compute_the_model_for_any_batch_and_size(name, form, files):
    model, _, program, onnx = files[name]
    answer = torch.export.load(program).module() if form == "torch" else onnx_answer(onnx)
    sizes = [(1, 32, 32), (2, 32, 32), (7, 32, 32)]
    sizes += [(1, 16, 16), (3, 16, 48), (1, 56, 40)] if name == "BDH-UNet" else []
    for n, height, width in sizes:
        images = torch.rand(n, 3, height, width) * 2 - 1
        expected = model(images)
        assert (answer(images) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_programs_of_upernet(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "open_program", functools.cache(programs.open_program))
    config = bdh_unet_config(**SIZES | dict(n_layer=1), img_size=(40, 48), decoder="upernet", rotary="none")
    model, path = with_large_weights(config.build()), tmp_path / "model.onnx"
    write_torch(model, config, path.with_suffix(".pt2"))
    write_onnx(model, config, path)
    for answer in (torch.export.load(path.with_suffix(".pt2")).module(), onnx_answer(path)):
        for n, height, width in ((1, 40, 48), (2, 72, 40), (1, 64, 136)):
            images = torch.rand(n, 3, height, width) * 2 - 1
            expected = model(images)
            assert (answer(images) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_onnx_says_how_to_use_it(files):
    session = onnx_session(files["v2"][3])
    assert [each.name for each in session.get_inputs()] == ["images"]
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == ["cat", "dog"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_int8_is_small_and_close(name, files, tmp_path):
    model, config, _, onnx = files[name]
    path = tmp_path / "int8.onnx"
    write_int8(onnx, path, (torch.rand(4, 3, 32, 32) * 2 - 1 for _ in range(4)))
    assert [each.name for each in tmp_path.iterdir()] == ["int8.onnx"]
    off = difference(model, config, onnx_answer(path))
    assert 1e-5 < off < 0.3  # quantised, and not nonsense
    matrices = [each for each in library.load(path).graph.initializer if len(each.dims) == 2]
    n_int8 = sum(math.prod(each.dims) for each in matrices if each.data_type == library.TensorProto.INT8)
    D, HN = 16, config.n_head * config.n_neurons
    expected = 3 * D * HN + (0 if name == "BDH-UNet" else 10 * D)  # the step's three weights and the head, once each
    assert n_int8 == expected + (2 * 12 * D * D if name == "hybrid" else 0)


def test_a_file_that_computes_something_else_is_not_left(tmp_path, monkeypatch):
    config = PROGRAMS["v2"]
    model = with_large_weights(config.build())
    other = with_large_weights(config.build(), std=0.2)
    monkeypatch.setattr(programs, "export_form", lambda model: export_form(other))
    with pytest.raises(UserError, match=r"model\.pt2 was not written: its answers differ"):
        write_torch(model, config, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- the script


def test_the_interval_of_a_score_is_that_of_its_number_of_images():
    assert Score("accuracy", 0.75, 40, "test").interval == accuracy_interval(30, 40)


def test_the_script_tests_what_it_writes(experiment, call_script, capsys):
    trial = experiment(epochs=1)
    fit(trial)
    options = ("--data-dir", trial.options.data_dir, "--to", "int8", "--calibration-images", 20)
    assert call_script("tools/export.py", trial.folder, *options) == 0
    said = capsys.readouterr().out
    accuracy = json.loads((trial.folder / "summary.json").read_text())["test"]["accuracy"]
    assert f"float32: test accuracy (%) {100 * accuracy:.2f} (" in said and "-> int8: test accuracy (%)" in said
    assert {"model.onnx", "model_int8.onnx"} <= {path.name for path in trial.folder.iterdir()}


def test_forms_of_a_checkpoint_have_its_name(experiment, call_script, capsys):
    trial = experiment(epochs=1, options=dict(keep_every=1))
    fit(trial)
    best, early = (load_model(trial.folder / f"{name}.pt")[0] for name in ("best", "epoch_000"))
    options = ("--data-dir", trial.options.data_dir)
    assert call_script("tools/export.py", trial.folder / "epoch_000.pt", "--to", "weights", *options) == 1
    check_error(capsys, "--to weights writes a run's best weights: give the folder of")
    assert not (trial.folder / EXPORTED).exists()
    assert call_script("tools/export.py", trial.folder / "epoch_000.pt", "--to", "torch", *options) == 0
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    answer = torch.export.load(trial.folder / "model_epoch_000.pt2").module()(images)
    assert (answer - early(images)).abs().max() < 1e-4 * answer.abs().max() < (answer - best(images)).abs().max()


def test_an_overwritten_run_takes_its_exports_with_it(experiment, call_script):
    trial = experiment(epochs=1)
    fit(trial)
    options = ("--data-dir", trial.options.data_dir, "--test-images", 0)
    assert call_script("tools/export.py", trial.folder, "--to", "weights", "torch", "pruned", *options) == 0
    (trial.folder / "notes.txt").write_text("mine")
    made = {path.name for path in trial.folder.iterdir()}
    assert {"README.md", EXPORTED, "model.pt2", "notes.txt"} < made and any("pruned" in name for name in made)
    before = {path.name for path in trial.folder.iterdir()} - {"README.md", EXPORTED, "model.pt2"}
    fit(dataclasses.replace(trial, options=dataclasses.replace(trial.options, overwrite=True)))
    assert {path.name for path in trial.folder.iterdir()} == {name for name in before if "pruned" not in name}


def test_a_segmentation_run(call_script, tmp_path, capsys):
    folder = train_unet(tmp_path)
    options = ("--data-dir", tmp_path, "--to", "pruned", "--output", tmp_path / "out")
    assert call_script("tools/export.py", folder, *options) == 0
    said = capsys.readouterr().out
    miou = json.loads((folder / "summary.json").read_text())["best"]["val_miou"]
    assert f"32 neurons per head: validation mIoU (%) {100 * miou:.2f} on" in said
    assert "32 neurons per head: validation mIoU (%)" in said and "-> 16: validation mIoU (%)" in said
    assert (tmp_path / "out" / "pruned_16" / "config.json").is_file()


@pytest.mark.parametrize(("form", "package"), [("onnx", "onnxscript"), ("int8", "onnxruntime")])
def test_a_missing_package_is_named_with_the_pip_line(form, package, experiment, call_script, capsys, monkeypatch):
    trial = experiment(epochs=1)
    fit(trial)
    monkeypatch.setitem(sys.modules, package, None)
    assert call_script("tools/export.py", trial.folder, "--to", form) == 1
    check_error(capsys, f"{package}, which is not installed: pip install -r requirements-export.txt")


def test_bad_files_and_flags_get_one_message(call_script, tmp_path, capsys):
    (tmp_path / "bad.onnx").write_bytes(b"<html>")
    for path in (tmp_path / "bad.onnx", tmp_path / "missing.onnx"):
        with pytest.raises(UserError, match=f"{path.name} cannot be read as ONNX"):
            onnx_answer(path)
    assert call_script("tools/export.py", tmp_path, "--keep", 0) == 2
    assert "keep = 0.0 must be above 0" in capsys.readouterr().err
    assert call_script("tools/export.py", tmp_path, "--to") == 2  # would do nothing, in silence
    assert "to is empty: give at least one form" in capsys.readouterr().err


def test_a_run_validated_on_mirror_images_too_is_scored_so(trained_run, data_dir):
    run, seen = TrainedRun(trained_run, data_dir, "cpu"), []
    run.train["eval_flip"] = True

    def predict(images):
        """Class 1 for an image, more firmly class 0 for its mirror image."""
        seen.append(images)
        logits = torch.zeros(len(images), 10)
        logits[:, len(seen) % 2] = 1.0 if len(seen) % 2 else 3.0
        return logits

    result = score(run, predict)
    assert len(seen) == 2 and seen[1].equal(seen[0].flip(-1))
    labels = torch.cat([labels for _, labels in run.batches(range(run.n_images), 40)])
    assert result.value == pytest.approx((labels == 0).float().mean().item())


@pytest.mark.parametrize("full_size", [False, True])
def test_masks_are_scored_at_the_size_that_they_were_validated_at(full_size, tmp_path):
    folder = train_unet(tmp_path, n_val=5, eval_full_size=full_size)
    run = TrainedRun(folder, tmp_path, "cpu")
    found = score(run, run.model).value
    assert found == pytest.approx(json.loads((folder / "summary.json").read_text())["best"]["val_miou"], abs=1e-9)
    run.train["eval_full_size"] = not full_size
    assert score(run, run.model).value != found


def test_no_file_of_the_user_or_of_another_run_is_replaced(experiment, call_script, tmp_path, capsys):
    one, other = experiment(epochs=1), experiment(epochs=1, seed=1)
    for trial in (one, other):
        fit(trial)
    out = tmp_path / "out"
    for form in ("torch", "weights", "weights"):  # the second time over its own
        assert call_script("tools/export.py", one.folder, "--to", form, "--output", out) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    for form in ("torch", "weights"):
        assert call_script("tools/export.py", other.folder, "--to", form, "--output", out) == 1
        check_error(capsys, "out holds another run: give another --output folder")
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    (out / "README.md").write_text("mine")
    assert call_script("tools/export.py", one.folder, "--output", out) == 1
    check_error(capsys, r"README\.md is not the model card of these weights: move it")
    (one.folder / "summary.json").unlink()
    assert call_script("tools/export.py", one.folder, "--output", out) == 1
    assert (out / "README.md").read_text() == "mine"
