"""What the tests of interpretability/ share: small models, tiny runs, one-line error messages."""

import dataclasses
import re

import torch
from torch import nn

from training import Experiment, PretrainingConfig, RunOptions, SegmentationConfig, fit
from models.bdh_unet import bdh_unet_config
from models.masked_bdh import MaskedBDHConfig
from tests.camvid_data import write_camvid

VIT = dict(img_size=8, patch_size=2, n_layer=3, n_embd=16, n_head=2)  # 4 x 4 patches
BDH = VIT | dict(mlp_internal_dim_multiplier=4)  # 32 neurons a head


def with_large_weights(model, std=0.3):
    """In evaluation mode, with weights so large that all parts matter."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model.eval()


def train_unet(folder, img_size=(32, 40), n_layer=1, n_val=2, name="unet", **fields):
    """Folder of a tiny BDH-UNet run below folder, where its made-up data_camvid (48 x 32 pixels) are too."""
    write_camvid(folder / "data_camvid", n_train=3, n_val=n_val, size=(48, 32))
    model = bdh_unet_config(img_size=img_size, n_layer=n_layer, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4)
    train = SegmentationConfig(epochs=1, batch_size=2, learning_rate=1e-2, weight_decay=0.0, **fields)
    options = RunOptions(data_dir=folder, runs_dir=folder / "runs", device="cpu", num_workers=0)
    trial = Experiment(name, model, train, options)
    fit(trial)
    return trial.folder


def train_masked(experiment):
    """Folder of a tiny pretraining run."""
    train = PretrainingConfig(dataset="cifar10", epochs=1, batch_size=32, learning_rate=1e-2, weight_decay=0.05)
    model = MaskedBDHConfig(patch_size=8, n_layer=1, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4)
    trial = dataclasses.replace(experiment("masked", epochs=1), model=model, train=train)
    fit(trial)
    return trial.folder


def check_error(capsys, message):
    """One line on stderr, in which the regular expression is found."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and re.search(message, error), error
