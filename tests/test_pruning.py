"""Pruning of neurons: the smaller model computes what the whole one does with the dropped neurons silenced."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from training import UserError
from models.bdh_unet import bdh_unet_config
from models.pruning import core_of, kept_neurons, neuron_counts, pruned
from models.video_bdh import v4_video_config
from models.vision_bdh import v1_config, v2_config, v3_config
from tests.inspecting import with_large_weights
from tests.trials import resumed, same_weights, weights
from tools.exporting.pruned import fine_tuning_command, importance, prune
from training.command_line import experiment_of
from training.experiment import RunOptions
from training.loop import fit
from training.runs import load_model
from training.start import take_encoder
from training.stored import EXPORTED

SIZES = dict(n_layer=3, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4)  # N = 16
IMAGES = torch.rand(3, 3, 32, 32, dtype=torch.float64) * 2 - 1
MODELS = {
    "v1": v1_config(**SIZES, patch_size=8),
    "v2, axial, class token": v2_config(**SIZES, patch_size=8, rotary="axial", pool="cls"),
    "v3, own weights for each level": v3_config(**SIZES, patch_size=8, shared=False),
    "separate keys, no gate": v2_config(**SIZES, patch_size=8, qk="separate", gate="none"),
    "sigmoid gate, no rotation": v2_config(**SIZES, patch_size=8, gate="sigmoid", rotary="none"),
    "hybrid": v2_config(**SIZES, patch_size=8, blocks_before=1, blocks_after=1),
    "video": v4_video_config(**SIZES | dict(mlp_internal_dim_multiplier=8), patch_size=8, n_frames=2, in_channels=6),
    "BDH-UNet": bdh_unet_config(n_layer=2, n_embd=32, n_head=2, mlp_internal_dim_multiplier=2, img_size=32),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_model_is_the_whole_one_with_neurons_silenced(name):
    config = MODELS[name]
    images = IMAGES.repeat(1, config.in_channels // 3, 1, 1)
    model = with_large_weights(config.build()).double()
    needed = importance(model, [images[:2], images[2:]])
    N = config.n_neurons
    assert needed.shape == (2, N) and (needed >= 0).all()
    kept = kept_neurons(needed, N // 2, config.rotary_parts)
    assert (kept[:, 1::2] == kept[:, 0::2] + 1).all() and (kept[:, 0::2] % 2 == 0).all()
    small = pruned(model, kept)
    assert core_of(small).encoder.shape[-1] == small.config.n_neurons == N // 2
    core = core_of(model)
    dropped = torch.ones(2, N, dtype=torch.bool).scatter(1, kept, False)
    with torch.no_grad():
        for each in ("encoder", "encoder_v", "encoder_k"):
            if hasattr(core, each):
                getattr(core, each).masked_fill_(dropped[:, None], 0)
    expected = model(images)
    for use_fast_path in (True, False):
        core_of(small).use_fast_path = use_fast_path
        torch.testing.assert_close(small(images), expected, atol=1e-11, rtol=1e-9)
    if config.rotary != "none":  # the test would fail with the frequencies of a model built with N / 2 neurons
        core_of(small).attn.freqs = core_of(dataclasses.replace(small.config).build()).attn.freqs.double()
        core_of(small).attn._tables = {}
        assert (small(images) - expected).abs().max() > 1e-6


def gated_activity(model):
    """Of every level for IMAGES: (B, H, T, N) each."""
    level_inputs = []
    handle = model.level_input.register_forward_pre_hook(lambda module, args: level_inputs.append(args[0]))
    model(IMAGES)
    handle.remove()
    return [model.level_activity(x, level).gated for level, x in enumerate(level_inputs)]


def test_what_is_needed_is_measured_at_every_level():
    """By hand: the sum over levels and tokens of gated activity, times the length of the decoder's row."""
    model = with_large_weights(MODELS["v3, own weights for each level"].build()).double()
    gated = gated_activity(model)
    rows = model.decoder.unflatten(1, (2, 16)).norm(dim=-1)  # (levels, H, N)
    expected = sum(each.sum((0, 2)) * row for each, row in zip(gated, rows, strict=True))
    torch.testing.assert_close(importance(model, [IMAGES]), expected.detach())
    activity = importance(model, [IMAGES], "activity")
    torch.testing.assert_close(activity, sum(each.sum((0, 2)) for each in gated).detach())
    assert not model.level_input._forward_pre_hooks and not model.patch_embed._forward_hooks


def test_activity_counts_without_its_sign():
    fields = dict(n_layer=1, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, patch_size=8, activation="gelu")
    model = with_large_weights(v2_config(**fields).build()).double()
    (gated,) = gated_activity(model)
    assert (gated < 0).any()
    torch.testing.assert_close(importance(model, [IMAGES], "activity"), gated.abs().sum((0, 2)).detach())


def test_neurons_that_the_decoder_hardly_reads_go_first():
    model = with_large_weights(MODELS["v1"].build()).double()
    with torch.no_grad():
        model.decoder.view(2, 16, 8)[:, :8] *= 1e-6  # however active they are
    smaller = prune(model, [IMAGES], 0.5)
    assert torch.equal(smaller.decoder.view(2, 8, 8), model.decoder.view(2, 16, 8)[:, 8:])


def test_the_most_needed_pairs_are_kept():
    needed = torch.tensor([[0, 9, 5, 5, 1, 1, 8, 0.0], [1, 1, 2, 2, 3, 3, 4, 4]])
    assert kept_neurons(needed, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert kept_neurons(needed, 4, parts=2).tolist() == [[2, 3, 6, 7], [2, 3, 6, 7]]


def test_models_and_numbers_that_cannot_be_pruned():
    assert neuron_counts(v2_config()) == list(range(32, 1025, 32))
    assert neuron_counts(v2_config(n_embd=9, n_head=3, mlp_internal_dim_multiplier=4)) == [6, 12]
    clips = v4_video_config(n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, n_frames=2, in_channels=6)
    assert neuron_counts(clips) == [8, 12, 16]  # 4 are too few for three axes
    for fields, word in ((dict(attention="softmax"), "attention = softmax"), (dict(qk_norm=True), "qk_norm")):
        with pytest.raises(ValueError, match=word):
            pruned(v2_config(**SIZES, **fields).build(), torch.arange(8).expand(2, -1))
    with pytest.raises(ValueError, match="6 neurons per head: choose one of 4, 8, 12, 16"):
        pruned(MODELS["v1"].build(), torch.arange(6).expand(2, -1))
    with pytest.raises(ValueError, match="a Linear has no neurons"):
        importance(torch.nn.Linear(2, 2), [])


def test_a_pruned_run_opens_trains_on_and_resumes(experiment, call_script, capsys):
    """From the command that export.py prints."""
    trial = experiment("v2_cifar10", epochs=1, model=dict(dropout=0.25))
    fit(trial)
    options = ("--data-dir", trial.options.data_dir, "--to", "pruned", "--calibration-images", 20)
    assert call_script("tools/export.py", trial.folder, *options) == 0
    said = capsys.readouterr().out
    assert re.search(r"16 neurons per head: test accuracy .* on 40 images -> 8: test accuracy", said)
    folder = trial.folder / "pruned_8"
    model, config = load_model(folder)
    assert model.attn.freqs.shape == (1, 2, 1, 8)
    assert config["parameters"] == sum(each.numel() for each in model.parameters())
    assert json.loads((folder / "config.json").read_text())["origin"]["pruned_from"] == "v2_cifar10"
    (command,) = [line for line in said.splitlines() if line.startswith("python train_")]
    _, script, *flags = shlex.split(command)
    again = experiment_of(script, " ".join([*flags, "--device", "cpu"]))
    assert again.model.dropout == 0.25
    again = dataclasses.replace(
        again, options=RunOptions(**(vars(trial.options) | dict(name=None, eval_batch_size=20))), name="more"
    )
    again = dataclasses.replace(again, train=dataclasses.replace(again.train, epochs=2))
    fit(again)
    assert weights(again.folder)["attn.freqs"].equal(model.attn.freqs)
    encoder, tokens = model.config.build().eval(), torch.randn(2, 16, 8)
    take_encoder(encoder, folder / EXPORTED)
    with torch.no_grad():
        assert encoder.levels(tokens).equal(model.levels(tokens))  # with the rotary frequencies that pruning kept
    whole = weights(again.folder)
    (again.folder / "summary.json").unlink()
    (again.folder / "previous.pt").replace(again.folder / "last.pt")
    fit(resumed(again))
    assert same_weights(weights(again.folder), whole)


def test_the_command_for_a_run_of_another_name_says_what_it_lacks(experiment):
    model = experiment("mine").model.build()
    command = fine_tuning_command(model, {"experiment": "mine+epochs=3"}, Path("a b/best.safetensors"))
    multiplier = model.config.mlp_internal_dim_multiplier
    assert command.startswith("python SCRIPT AND FLAGS OF THE RUN --mlp-internal-dim-multiplier")
    assert command.endswith(f"{multiplier} --start-from 'a b/best.safetensors'")


def test_what_cannot_be_pruned_gets_one_message(experiment_in, tmp_path):
    from tools.exporting.pruned import prune

    with pytest.raises(UserError, match="attention = softmax"):
        prune(v2_config(**SIZES, attention="softmax").build(), [], 0.5)
