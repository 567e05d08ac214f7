"""Vectors shaped so that they broadcast over feature maps (B, *cells, C)."""

import jax
import jax.numpy as jnp


def per_channel(vector: jax.Array, hidden: jax.Array) -> jax.Array:
    """Reshapes one number per channel (C,) to the rank of `hidden`."""
    return jnp.expand_dims(vector, range(hidden.ndim - 1))


def per_image(vectors: jax.Array, hidden: jax.Array) -> jax.Array:
    """Reshapes one number per image and channel (B, C) to the rank of `hidden`."""
    return vectors.reshape(len(vectors), *(1 for _ in hidden.shape[1:-1]), -1)
