"""Residual blocks and the changes of resolution between levels (arXiv:2006.11239, appendix B)."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dmm_jax.models import layers
from dmm_jax.models.norms import read_again


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


def _convolve_nearest_x2(hidden, kernel, *_, **__):
    """Convolves by a 3x3 kernel what nearest neighbours would make of `hidden`, without making it.

    A repeated cell meets the sum of its taps, so that each of the four phases of the output is a convolution by a 2x2
    kernel: 16 products in place of 36.
    """
    b, h, w, c = hidden.shape
    around = _convolve_2x2(hidden, _phases(kernel).reshape(2, 2, c, -1))
    around = around.reshape(b, h + 1, w + 1, 2, 2, -1)  # An odd cell looks a neighbour further.
    rows = [jnp.stack([around[:, y : y + h, x : x + w, y, x] for x in (0, 1)], axis=3) for y in (0, 1)]
    return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, -1)


def _phases(kernel):
    """Sums the taps (3, 3, C, D) by neighbour and phase, row and column of each: (2, 2, C, 2, 2, D)."""
    taps = [[column.astype(jnp.float32) for column in row] for row in kernel]
    met = (((0,), (0, 1)), ((1, 2), (2,)))  # By a neighbour and a phase: an even cell's first neighbour meets one tap.
    sums = [
        sum(taps[i][j] for i in met[y][down] for j in met[x][right])
        for y, x, down, right in itertools.product((0, 1), repeat=4)
    ]
    sums = jnp.stack(sums).reshape(2, 2, 2, 2, *kernel.shape[2:])
    return jnp.transpose(sums, (0, 1, 4, 2, 3, 5)).astype(kernel.dtype)


@jax.custom_vjp
def _convolve_2x2(hidden, kernel):
    """Convolves (B, h, w, C) by (2, 2, C, D), with one cell of zeros around: (B, h + 1, w + 1, D)."""
    return _convolve(hidden, kernel, 1)


def _convolve_2x2_forward(hidden, kernel):
    return _convolve(hidden, kernel, 1), (hidden, kernel)


def _convolve_2x2_backward(kept, gradient):
    """The kernel's gradient slides `gradient` over `hidden`, which is smaller without its border of zeros.

    XLA would then slide the smaller one, which is not the convolution that cuDNN has a fast kernel for: on GPUs the
    border is written down.
    """
    hidden, kernel = kept
    (bordered,) = read_again(jnp.pad(hidden, ((0, 0), (1, 1), (1, 1), (0, 0))))
    of_hidden = jax.linear_transpose(lambda hidden: _convolve(hidden, kernel, 1), hidden)
    of_kernel = jax.linear_transpose(lambda kernel: _convolve(bordered, kernel, 0), kernel)
    return *of_hidden(gradient), *of_kernel(gradient)


_convolve_2x2.defvjp(_convolve_2x2_forward, _convolve_2x2_backward)


def _convolve(hidden, kernel, border):
    return jax.lax.conv_general_dilated(
        hidden, kernel, (1, 1), ((border, border),) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
