"""How near each picture of the student is to its teacher's from the same prompt and the same noise."""

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from dmm_jax.runtime.errors import UserError


def latent_mse(a: Float[np.ndarray, "n h w C"], b: Float[np.ndarray, "..."]) -> Float[np.ndarray, " n"]:
    """Returns the mean squared error of each pair of scaled latents; 0 if they are the same.

    Raises:
      ValueError: the shapes differ.
    """
    return _mean_squares(a, b)


def psnr(a: UInt8[np.ndarray, "n H W 3"], b: UInt8[np.ndarray, "..."]) -> Float[np.ndarray, " n"]:
    """Returns the peak signal-to-noise ratio of each pair of pictures, in dB (peak 255); infinite if they are the same.

    Raises:
      ValueError: the shapes differ.
    """
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(255.0**2 / _mean_squares(a, b))


def _mean_squares(a: Shaped[np.ndarray, "n ..."], b: Shaped[np.ndarray, "..."]) -> Float[np.ndarray, " n"]:
    if a.shape != b.shape:
        raise UserError(f"pairs must have one shape; got {a.shape} and {b.shape}.")
    difference = a.astype(np.float64) - b.astype(np.float64)
    return np.mean(difference**2, axis=tuple(range(1, a.ndim)))
