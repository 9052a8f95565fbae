"""The best weights of a run as a small file that scripts open in place of the checkpoint."""

import shutil

import pytest
import torch

from training.loop import fit
from training.runs import load_model
from training.stored import EXPORTED

SCRIPT = "tools/export_weights.py"


@pytest.fixture
def run_and_copy(experiment, tmp_path):
    """A trained run, and a folder that has only its config.json."""
    trial = experiment(epochs=1)
    fit(trial)
    copy = tmp_path / "results" / "trial" / "seed0"
    copy.mkdir(parents=True)
    shutil.copy(trial.folder / "config.json", copy)
    return trial.folder, copy


def test_a_folder_with_exported_weights_opens_as_the_run_does(run_and_copy, call_script):
    run, copy = run_and_copy
    assert call_script(SCRIPT, run, "--to", copy) == 0
    before, config = load_model(run)
    after, same = load_model(copy)
    assert same == config and not after.training
    parameters = dict(before.named_parameters())
    for name, tensor in after.state_dict().items():
        expected = parameters[name].detach().bfloat16().float() if name in parameters else before.state_dict()[name]
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected)
    assert (copy / EXPORTED).stat().st_size < 2.5 * sum(p.numel() for p in parameters.values()) + 4096
    images = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(after(images), before(images), atol=0.05, rtol=0.05)


def test_a_checkpoint_is_preferred_to_what_was_exported_from_it(run_and_copy, call_script):
    run, copy = run_and_copy
    shutil.copy(run / "best.pt", copy)
    (copy / EXPORTED).write_bytes(b"damaged")
    assert torch.equal(load_model(copy)[0].encoder, load_model(run)[0].encoder)


def test_what_cannot_be_exported_or_opened_is_refused_with_one_message(run_and_copy, call_script, tmp_path, capsys):
    run, copy = run_and_copy
    assert call_script(SCRIPT, tmp_path, "--to", copy) == 1
    assert "config.json and best.pt" in capsys.readouterr().err
    (copy / "config.json").unlink()
    assert call_script(SCRIPT, run, "--to", copy) == 1
    assert "has no config.json: copy that of" in capsys.readouterr().err
    shutil.copy(run / "config.json", copy)
    (copy / EXPORTED).write_bytes(b"damaged")
    assert call_script("interpretability/visualize_attention.py", "--run", copy) == 1
    assert "config.json and best.pt" in capsys.readouterr().err
