"""Classifier-free guidance, and the rescaling that it needs at zero terminal SNR."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

ADVICE = "This model has zero terminal SNR: a guidance rescale of 0.7 keeps its images from overexposure."


def guide(
    unconditional: Float[Array, "B h w C"],
    conditional: Float[Array, "B h w C"],
    guidance_scale: Float[Array | np.ndarray, " B"] | Float[Array | np.ndarray, ""] | float | int,
) -> Float[Array, "B h w C"]:
    """Moves the prediction away from the unconditional one (arXiv:2207.12598, eq. 6, with w + 1 = guidance_scale).

    The sum starts from `conditional`, so that 1.0 returns it to the last bit.

    Args:
      guidance_scale: one number, or one per image.
    """
    scale = jnp.asarray(guidance_scale, jnp.float32).reshape(-1, 1, 1, 1)
    return conditional + (scale - 1.0) * (conditional - unconditional)


def rescale(
    guided: Float[Array, "B h w C"],
    conditional: Float[Array, "B h w C"],
    share: Float[Array | np.ndarray, " B"] | Float[Array | np.ndarray, ""] | float | int,
) -> Float[Array, "B h w C"]:
    """Mixes guided predictions with those scaled to the standard deviation of the conditional ones, per image.

    Source: arXiv:2305.08891, equations 15 and 16. Guidance makes predictions too large, which overexposes images of
    models with zero terminal SNR; `share` is the scaled ones' part, 0.7 in the paper.
    """
    share = jnp.asarray(share, jnp.float32).reshape(-1, 1, 1, 1)
    before, after = (jnp.std(prediction, axis=(1, 2, 3), keepdims=True) for prediction in (conditional, guided))
    return guided * (share * before / after + (1.0 - share))
