"""Text as bytes for a language model: where it comes from, its parts, and batches of pieces of it."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training import seeds
from training.config import TextConfig, UserError


def load_text(path: Path | None) -> tuple[bytes, str]:
    """The bytes of a file, and what to call them; without a path, the help topics of Python in English.

    Those differ a little between versions of Python. They repeat each other, and each paragraph is taken once: else a
    twelfth of the test part would stand in the training part word for word. Raises UserError for a file that cannot be
    read.
    """
    if path is None:
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise UserError("this Python comes without pydoc_data.topics: give a file with --text") from None
        paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
        return "\n\n".join(dict.fromkeys(paragraphs)).encode(), "python topics"
    try:
        return path.read_bytes(), path.name
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a file with --text") from None


def describe(text: bytes, name: str) -> dict[str, Any]:
    """What tells this text from others, for the run's config.json."""
    return {"name": name, "bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}


class TextBatches:
    """A text on the device, in pieces of T = config.context bytes with the bytes that follow them: `tasks.Batches`.

    The parts lie one after the other, so that no piece of one is in another. Each training epoch cuts the text at an
    offset of its own. Raises UserError where a part is shorter than one piece.
    """

    split = None  # nothing is drawn

    def __init__(self, text: bytes, name: str, config: TextConfig, eval_batch_size: int, device: torch.device):
        self.config = config
        self.eval_batch_size = eval_batch_size
        n_test, n_val = (round(share * len(text)) for share in (config.test_fraction, config.val_fraction))
        ends = (len(text) - n_val - n_test, len(text) - n_test, len(text))
        codes = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy()).to(device)
        self.parts = dict(zip(("train", "val", "test"), codes.tensor_split(ends)[:3], strict=True))
        if any(self.size(part) < 1 for part in self.parts):
            raise UserError(
                f"{len(text):,} bytes are too few for pieces of {config.context} in each of the training, validation "
                "and test part: give a longer --text or a smaller --context"
            )
        self.description = describe(text, name)

    def size(self, part: str) -> int:
        """Pieces of "train", "val" or "test"; of training text, one less than fit, to leave room for the offset."""
        fit = (len(self.parts[part]) - 1) // self.config.context
        return fit - 1 if part == "train" else fit

    def train_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every piece once: bytes (B, T) int64, and for each the byte that follows it."""
        draws = seeds.generator("order", self.config.seed, epoch)
        offset = int(torch.randint(self.config.context, (), generator=draws))
        order = torch.randperm(self.size("train"), generator=draws)
        yield from self._batches("train", order * self.config.context + offset, self.config.batch_size)

    def eval_batches(self, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The pieces of a part in order; what is left over at its end is too short to count."""
        yield from self._batches(part, torch.arange(self.size(part)) * self.config.context, self.eval_batch_size)

    def _batches(self, part: str, starts: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        text = self.parts[part]
        window = torch.arange(self.config.context + 1, device=text.device)
        for first in starts.to(text.device).split(batch_size):
            pieces = text[first[:, None] + window].long()  # (B, T + 1)
            yield pieces[:, :-1], pieces[:, 1:]
