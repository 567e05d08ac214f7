"""Classifier-free guidance."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


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
