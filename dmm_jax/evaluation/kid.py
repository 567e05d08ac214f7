"""Distances by kernels, in float64 on the host: KID (arXiv:1801.01401), for small n, and CMMD (arXiv:2401.09603)."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from dmm_jax.runtime.errors import UserError

NUM_SUBSETS, SUBSET_SIZE = 100, 1000
SUBSET_SEED = 2020  # torch-fidelity's, whose subsets these are.
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
ROWS_AT_ONCE = 1024  # Of the kernel matrix.


@dataclass(frozen=True)
class Features:
    """The features seen so far, all of them: a kernel compares each with each."""

    parts: tuple[Float[np.ndarray, "_ D"], ...] = ()

    @property
    def count(self) -> int:
        """Of pictures."""
        return sum(map(len, self.parts))

    @property
    def rows(self) -> Float[np.ndarray, "n D"]:
        """One a picture."""
        return np.concatenate(self.parts)

    def update(self, features: Float[np.ndarray, "n D"]) -> "Features":
        """Returns the same with n more."""
        return Features((*self.parts, features))


class Kid(NamedTuple):
    """Mean and standard deviation over the subsets; the mean of two samples of one distribution is 0, either side."""

    mean: float
    std: float


def kernel_inception_distance(
    a: Float[np.ndarray, "n D"],
    b: Float[np.ndarray, "m E"],
    num_subsets: int = NUM_SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = SUBSET_SEED,
) -> Kid:
    """Returns the unbiased squared discrepancy under (x.y / D + 1)^3, averaged over random subsets.

    Raises:
      ValueError: the widths differ, or either set is smaller than a subset, which needs two.
    """
    _check_width(a, b)
    if not 2 <= subset_size <= min(len(a), len(b)):
        raise UserError(
            f"a subset must have from 2 to {min(len(a), len(b))} features, as many as the smaller set; "
            f"got {subset_size}. Draw more pictures or take smaller subsets, and say so beside the number."
        )
    rng, found = np.random.RandomState(seed), np.empty(num_subsets)
    for index in range(num_subsets):
        one = a[rng.choice(len(a), subset_size, replace=False)]
        other = b[rng.choice(len(b), subset_size, replace=False)]
        found[index] = _unbiased(one.astype(np.float64), other.astype(np.float64))
    return Kid(float(found.mean()), float(found.std()))


def _unbiased(a: Float[np.ndarray, "k D"], b: Float[np.ndarray, "k D"]) -> float:
    count = len(a)
    within = sum(kernel.sum() - np.trace(kernel) for kernel in (_polynomial(a, a), _polynomial(b, b)))
    return within / (count * (count - 1)) - 2.0 * _polynomial(a, b).mean()


def _polynomial(a: Float[np.ndarray, "k D"], b: Float[np.ndarray, "k D"]) -> Float[np.ndarray, "k k"]:
    return (a @ b.T / a.shape[1] + 1.0) ** 3


def cmmd(a: Float[np.ndarray, "n D"], b: Float[np.ndarray, "m E"]) -> float:
    """Returns 1000 times the biased squared discrepancy of CLIP's image embeddings under a Gaussian of width 10.

    Args:
      a, b: of ViT-L/14 at 336 pixels, each brought to length 1, as the published numbers have them.

    Raises:
      ValueError: the widths differ, a set is empty, or an embedding is not of length 1.
    """
    _check_width(a, b)
    for what in (a, b):
        lengths = np.linalg.norm(what.astype(np.float64), axis=1)
        if not len(what) or not np.allclose(lengths, 1.0, atol=1e-3):
            raise UserError(
                f"CMMD compares embeddings of length 1; got {len(what)}, of length "
                f"{lengths.min(initial=np.inf):g} to {lengths.max(initial=0.0):g}. Divide each by its length."
            )
    within = _mean_gaussian(a, a) + _mean_gaussian(b, b)
    return float(CMMD_SCALE * (within - 2.0 * _mean_gaussian(a, b)))


def _mean_gaussian(a: Float[np.ndarray, "n D"], b: Float[np.ndarray, "m D"]) -> float:
    """Returns the mean of the kernel over all pairs; never holds the whole matrix (3.6 GB for 30 000 pictures)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    total = 0.0
    for start in range(0, len(a), ROWS_AT_ONCE):
        rows = a[start : start + ROWS_AT_ONCE]
        squares = np.sum(rows**2, axis=1)[:, None] + np.sum(b**2, axis=1)[None, :] - 2.0 * rows @ b.T
        total += np.exp(-squares / (2.0 * CMMD_SIGMA**2)).sum()
    return total / (len(a) * len(b))


def _check_width(a: Shaped[np.ndarray, "n D"], b: Shaped[np.ndarray, "m E"]) -> None:
    if a.shape[1] != b.shape[1]:
        raise UserError(f"the features differ in width: {a.shape[1]} and {b.shape[1]}; use one network for both.")
