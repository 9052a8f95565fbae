"""Seeds of all random draws, derived from the run's seed, so that a resumed run repeats each draw."""

import numpy as np
import torch

STREAMS = {
    "split": 0,
    "weights": 1,
    "order": 2,
    "augmentation": 3,
    "model": 4,
    "padding": 5,
    "randaugment": 6,
    "erasing": 7,
    "mixing": 8,
    "crops": 9,
    "sizes": 10,
}


def derive(stream: str, seed: int, epoch: int = 0, rank: int = 0) -> int:
    """A 63-bit seed for one stream, independent of the others. rank: of the process, if several train together."""
    words = np.random.SeedSequence([STREAMS[stream], seed, epoch, rank]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def generator(stream: str, seed: int, epoch: int = 0) -> torch.Generator:
    """A CPU generator with that seed: the same draws whatever the device."""
    return torch.Generator().manual_seed(derive(stream, seed, epoch))
