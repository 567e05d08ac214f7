"""The distances that the student is trained on, per sample (DMM, arXiv:2504.12364, eq. 9 and 10).

Score distillation regresses the teacher's output: one forward each at one timestep, no sampling chain, no guidance.
Feature imitation does the same for the outputs of the UNet's blocks. The paper prints the sum over blocks times 0.001;
the released code takes the mean over its 9 blocks times 0.002. Ours is the mean, so the paper's reading is a weight of
0.009 for Stable Diffusion 1.5.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def score_error(student: Float[Array, "B h w C"], teacher: Float[Array, "B h w C"]) -> Float[Array, " B"]:
    """Returns the mean squared error of the two networks' outputs, in float32 (eq. 9)."""
    return _mean_squared(student, teacher)


def feature_error(
    student: Sequence[Float[Array, "B _ _ _"]], teacher: Sequence[Float[Array, "B _ _ _"]], kind: str = "l2"
) -> Float[Array, " B"]:
    """Returns the mean over blocks of the error of their outputs, in float32 (eq. 10).

    Args:
      kind: "l2", the mean squared error; "normalized", that over the variance of the teacher's output, so that no block
        counts for more because its numbers are large; or "cosine", one minus the cosine over channels.
    """
    distance = {"l2": _mean_squared, "normalized": _normalized, "cosine": _one_minus_cosine}[kind]
    return jnp.mean(jnp.stack([distance(*pair) for pair in zip(student, teacher, strict=True)]), axis=0)


def cross_entropy(logits: Float[Array, "B K"], classes: Int[Array, " B"]) -> Float[Array, " B"]:
    """Returns minus the log of the probability that a classifier gives to the class, in float32 (eq. 11, 12)."""
    chances = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.sum(jax.nn.one_hot(classes, logits.shape[1]) * chances, axis=1)


def _mean_squared(a, b):
    return jnp.mean(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)), axis=(1, 2, 3))


def _normalized(student, teacher):
    variance = jnp.var(teacher.astype(jnp.float32), axis=(1, 2, 3))
    return _mean_squared(student, teacher) / jnp.maximum(variance, 1e-8)


def _one_minus_cosine(a, b):
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    lengths = jnp.sqrt(jnp.sum(jnp.square(a), -1) * jnp.sum(jnp.square(b), -1))
    return jnp.mean(1.0 - jnp.sum(a * b, -1) / jnp.maximum(lengths, 1e-8), axis=(1, 2))
