"""Classifier-free guidance."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def guide(
    unconditional: Float[Array, "B h w C"], conditional: Float[Array, "B h w C"], guidance_scale: Float[Array, "*B"] | float
) -> Float[Array, "B h w C"]:
    """Moves the prediction away from the unconditional one (arXiv:2207.12598, eq. 6, with w + 1 = guidance_scale).

    Args:
      guidance_scale: one, or one per image; 1.0 returns `conditional`.
    """
    scale = jnp.asarray(guidance_scale, jnp.float32).reshape(-1, 1, 1, 1)
    return unconditional + scale * (conditional - unconditional)
