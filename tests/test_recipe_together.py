"""The recipe's fields, all of them on: kill and resume, recompute, accumulated batches."""

import dataclasses
import functools
import signal

import torch

from training import fit, loop
from tests.children import before, kill, launch_in_child, nth
from tests.trials import read_rows, resumed
from training.data.batches import ImageBatches
from training.stored import load_checkpoint

EVERYTHING = dict(
    optimizer="muon",
    learning_rate=3e-3,
    adamw_learning_rate=1e-3,
    decay="matrices",
    schedule="trapezoid",
    ema=0.9,
    horizontal_flip=True,
    crop_padding=2,
    randaugment=2,
    random_erasing=0.3,
    mixup=0.8,
    cutmix=1.0,
    label_smoothing=0.1,
    repeat_augment=2,
    eval_flip=True,
)
AT_SEVERAL_SIZES = dict(train_sizes=(24, 32, 40), eval_scales=(0.75, 1.0))


def weights_of(trial):
    state = load_checkpoint(trial.folder / "last.pt")
    return state["model"] | {f"average {name}": value for name, value in state["average"].items()}


def kill_in_the_third_epoch():
    before(loop, "optimizer_step", nth(15, lambda session: kill()))


def test_a_run_resumed_after_a_kill_is_bit_identical_and_one_with_recompute_too(experiment):
    make = functools.partial(
        experiment, epochs=3, model=dict(dropout=0.2, drop_path=0.2), **EVERYTHING, **AT_SEVERAL_SIZES
    )
    whole, killed, again = make("whole"), make("killed"), make("again", options={"recompute": True})
    fit(whole)
    code, _ = launch_in_child(killed, kill_in_the_third_epoch)
    assert code == -signal.SIGKILL
    fit(resumed(killed))
    fit(again)
    expected = weights_of(whole)
    for trial in (killed, again):
        actual = weights_of(trial)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(value, actual[name]) for name, value in expected.items()), trial.name
        assert read_rows(trial.folder, measured=False) == read_rows(whole.folder, measured=False)


def test_accumulated_batches_are_one_batch(experiment, monkeypatch):
    make = functools.partial(experiment, epochs=1, model=dict(dropout=0.0))
    trials = two, one, other = (
        make("two", batch_size=16, grad_accum=2, **EVERYTHING),
        make("one", batch_size=32, **EVERYTHING),
        make("other", batch_size=32, **EVERYTHING | dict(mixup=0.0)),  # so that the comparison can fail
    )
    real = ImageBatches.train_batches

    def joined(self, epoch, first=0):
        """Pairs of batches of 16 as one."""
        self.config = dataclasses.replace(self.config, batch_size=16)
        self.augmentations = self.config.make_augmentations(10)
        halves = real(self, epoch, first)
        for images, labels in halves:
            more_images, more_labels = next(halves)
            yield torch.cat((images, more_images)), torch.cat((labels, more_labels))

    for trial in trials:
        with monkeypatch.context() as patch:
            if trial is not two:
                patch.setattr(ImageBatches, "train_batches", joined)
            fit(trial)

    def close(trial):
        expected = weights_of(two)
        return all(
            torch.allclose(value, expected[name], rtol=1e-3, atol=2e-5) for name, value in weights_of(trial).items()
        )

    assert close(one) and not close(other)
