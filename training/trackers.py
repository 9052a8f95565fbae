"""Optional reporting beside metrics.csv: TensorBoard and Weights & Biases."""

import importlib.util
from typing import Any

from training.config import UserError
from training.experiment import Experiment


class Trackers:
    """The trackers that the run options ask for. Raises UserError if a package is missing."""

    def __init__(self, experiment: Experiment):
        self.experiment, options = experiment, experiment.options
        self.wandb = self.writer = None
        for asked, package in ((options.tensorboard, "tensorboard"), (options.wandb, "wandb")):
            if asked and importlib.util.find_spec(package) is None:
                raise UserError(f"--{package} needs a package that is not installed: pip install {package}")

    def connect(self, run_id: str | None) -> None:
        """Opens what may fail (a login), before anything in the run's folder is replaced.

        run_id: a resumed run continues the same W&B run.
        """
        if not self.experiment.options.wandb:
            return
        import wandb

        configuration = self.experiment.configuration
        try:
            self.wandb = wandb.init(
                project=self.experiment.options.wandb,
                name=f"{self.experiment.name}/seed{self.experiment.train.seed}",
                config=configuration.model | configuration.train,
                dir=str(self.experiment.folder),
                id=run_id,
                resume="allow",
            )
        except Exception as error:  # wandb raises errors of many kinds
            raise UserError(f"Weights & Biases could not be reached ({error}): log in with `wandb login`") from None

    def open_files(self, first_epoch: int) -> None:
        """Opens the writers of files in the run's folder. first_epoch: later events of an earlier try are purged."""
        if self.experiment.options.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.experiment.folder), purge_step=first_epoch)

    def log(self, row: dict[str, Any]) -> None:
        """One row of metrics.csv."""
        if self.wandb is not None:
            self.wandb.log(row, step=row["epoch"])
        if self.writer is not None:
            for key, value in row.items():
                if key != "epoch" and value is not None:
                    self.writer.add_scalar(key, value, row["epoch"])
            self.writer.flush()

    def close(self) -> None:
        if self.wandb is not None:
            self.wandb.finish()
        if self.writer is not None:
            self.writer.close()
