"""The Frechet distance between two Gaussians fitted to features (FID, arXiv:1706.08500), in float64 on the host."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from dmm_jax.runtime.errors import UserError


@dataclass(frozen=True)
class Statistics:
    """Count, mean and scatter of features; a sum of squares would cancel far from zero."""

    count: int
    mean: Float[np.ndarray, " D"]
    scatter: Float[np.ndarray, "D D"]  # The sum of the outer products of the deviations from the mean.

    @classmethod
    def empty(cls, num_features: int) -> "Statistics":
        """Returns the statistics of no features."""
        return cls(0, np.zeros(num_features), np.zeros((num_features, num_features)))

    def update(self, features: Float[np.ndarray, "n D"]) -> "Statistics":
        """Returns the statistics of these and n more features.

        Raises:
          ValueError: the features have another width, or one is not finite.
        """
        if features.shape[1] != len(self.mean):
            raise UserError(f"expected features of width {len(self.mean)}; got {features.shape[1]}.")
        if not len(features):
            return self
        features = features.astype(np.float64)
        bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(bad):
            raise UserError(f"{len(bad)} of {len(features)} features are not finite, the first in row {bad[0]}.")
        mean = features.mean(axis=0)
        deviations = features - mean
        return self.merge(Statistics(len(features), mean, deviations.T @ deviations))

    def merge(self, other: "Statistics") -> "Statistics":
        """Returns the statistics of the union of both sets (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        if not count:
            return self
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        between = np.outer(shift, shift) * (self.count * other.count / count)
        return Statistics(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Float[np.ndarray, "D D"]:
        """The unbiased covariance (ddof 1).

        Raises:
          ValueError: there are fewer than two features.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 features; got {self.count}.")
        return self.scatter / (self.count - 1)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Returns |mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), in squared units of the features.

    The eigenvalues of S_a S_b are those of S_a^(1/2) S_b S_a^(1/2), which is symmetric: no complex root, no jitter.

    Raises:
      ValueError: the widths differ, or either set has fewer than two features.
    """
    if len(a.mean) != len(b.mean):
        raise UserError(f"the features differ in width: {len(a.mean)} and {len(b.mean)}; use one network for both.")
    root = _square_root(a.covariance)
    eigenvalues = np.linalg.eigvalsh(root @ b.covariance @ root)
    cross = np.sqrt(np.maximum(eigenvalues, 0.0)).sum()
    distance = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * cross
    return float(max(distance, 0.0))  # Rounding can make it negative.


def _square_root(covariance: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D D"]:
    eigenvalues, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(eigenvalues, 0.0))) @ vectors.T
