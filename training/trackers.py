"""Optional reporting beside metrics.csv, for those who have the packages."""

import importlib.util
from typing import Any, Protocol

from training.config import Experiment, RunOptions, UserError


class Tracker(Protocol):
    def log(self, row: dict[str, Any]) -> None:
        """One row of metrics.csv."""

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, experiment: Experiment, first_epoch: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(experiment.folder), purge_step=first_epoch)

    def log(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            if key != "epoch" and value is not None:
                self.writer.add_scalar(key, value, row["epoch"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _WeightsAndBiases:
    def __init__(self, experiment: Experiment):
        import wandb

        fields = experiment.fields()
        self.run = wandb.init(
            project=experiment.options.wandb,
            name=f"{experiment.name}/seed{experiment.train.seed}",
            config=fields["model"] | fields["train"],
            dir=str(experiment.folder),
        )

    def log(self, row: dict[str, Any]) -> None:
        self.run.log(row, step=row["epoch"])

    def close(self) -> None:
        self.run.finish()


def require_packages(options: RunOptions) -> None:
    """Raises UserError where a tracker is asked for whose package is not installed."""
    for asked, package in ((options.tensorboard, "tensorboard"), (options.wandb, "wandb")):
        if asked and importlib.util.find_spec(package) is None:
            raise UserError(f"--{package} needs a package that is not installed: pip install {package}")


def open_trackers(experiment: Experiment, first_epoch: int) -> list[Tracker]:
    """Those that were asked for. first_epoch: the next epoch, where a resumed run goes on."""
    trackers: list[Tracker] = []
    if experiment.options.tensorboard:
        trackers.append(_TensorBoard(experiment, first_epoch))
    if experiment.options.wandb:
        trackers.append(_WeightsAndBiases(experiment))
    return trackers
