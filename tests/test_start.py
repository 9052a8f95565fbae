"""Where first weights come from: a checkpoint of the same model, of an encoder, or a library."""

import dataclasses
import json
import shutil
from unittest import mock

import pytest
import torch

from training import (
    ClassificationConfig,
    Experiment,
    PretrainingConfig,
    RunOptions,
    SegmentationConfig,
    UserError,
    fit,
)
from models.baselines import ResNetUNetConfig, ViTConfig
from models.bdh_unet import bdh_unet_config
from models.hub import on_hub
from models.masked_bdh import MaskedBDHConfig
from models.vision_bdh import interpolate_positions
from tests.camvid_data import write_camvid
from tests.trials import interrupt, resumed, same_weights, weights
from tools.exporting.weights import export_weights
from training.command_line import experiment_of, parse_experiment
from training.runs import load_model
from training.start import start_weights
from training.stored import EXPORTED, load_checkpoint

TRAIN = dict(epochs=1, batch_size=2, learning_rate=1e-3, weight_decay=0.0)
CORE = dict(n_layer=1, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4)


@pytest.fixture(scope="module")
def camvid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data_camvid")
    write_camvid(folder, n_train=3, n_val=2, size=(48, 32))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, camvid, experiment_in):
    """A BDH-UNet, and Vision-BDHs: with the same patches, with patches of 4, with other choices. Each trained."""
    folder = tmp_path_factory.mktemp("runs")
    fit(make_experiment(folder, camvid, "unet"))
    for name, fields in (("v2", {}), ("fine", dict(patch_size=4)), ("axial", dict(rotary="axial", residual="post"))):
        fit(experiment_in(folder, name, model=CORE | dict(patch_size=8) | fields, epochs=1, train_limit=20))
    return folder


def make_experiment(runs_dir, camvid, name="trial", start_from=None, options=None, epochs=1, **model):
    train = SegmentationConfig(**(TRAIN | dict(epochs=epochs, start_from=start_from, horizontal_flip=0.5)))
    where = dict(data_dir=camvid, runs_dir=runs_dir, device="cpu", num_workers=0)
    config = bdh_unet_config(**(CORE | dict(img_size=32) | model))
    return Experiment(name, config, train, RunOptions(**(where | (options or {}))))


def started(experiment, seed=1):
    """A model drawn by another seed, and what start_weights makes of it: model, weights before, origin."""
    torch.manual_seed(seed)
    model = experiment.model.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    return model, before, start_weights(model, experiment)


def checkpoint(runs, name):
    return runs / name / "seed0" / "best.pt"


def weights_in(path):
    return load_checkpoint(path)["model"]


# ---------------------------------------------------------------------------- the whole model


def test_every_weight_is_taken(runs, camvid, tmp_path, capsys):
    path = checkpoint(runs, "unet")
    model, before, origin = started(make_experiment(tmp_path, camvid, start_from=path))
    assert same_weights(model.state_dict(), weights_in(path)) and not same_weights(model.state_dict(), before)
    assert origin == {"file": "unet-seed0-best.pt"}
    assert f"starting from {path}: all of its {len(before)} tensors taken" in capsys.readouterr().out


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_stripped(prefix, runs, camvid, tmp_path):
    """As DistributedDataParallel and torch.compile put them before the names of a state dict."""
    state = load_checkpoint(checkpoint(runs, "unet"))
    expected = state["model"]
    state["model"] = {prefix + name: value for name, value in expected.items()}
    shutil.copy(checkpoint(runs, "unet").with_name("config.json"), tmp_path)
    torch.save(state, tmp_path / "best.pt")
    for path in (tmp_path, tmp_path / "best.pt"):
        assert same_weights(load_model(path)[0].state_dict(), expected)
    model, _, _ = started(make_experiment(tmp_path / "runs", camvid, start_from=tmp_path / "best.pt"))
    assert same_weights(model.state_dict(), expected)


def test_exported_weights_start_a_training(runs, camvid, tmp_path, call_script):
    run, exported = checkpoint(runs, "v2").parent, tmp_path / "v2" / "seed0"
    assert call_script("tools/export.py", run, "--output", exported) == 0
    rounded = {name: value.bfloat16().float() for name, value in weights_in(run / "best.pt").items()}
    path = exported / EXPORTED
    options = ["--data-dir", "nowhere", "--patch-size", "8", "--n-layer", "1", "--n-embd", "16", "--n-head", "2"]
    trial = experiment_of("train_v2_cifar10.py", " ".join([*options, "--mlp-internal-dim-multiplier 4"]))
    trial = dataclasses.replace(trial, train=dataclasses.replace(trial.train, start_from=path))
    model, _, origin = started(trial)
    for name, value in model.named_parameters():
        assert value.dtype == torch.float32 and torch.equal(value, rounded[name]), name
    assert origin == {"file": f"v2-seed0-{EXPORTED}"}
    model, _, origin = started(make_experiment(tmp_path, camvid, encoder=path))
    assert torch.equal(model.encoder.decoder, rounded["decoder"]) and origin["file"] == f"v2-seed0-{EXPORTED}"


def test_positions_are_interpolated_for_another_size(runs, camvid, tmp_path):
    path = checkpoint(runs, "unet")
    model, _, _ = started(make_experiment(tmp_path, camvid, start_from=path, img_size=(48, 64)))
    expected = interpolate_positions(weights_in(path)["encoder.pos_embed"], (4, 4), (6, 8))
    assert torch.equal(model.encoder.pos_embed, expected)


def test_rotary_frequencies_are_the_models_own(runs, camvid, tmp_path, capsys):
    experiment = make_experiment(tmp_path, camvid, start_from=checkpoint(runs, "unet"), rotary="axial")
    model, before, _ = started(experiment)
    assert torch.equal(model.encoder.attn.freqs, before["encoder.attn.freqs"])
    assert not torch.equal(model.encoder.attn.freqs, weights_in(experiment.train.start_from)["encoder.attn.freqs"])
    assert "note: the weights were trained with --rotary raster" in capsys.readouterr().out


def test_training_goes_on_from_there_and_the_run_says_so(runs, camvid, tmp_path):
    path = checkpoint(runs, "unet")
    tuned = make_experiment(tmp_path, camvid, "tuned", start_from=path)
    fit(tuned)
    config = json.loads((tuned.folder / "config.json").read_text())
    assert config["origin"] == {"file": "unet-seed0-best.pt"}
    assert config["config"]["train"]["start_from"] == "unet-seed0-best.pt"
    assert load_checkpoint(tuned.folder / "previous.pt")["epoch"] == 0
    assert same_weights(weights(tuned.folder, "previous.pt"), weights_in(path))


def test_a_resumed_run_does_not_need_the_file(runs, camvid, tmp_path):
    path = tmp_path / "unet" / "seed0" / "best.pt"
    path.parent.mkdir(parents=True)
    for name in ("best.pt", "config.json"):
        (path.parent / name).write_bytes((checkpoint(runs, "unet").parent / name).read_bytes())
    whole, cut = (make_experiment(tmp_path / name, camvid, start_from=path, epochs=2) for name in ("whole", "cut"))
    fit(whole)
    interrupt(cut, 2)
    path.unlink()
    fit(resumed(cut))
    assert same_weights(*(weights(each.folder) for each in (whole, cut)))


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (dict(n_embd=32), ["another architecture", "decoder is 64 x 16, not 128 x 32", "--n-embd 16"]),
        (
            dict(skips=True, skip_levels=(1, 1)),
            ["another architecture", "no skips.", "--no-skips", "--skip-levels 4 2"],
        ),
        (dict(num_classes=12), ["head.weight is 11 x 2", "--num-classes 11", "--encoder takes the encoder alone"]),
    ],
)
def test_another_architecture_is_refused(runs, camvid, tmp_path, model, parts):
    path = checkpoint(runs, "unet")
    with pytest.raises(UserError) as error:
        started(make_experiment(tmp_path, camvid, start_from=path, **model))
    assert all(part in str(error.value) for part in [str(path), *parts])


def test_another_model_is_refused(runs, camvid, tmp_path):
    with pytest.raises(UserError, match=r"best\.pt holds weights of a VisionBDHConfig, not of a BDHUNetConfig"):
        started(make_experiment(tmp_path, camvid, start_from=checkpoint(runs, "v2")))


def test_a_baseline_at_another_size_is_told_its_own(tmp_path, data_dir):
    sizes = dict(n_layer=1, n_embd=8, n_head=2, mlp_dim=8, patch_size=8)
    train = ClassificationConfig(**(TRAIN | dict(dataset="cifar10", train_limit=20, batch_size=8)))
    options = RunOptions(data_dir=data_dir, runs_dir=tmp_path, device="cpu")
    fit(Experiment("vit", ViTConfig(**sizes), train, options))
    train = dataclasses.replace(train, start_from=tmp_path / "vit" / "seed0" / "best.pt")
    with pytest.raises(UserError, match=r"another architecture .* \(--img-size 32\), or name another file$"):
        started(Experiment("larger", ViTConfig(**sizes, img_size=48), train, options))


def test_what_is_no_checkpoint(runs, camvid, tmp_path):
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(checkpoint(runs, "unet").read_bytes()[:1000])
    (tmp_path / "metrics.csv").write_text("epoch\n1\n")
    alone = tmp_path / "best.pt"
    alone.write_bytes(checkpoint(runs, "unet").read_bytes())  # no config.json beside it
    for path, message in [
        (alone.with_name("metrics.csv"), "cannot be read as a checkpoint"),
        (tmp_path / "nowhere.pt", "does not exist: train the run it comes from first"),
        (checkpoint(runs, "unet").parent, "is a folder: name the file in it"),
        (damaged, "cannot be read as a checkpoint"),
        (alone, "beside config.json"),
    ]:
        for fields in (dict(start_from=path), dict(encoder=path)):
            with pytest.raises(UserError, match=message) as error:
                started(make_experiment(tmp_path / "runs", camvid, **fields))
            assert str(path if path != alone else path.parent) in str(error.value)
    with pytest.raises(UserError, match="does not exist"):
        fit(make_experiment(tmp_path / "runs", camvid, start_from=tmp_path / "nowhere.pt"))
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------- the encoder


def test_a_classifiers_weights_go_into_the_encoder(runs, camvid, tmp_path, capsys):
    path = checkpoint(runs, "v2")
    model, before, origin = started(make_experiment(tmp_path, camvid, encoder=path, img_size=(48, 64)))
    theirs = weights_in(path)
    for name in ("encoder", "encoder_v", "decoder", "patch_embed.weight", "patch_embed.bias"):
        assert torch.equal(model.encoder.state_dict()[name], theirs[name]), name
    expected = interpolate_positions(theirs["pos_embed"], (4, 4), (6, 8))
    assert torch.equal(model.encoder.pos_embed, expected) and not torch.equal(expected, before["encoder.pos_embed"])
    assert all(
        torch.equal(model.state_dict()[name], before[name]) for name in before if not name.startswith("encoder.")
    )
    said = capsys.readouterr().out
    assert str(path) in said and "decoder, encoder, encoder_v, patch_embed.bias, patch_embed.weight, pos_embed" in said
    assert "positions interpolated from 4 x 4 patches" in said and "drawn: the rest of the model" in said
    assert origin["file"] == "v2-seed0-best.pt" and origin["drawn"] == []


def test_patches_of_another_size_are_drawn_anew(runs, camvid, tmp_path, capsys):
    model, before, origin = started(make_experiment(tmp_path, camvid, encoder=checkpoint(runs, "fine")))
    assert origin["drawn"] == ["patch_embed.bias", "patch_embed.weight"]  # the one is of no use without the other
    assert torch.equal(model.encoder.patch_embed.weight, before["encoder.patch_embed.weight"])
    assert not torch.equal(model.encoder.encoder, before["encoder.encoder"])
    assert "drawn: patch_embed.bias, patch_embed.weight, the rest of the model" in capsys.readouterr().out


def test_other_choices_are_told(runs, camvid, tmp_path, capsys):
    model, before, _ = started(make_experiment(tmp_path, camvid, encoder=checkpoint(runs, "axial")))
    assert torch.equal(model.encoder.attn.freqs, before["encoder.attn.freqs"])
    said = capsys.readouterr().out
    assert "note: the weights were trained with" in said and "--residual post" in said and "--rotary axial" in said


def test_the_encoder_of_another_unet_and_before_a_whole_checkpoint(runs, camvid, tmp_path):
    path = checkpoint(runs, "unet")
    model, before, origin = started(make_experiment(tmp_path, camvid, encoder=path, start_from=tmp_path / "unread.pt"))
    assert torch.equal(model.encoder.encoder, weights_in(path)["encoder.encoder"])
    assert torch.equal(model.head.weight, before["head.weight"]) and origin["file"] == "unet-seed0-best.pt"


def test_an_encoder_of_other_sizes_is_refused_with_the_flags_that_would_do(runs, camvid, tmp_path):
    experiment = make_experiment(tmp_path, camvid, encoder=checkpoint(runs, "v2"), n_embd=32, n_head=4)
    with pytest.raises(UserError, match="does not fit the encoder") as error:
        started(experiment)
    assert "--n-embd 16" in str(error.value) and "--n-head 2" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "misfit", "flag"),
    [
        (dict(qk="separate"), "encoder_k", "--qk separate"),
        (dict(residual="scaled_pre"), "level_norms", "scaled_pre"),
        (dict(blocks_after=1), "blocks_after.0.attn.proj.bias, ", "--blocks-after 1"),
    ],
)
def test_an_encoder_with_more_to_its_core_is_refused(fields, misfit, flag, runs, camvid, tmp_path, experiment_in):
    fit(experiment_in(tmp_path, "more", model=CORE | dict(patch_size=8) | fields, epochs=1, train_limit=20))
    with pytest.raises(UserError, match="does not fit the encoder") as error:
        started(make_experiment(tmp_path, camvid, encoder=tmp_path / "more" / "seed0" / "best.pt"))
    assert misfit in str(error.value) and flag in str(error.value)


def test_an_encoder_replaces_the_whole_in_the_record_too(runs, tmp_path):
    flags = ["--encoder", str(checkpoint(runs, "v2"))]
    train = SegmentationConfig(**TRAIN, start_from=tmp_path / "unread.pt")
    whole = Experiment("unet", bdh_unet_config(), train)
    assert parse_experiment(whole, []).train.start_from == tmp_path / "unread.pt"
    changed = parse_experiment(whole, [*flags, "--img-size", "48", "64"])
    assert changed.train.start_from is None
    assert changed.name == "unet+encoder=v2-seed0-best.pt+img_size=48,64"


# ---------------------------------------------------------------------------- a library


def test_weights_that_cannot_be_downloaded(camvid, tmp_path, call_script, monkeypatch, capsys):
    fail = mock.Mock(side_effect=OSError("no network\nand much more"))
    monkeypatch.setattr(ResNetUNetConfig, "load_encoder_weights", fail)
    where = ["--data-dir", camvid, "--runs-dir", tmp_path / "runs", "--device", "cpu"]
    assert call_script("train_resnet34_unet.py", "--img-size", 32, *where) == 1
    said = capsys.readouterr().err
    assert "imagenet weights could not be downloaded (no network)" in said and "--encoder-weights none" in said
    assert not (tmp_path / "runs").exists()


def test_the_librarys_weights_go_into_the_encoder_alone(camvid, tmp_path, monkeypatch):
    import segmentation_models_pytorch as smp

    theirs = smp.encoders.get_encoder("resnet34", weights=None)
    monkeypatch.setattr(smp.encoders, "get_encoder", lambda name, weights: theirs)
    experiment = make_experiment(tmp_path, camvid)
    experiment = dataclasses.replace(experiment, model=ResNetUNetConfig(img_size=32, encoder_weights="imagenet"))
    model, before, origin = started(experiment)
    encoder = {f"unet.encoder.{name}" for name in theirs.state_dict()}
    for name, value in model.state_dict().items():
        expected = theirs.state_dict()[name.removeprefix("unet.encoder.")] if name in encoder else before[name]
        assert torch.equal(value, expected), name
    assert origin == {"library": "imagenet"}


@pytest.mark.parametrize("source", ["classifier", "pretrained", "unet"])
def test_a_classifier_of_other_classes_starts_from_an_encoder(source, runs, experiment, tmp_path, capsys):
    path = checkpoint(runs, {"classifier": "fine", "pretrained": "masked", "unet": "unet"}[source])
    if source == "pretrained":
        train = PretrainingConfig(dataset="cifar10", train_limit=20, **TRAIN)
        options = experiment().options
        fit(Experiment("masked", MaskedBDHConfig(**CORE), train, dataclasses.replace(options, runs_dir=runs)))
    patch = 8 if source == "unet" else 4
    trial = experiment(model=CORE | dict(patch_size=patch, num_classes=7, img_size=48, encoder=path))
    model, before, origin = started(trial)
    theirs = {name.removeprefix("encoder."): value for name, value in weights_in(path).items()}
    for name in ("encoder", "encoder_v", "decoder", "patch_embed.weight", "patch_embed.bias"):
        assert torch.equal(model.state_dict()[name], theirs[name]), name
    assert model.pos_embed.shape[1] == (48 // patch) ** 2 and not torch.equal(model.pos_embed, before["pos_embed"])
    assert torch.equal(model.head.weight, before["head.weight"]) and model.head.weight.shape[0] == 7
    assert origin["drawn"] == ["head.bias", "head.weight"]
    assert "drawn: head.bias, head.weight\n" in capsys.readouterr().out


def test_the_head_is_drawn_even_for_as_many_classes(runs, experiment):
    model, before, _ = started(experiment(model=CORE | dict(patch_size=4, encoder=checkpoint(runs, "fine"))))
    assert torch.equal(model.head.weight, before["head.weight"])
    assert torch.equal(model.encoder, weights_in(checkpoint(runs, "fine"))["encoder"])


def test_a_classifier_from_an_encoder_trains_is_exported_and_opened(runs, experiment, tmp_path):
    trial = experiment(epochs=1, model=CORE | dict(patch_size=4, encoder=checkpoint(runs, "fine")))
    fit(trial)
    config = json.loads((trial.folder / "config.json").read_text())
    assert config["config"]["model"]["encoder"] == "fine-seed0-best.pt" and config["origin"]["taken"]
    export_weights(load_model(trial.folder)[0], trial.folder, tmp_path / "out")
    model, _ = load_model(tmp_path / "out")
    assert on_hub(model).config.encoder is None
