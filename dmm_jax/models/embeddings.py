"""Timesteps and other numbers as vectors: sinusoids (arXiv:1706.03762, 3.5), then a two-layer MLP."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num

from dmm_jax.models import layers

MAX_PERIOD = 10_000


def timestep_sinusoids(
    timesteps: Num[Array, " B"], width: int, *, flip_sin_to_cos: bool = True, freq_shift: int = 0
) -> Float[Array, "B D"]:
    """Returns float32 sinusoids of geometric frequencies, cosines first if `flip_sin_to_cos`.

    Float32 whatever the compute dtype: in bfloat16 only 507 of 1000 timesteps stay distinct.
    """
    half = width // 2
    # A timestep of 999 makes 6e-5 of a frequency's last bit. So exponents are rounded as PyTorch rounds them, and
    # powers taken on the host, since `exp` differs between devices: the frequencies are PyTorch's everywhere.
    exponents = np.float32(-math.log(MAX_PERIOD)) * np.arange(half, dtype=np.float32) / np.float32(half - freq_shift)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None, :]  # (B, D/2)
    halves = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate(halves, axis=-1)


class TimestepEmbedding(nnx.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, in_features: int, width: int, *, dtype, rngs: nnx.Rngs):
        self.linear_1 = layers.Linear(in_features, width, dtype=dtype, rngs=rngs)
        self.linear_2 = layers.Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, vector: Float[Array, "B C"]) -> Float[Array, "B D"]:
        """Maps sinusoids, or a style, to a vector of the time embedding's width."""
        return self.linear_2(jax.nn.silu(self.linear_1(vector)))
