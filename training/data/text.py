"""Text for a byte-level language model: reading, train, validation and test parts, and batches."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training import processes, seeds
from training.config import TextConfig, UserError
from training.data.finding import printable


@dataclass(frozen=True)
class Text:
    """The bytes of one text."""

    name: str
    content: bytes

    @property
    def description(self) -> dict[str, Any]:
        """Identifies the text: stored in config.json and compared at resume."""
        return {
            "name": self.name,
            "bytes": len(self.content),
            "sha256": hashlib.sha256(self.content).hexdigest(),
        }


def load_text(path: Path | None) -> Text:
    """A file; without a path, Python's help topics in English, which differ a little between Python versions.

    The topics repeat each other, so each paragraph is taken once: otherwise a twelfth of the test set would also be in
    the training set. Raises UserError if the file cannot be read.
    """
    if path is None:
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise UserError("this Python comes without pydoc_data.topics: give a file with --text") from None
        paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
        return Text("python topics", "\n\n".join(dict.fromkeys(paragraphs)).encode())
    try:
        return Text(printable(path.name), path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a file with --text") from None


class TextBatches:
    """Batches of one text in pieces of T = config.context bytes, with the next byte as target: `tasks.Batches`.

    The parts follow each other in the text and do not overlap. Each training epoch cuts the text at its own offset.
    Raises UserError if a part is shorter than one piece.
    """

    split = None  # nothing is drawn

    def __init__(self, text: Text, config: TextConfig, eval_batch_size: int, device: torch.device):
        self.config = config
        content = text.content
        self.eval_batch_size = eval_batch_size
        n_test, n_val = (round(share * len(content)) for share in (config.test_fraction, config.val_fraction))
        ends = (len(content) - n_val - n_test, len(content) - n_test, len(content))
        codes = torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy()).to(device)
        self.parts = dict(zip(("train", "val", "test"), codes.tensor_split(ends)[:3], strict=True))
        if any(self.size(part) < 1 for part in self.parts):
            raise UserError(
                f"{len(content):,} bytes are too few for pieces of {config.context} in each of the training, "
                "validation and test part: give a longer --text or a smaller --context"
            )

    def size(self, part: str) -> int:
        """Pieces of "train", "val" or "test"; of the training text one less than fit, to leave room for the offset."""
        fit = (len(self.parts[part]) - 1) // self.config.context
        return fit - 1 if part == "train" else fit

    def train_batches(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Every piece once: bytes (B, T) int64, and the byte after each."""
        draws = seeds.generator("order", self.config.seed, epoch)
        offset = int(torch.randint(self.config.context, (), generator=draws))
        order = torch.randperm(self.size("train"), generator=draws)
        starts = (order * self.config.context + offset)[first * self.config.batch_size :]
        yield from self._batches("train", starts, self.config.batch_size)

    def eval_batches(self, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The pieces of a part in order; a shorter rest at its end is dropped."""
        yield from self._batches(part, torch.arange(self.size(part)) * self.config.context, self.eval_batch_size)

    def _batches(self, part: str, starts: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        text = self.parts[part]
        window = torch.arange(self.config.context + 1, device=text.device)
        for batch in starts.to(text.device).split(batch_size):
            mine = batch[processes.share(len(batch))]
            pieces = text[mine[:, None] + window].long()  # (B, T + 1)
            yield pieces[:, :-1], pieces[:, 1:]
