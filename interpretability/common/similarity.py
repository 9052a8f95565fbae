"""Similarity of two representations of the same images: linear CKA and SVCCA.

A representation is a matrix (n images, F features); F may differ between two. Both measures ignore shifts, rotations
and a common scale of the features. SVCCA compares subspaces only, so it also ignores any invertible linear map of the
directions that it keeps.
"""

from collections.abc import Sequence

import numpy as np

CONSTANT = 1e-6  # features whose deviation from the mean, relative to their size, is smaller are float32 rounding
VARIANCE = 0.99  # share of the variance explained by the directions that SVCCA keeps
IMAGES_PER_DIMENSION = 5  # least for SVCCA (its authors' code asks for 5 to 10); with fewer, noise correlates


def unbiased_hsic(representations: Sequence[np.ndarray]) -> np.ndarray:
    """(R, R), unbiased estimate of HSIC for every pair of R representations (n, F) of the same n images.

    With Gram matrices K and L of centred features and zeros on their diagonals (Song et al. 2012, equation 5):
    (tr(K L) + 1'K1 1'L1 / ((n - 1) (n - 2)) - 2 1'K L1 / (n - 2)) / (n (n - 3)). May be negative for K unlike L.
    Raises ValueError for n below 4.
    """
    n = len(representations[0])
    if n < 4:
        raise ValueError(f"the unbiased estimate of HSIC needs at least 4 images, not {n}")
    grams = np.zeros((len(representations), n, n))
    for gram, x in zip(grams, representations, strict=True):
        x = np.asarray(x, dtype=np.float64)
        centred = x - x.mean(axis=0)
        if np.linalg.norm(centred) > CONSTANT * np.linalg.norm(x):  # otherwise the same for all images: zeros
            gram[:] = centred @ centred.T
            np.fill_diagonal(gram, 0)
    rows = grams.sum(axis=2)  # (R, n)
    totals = rows.sum(axis=1)  # (R,)
    flat = grams.reshape(len(grams), -1)
    traces = flat @ flat.T
    return (traces + np.outer(totals, totals) / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ rows.T) / (n * (n - 3))


def linear_cka(hsic: np.ndarray) -> np.ndarray:
    """(R, R), linear CKA (Kornblith et al. 2019, arXiv 1905.00414) of R representations: 1 on the diagonal, symmetric.

    hsic: (R, R), the sum of `unbiased_hsic` over batches. Summing before taking the ratio makes the expected result
    independent of the batch size, if batches are drawn at random (Nguyen et al. 2021, arXiv 2010.15327, equations 2 to
    4). Values lie between -1 and 1; unrelated representations average 0. NaN for a representation that is the same for
    all images.
    """
    norms = np.outer(np.diag(hsic), np.diag(hsic))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(norms > 0, hsic / np.sqrt(norms), np.nan)


def main_directions(x: np.ndarray, variance: float = VARIANCE) -> np.ndarray:
    """(n, k), the fewest principal components of x (n, F) that explain this share of its variance, each of length 1.

    k is 0 if all images have the same features.
    """
    x = np.asarray(x, dtype=np.float64)
    left, sizes, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    real = sizes > CONSTANT * np.linalg.norm(x)  # the others are rounding
    explained = np.cumsum(np.where(real, sizes**2, 0.0))
    if not real.any():
        return left[:, :0]
    return left[:, : min(real.sum(), 1 + np.searchsorted(explained, variance * explained[-1]))]


def svcca(a: np.ndarray, b: np.ndarray) -> float:
    """Mean canonical correlation (Raghu et al. 2017, arXiv 1706.05806), 0 to 1, of `main_directions` (n, k) and (n, l).

    NaN if k or l is 0. For unrelated directions it is about sqrt(max(k, l) / n), not 0.
    """
    if not min(a.shape[1], b.shape[1]):
        return np.nan
    return float(np.linalg.svd(a.T @ b, compute_uv=False).mean())
