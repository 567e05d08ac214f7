"""Distances between each picture of the student and its teacher's picture from the same prompt and noise."""

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from dmm_jax.evaluation import lpips
from dmm_jax.evaluation.published_weights import Weights
from dmm_jax.evaluation.samples import Pictures
from dmm_jax.runtime.errors import UserError


def paired_fidelity(
    teacher: Pictures, student: Pictures, rounded: Pictures, other_noise: Pictures, perceptual: Weights | None = None
) -> dict[str, float]:
    """Returns each measure between teacher and student, its floor, and its value for unrelated pictures.

    Args:
      student: from the teacher's prompts and noise.
      rounded: the teacher's from the same noise in another precision. Rounding alone causes this difference, so it is
        the floor.
      other_noise: the teacher's unrelated pictures of the same prompts.
      perceptual: LPIPS, which adds its distance.
    """
    measures = {
        "latent MSE": lambda a, b: latent_mse(a.latents, b.latents).mean(),
        "PSNR (dB)": lambda a, b: np.median(psnr(a.images, b.images)),  # A pair of equal pictures has an infinite PSNR.
    }
    if perceptual is not None:
        name = lpips.distance_name(perceptual)
        measures[name] = lambda a, b: lpips.distances(perceptual, a.images, b.images).mean()
    values = {}
    for name, measure in measures.items():
        values[name] = float(measure(teacher, student))
        values[f"{name}, floor"] = float(measure(teacher, rounded))
        values[f"{name}, other noise"] = float(measure(teacher, other_noise))
    return values


def latent_mse(a: Float[np.ndarray, "n h w C"], b: Float[np.ndarray, "..."]) -> Float[np.ndarray, " n"]:
    """Returns the mean squared error of each pair of scaled latents.

    Raises:
      ValueError: the shapes differ.
    """
    return _mean_squares(a, b)


def psnr(a: UInt8[np.ndarray, "n H W 3"], b: UInt8[np.ndarray, "..."]) -> Float[np.ndarray, " n"]:
    """Returns the peak signal-to-noise ratio of each pair of pictures in dB (peak 255); infinite if they are equal.

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
