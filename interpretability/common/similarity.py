"""How alike two representations of the same images are: linear CKA and SVCCA.

A representation is a matrix (n images, F features); two may differ in F. Both measures are blind to rotations of the
features and to their common scale; SVCCA, which looks at subspaces only, also to any invertible linear map of the
directions that it keeps. Neither sees a shift.
"""

from collections.abc import Sequence

import numpy as np

CONSTANT = 1e-6  # features that deviate from their mean by less, relative to their size, are rounding of float32
VARIANCE = 0.99  # share that the directions kept by SVCCA explain
IMAGES_PER_DIMENSION = 5  # for SVCCA; its authors' code asks for 5 to 10, or correlations are found in anything


def gram(x: np.ndarray) -> np.ndarray:
    """(n, n) products of centred features in float64, zeros where all images have the same. x: (n, F)."""
    x = np.asarray(x, dtype=np.float64)
    centred = x - x.mean(axis=0)
    if np.linalg.norm(centred) <= CONSTANT * np.linalg.norm(x):
        return np.zeros((len(x), len(x)))
    return centred @ centred.T


def unbiased_hsic(grams: np.ndarray) -> np.ndarray:
    """(R, R), the unbiased estimate of HSIC of every pair among R Gram matrices of the same n images.

    grams: (R, n, n), n at least 4. With zeros on the diagonals of K and L (Song et al. 2012, equation 5):
    (tr(K L) + 1'K1 1'L1 / ((n - 1) (n - 2)) - 2 1'K L1 / (n - 2)) / (n (n - 3)). It may be negative for K unlike L.
    """
    n = grams.shape[1]
    if n < 4:
        raise ValueError(f"the unbiased estimate of HSIC needs at least 4 images, not {n}")
    off_diagonal = grams * (1 - np.eye(n))
    rows = off_diagonal.sum(axis=2)  # (R, n)
    totals = rows.sum(axis=1)  # (R,)
    flat = off_diagonal.reshape(len(grams), -1)
    traces = flat @ flat.T
    return (traces + np.outer(totals, totals) / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ rows.T) / (n * (n - 3))


class MiniBatchCKA:
    """Linear CKA of every pair among R representations (Kornblith et al. 2019, arXiv 1905.00414), a batch at a time.

    Sums unbiased HSIC over batches before it takes the ratio (Nguyen et al. 2021, arXiv 2010.15327, equations 2 to 4),
    so that the result does not depend on the batches' size but by chance, if they are drawn at random. It lies between
    -1 and 1; unrelated representations have 0 on average, so that single values may be below.
    """

    def __init__(self):
        self._sum: np.ndarray | float = 0.0

    def add(self, representations: Sequence[np.ndarray]) -> None:
        """One batch. representations: R times (n, F), of the same n images in the same order, n at least 4."""
        self._sum = self._sum + unbiased_hsic(np.stack([gram(x) for x in representations]))

    def result(self) -> np.ndarray:
        """(R, R), symmetric with 1 on the diagonal; NaN for a representation that is the same of all images."""
        return normalised(np.asarray(self._sum))


def normalised(hsic: np.ndarray) -> np.ndarray:
    """CKA from HSIC, both (R, R)."""
    own = np.diag(hsic)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.outer(own, own) > 0, hsic / np.sqrt(np.outer(own, own)), np.nan)


def main_directions(x: np.ndarray, variance: float = VARIANCE) -> np.ndarray:
    """(n, k), the fewest principal components that explain this share of the variance, scaled to length 1.

    x: (n, F). k is 0 where all images have the same features.
    """
    x = np.asarray(x, dtype=np.float64)
    centred = x - x.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    there = sizes > CONSTANT * np.linalg.norm(x)  # the rest is rounding
    explained = np.cumsum(np.where(there, sizes**2, 0.0))
    if not there.any():
        return left[:, :0]
    return left[:, : min(there.sum(), 1 + np.searchsorted(explained, variance * explained[-1]))]


def svcca(a: np.ndarray, b: np.ndarray) -> float:
    """Mean canonical correlation between two sets of directions (Raghu et al. 2017, arXiv 1706.05806), 0 to 1.

    a: (n, k), b: (n, l), what `main_directions` gives of two representations of the same images. NaN where k or l is 0.
    There are min(k, l) correlations; of n images of unrelated directions they are about sqrt(max(k, l) / n), not 0.
    """
    if not min(a.shape[1], b.shape[1]):
        return np.nan
    return float(np.linalg.svd(a.T @ b, compute_uv=False).mean())
