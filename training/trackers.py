"""Optional reporting beside metrics.csv, for those who have the packages."""

from typing import Any, Protocol

from training.config import Experiment, UserError


class Tracker(Protocol):
    def log(self, row: dict[str, Any]) -> None:
        """One row of metrics.csv."""

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, experiment: Experiment, first_epoch: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard needs a package that is not installed: pip install tensorboard") from None
        self.writer = SummaryWriter(str(experiment.folder), purge_step=first_epoch)

    def log(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            if key != "epoch":
                self.writer.add_scalar(key, value, row["epoch"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _WeightsAndBiases:
    def __init__(self, experiment: Experiment):
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb needs a package that is not installed: pip install wandb") from None
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


def open_trackers(experiment: Experiment, first_epoch: int) -> list[Tracker]:
    """Those that were asked for. first_epoch: the next epoch, where a resumed run goes on. Raises UserError."""
    trackers: list[Tracker] = []
    if experiment.options.tensorboard:
        trackers.append(_TensorBoard(experiment, first_epoch))
    if experiment.options.wandb:
        trackers.append(_WeightsAndBiases(experiment))
    return trackers
