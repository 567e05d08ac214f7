"""The distances that the student is trained on, per sample (DMM, arXiv:2504.12364, eq. 9 and 10).

Score distillation regresses the teacher's output: one forward each at one timestep, no sampling chain, no guidance.
Feature imitation does the same for the outputs of the UNet's blocks. The paper prints the sum over blocks times 0.001;
the released code takes the mean over its 9 blocks times 0.002. Ours is the mean, so the paper's reading is a weight of
0.009 for Stable Diffusion 1.5.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float


def score_error(student: Float[Array, "B h w C"], teacher: Float[Array, "B h w C"]) -> Float[Array, " B"]:
    """Returns the mean squared error of the two networks' outputs, in float32 (eq. 9)."""
    return _mean_squared(student, teacher)


def feature_error(
    student: Sequence[Float[Array, "B _ _ _"]], teacher: Sequence[Float[Array, "B _ _ _"]], kind: str = "l2"
) -> Float[Array, " B"]:
    """Returns the mean over blocks of the error of their outputs, in float32 (eq. 10).

    Args:
      kind: "l2", the mean squared error, or "cosine", one minus the cosine over channels.
    """
    distance = {"l2": _mean_squared, "cosine": _one_minus_cosine}[kind]
    return jnp.mean(jnp.stack([distance(*pair) for pair in zip(student, teacher, strict=True)]), axis=0)


def _mean_squared(a, b):
    return jnp.mean(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)), axis=(1, 2, 3))


def _one_minus_cosine(a, b):
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    lengths = jnp.sqrt(jnp.sum(jnp.square(a), -1) * jnp.sum(jnp.square(b), -1))
    return jnp.mean(1.0 - jnp.sum(a * b, -1) / jnp.maximum(lengths, 1e-8), axis=(1, 2))
