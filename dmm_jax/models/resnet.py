"""Residual blocks and the changes of resolution between levels (arXiv:2006.11239, appendix B)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dmm_jax.models import layers


class ResnetBlock2D(nnx.Module):
    """Norm, SiLU, convolution, twice; the time embedding is added in between; a 1x1 shortcut where widths differ."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        temb_channels: int | None,
        num_groups: int,
        epsilon: float,
        dtype,
        rngs: nnx.Rngs,
    ):
        """Builds the block; without `temb_channels` it takes no time embedding (the VAE's)."""
        common = {"dtype": dtype, "rngs": rngs}
        self.norm1 = layers.group_norm(num_groups, in_channels, epsilon=epsilon, rngs=rngs)
        self.conv1 = layers.conv(in_channels, out_channels, 3, **common)
        if temb_channels is not None:
            self.time_emb_proj = layers.linear(temb_channels, out_channels, **common)
        self.norm2 = layers.group_norm(num_groups, out_channels, epsilon=epsilon, rngs=rngs)
        self.conv2 = layers.conv(out_channels, out_channels, 3, **common)
        if in_channels != out_channels:
            self.conv_shortcut = layers.conv(in_channels, out_channels, 1, **common)

    def __call__(
        self, hidden: Float[Array, "B h w C"], temb: Float[Array, "_B E"] | None = None
    ) -> Float[Array, "B h w C2"]:
        """Returns the block's output, in the dtype of `hidden`."""
        residual = self.conv1(layers.normed(self.norm1, hidden, jax.nn.silu))
        shift = None
        if temb is not None:
            shift = layers.repeated(self.time_emb_proj(jax.nn.silu(temb)), len(hidden))
        residual = self.conv2(layers.normed(self.norm2, residual, jax.nn.silu, shift))
        shortcut = self.conv_shortcut(hidden) if hasattr(self, "conv_shortcut") else hidden
        return shortcut + residual


class Downsample2D(nnx.Module):
    """Halves the resolution by a strided convolution; PyTorch pads (1, 1), where "SAME" would pad (0, 1)."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.conv = layers.conv(channels, channels, 3, stride=2, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 C"]:
        """Returns a quarter of the cells."""
        return self.conv(hidden)


class Upsample2D(nnx.Module):
    """Doubles the resolution: nearest neighbour, then a convolution; both at once."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.conv = layers.conv(channels, channels, 3, convolve=_convolve_nearest_x2, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 C"]:
        """Returns four times the cells."""
        return self.conv(hidden)


def _convolve_nearest_x2(hidden, kernel, *_, precision=None, **__):
    """Convolves by a 3x3 kernel what nearest neighbours would make of `hidden`, without making it.

    A repeated cell meets the sum of its taps, so that each of the four phases of the output is a convolution by a 2x2
    kernel: 16 products in place of 36.
    """
    (b, h, w, c), dimensions = hidden.shape, ("NHWC", "HWIO", "NHWC")
    phases = _of_neighbours(_of_neighbours(kernel.astype(jnp.float32), 0), 2)  # (2, 2, 2, 2, C, D): row, its phase, ...
    phases = jnp.transpose(phases, (0, 2, 4, 1, 3, 5)).reshape(2, 2, c, -1).astype(kernel.dtype)
    options = {"dimension_numbers": dimensions, "precision": precision}
    around = jax.lax.conv_general_dilated(hidden, phases, (1, 1), ((1, 1), (1, 1)), **options)
    around = around.reshape(b, h + 1, w + 1, 2, 2, -1)  # An odd cell looks a neighbour further.
    rows = [jnp.stack([around[:, y : y + h, x : x + w, y, x] for x in (0, 1)], axis=3) for y in (0, 1)]
    return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, -1)


def _of_neighbours(kernel, axis):
    """Sums three taps to two, as an even cell sees two neighbours, and as an odd one: axes (neighbour, phase)."""
    first, middle, last = jnp.moveaxis(kernel, axis, 0)
    taps = jnp.stack([jnp.stack([first, first + middle]), jnp.stack([middle + last, last])])
    return jnp.moveaxis(taps, (0, 1), (axis, axis + 1))
