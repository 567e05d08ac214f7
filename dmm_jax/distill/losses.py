"""The distances that the student is trained on, per sample (DMM, arXiv:2504.12364, eq. 9 and 10).

Score distillation regresses the teacher's output: one forward pass each, at one timestep, without a sampling chain or
guidance. Feature imitation does the same for the outputs of the UNet's blocks. The paper prints the sum over blocks
times 0.001; the released code takes the mean over its 9 blocks times 0.002. This module takes the mean, so the paper's
weight is 0.009 for Stable Diffusion 1.5.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def score_error(student: Float[Array, "B h w C"], teacher: Float[Array, "B h w C"]) -> Float[Array, " B"]:
    """Returns the mean squared error of the two networks' outputs, in float32 (eq. 9)."""
    return jnp.mean(jnp.square(student.astype(jnp.float32) - teacher.astype(jnp.float32)), axis=(1, 2, 3))


def pseudo_huber_error(
    student: Float[Array, "B h w C"], teacher: Float[Array, "B h w C"], softness: float = 5.4e-4
) -> Float[Array, " B"]:
    """Returns the root of the mean squared error, quadratic below `softness` (arXiv:2310.14189), in float32.

    Its gradient has about the same size for all samples: those with small errors count as much as others.
    """
    return jnp.sqrt(score_error(student, teacher) + softness**2) - softness


def feature_error(
    student: Sequence[Float[Array, "B _ _ _"]], teacher: Sequence[Float[Array, "B _ _ _"]], kind: str = "l2"
) -> Float[Array, " B"]:
    """Returns the mean over blocks of the error of their outputs, in float32 (eq. 10).

    Args:
      kind: "l2", the mean squared error; "normalized", that divided by the variance of the teacher's output, so that no
        block counts for more because its numbers are large; or "cosine", one minus the cosine over channels.
    """
    distance = {"l2": score_error, "normalized": _normalized, "cosine": _one_minus_cosine}[kind]
    return jnp.mean(jnp.stack([distance(*pair) for pair in zip(student, teacher, strict=True)]), axis=0)


def cross_entropy(logits: Float[Array, "B K"], classes: Int[Array, " B"]) -> Float[Array, " B"]:
    """Returns minus the log probability that a classifier gives to the class, in float32 (eq. 11, 12)."""
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.sum(jax.nn.one_hot(classes, logits.shape[1]) * log_probabilities, axis=1)


def _normalized(student, teacher):
    variance = jnp.var(teacher.astype(jnp.float32), axis=(1, 2, 3))
    return score_error(student, teacher) / jnp.maximum(variance, 1e-8)


def _one_minus_cosine(student, teacher):
    student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
    squares = jnp.sum(jnp.square(student), -1) * jnp.sum(jnp.square(teacher), -1)
    lengths = jnp.sqrt(jnp.maximum(squares, 1e-16))  # The root's gradient at 0 is infinite: NaN for a zero vector.
    return jnp.mean(1.0 - jnp.sum(student * teacher, -1) / lengths, axis=(1, 2))
