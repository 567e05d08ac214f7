"""2-D convolutions over feature maps with channels last."""

from collections.abc import Sequence

import jax
from jaxtyping import Array, Float

from dmm_jax.kernels.stacks import network_by_network

Padding = str | Sequence[tuple[int, int]]


def reference(
    hidden: Float[Array, "B h w C"],
    kernel: Float[Array, "rows columns C D"],
    strides: Sequence[int] = (1, 1),
    padding: Padding = "SAME",
) -> Float[Array, "B h2 w2 D"]:
    """Returns the convolution; padding: ((top, bottom), (left, right)), "SAME" or "VALID"."""
    return jax.lax.conv_general_dilated(hidden, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def convolve(
    hidden: Float[Array, "B h w C"],
    kernel: Float[Array, "rows columns C D"],
    strides: Sequence[int],
    padding: Padding,
    stacked: bool = False,
) -> Float[Array, "B h2 w2 D"]:
    """Returns the convolution; arguments as in `reference`.

    Args:
      stacked: whether `jax.vmap` runs several frozen networks at once; see `network_by_network`.
    """
    if kernel.shape[:2] == tuple(strides) == (1, 1):
        return hidden @ kernel[0, 0]  # A dense layer: on GPUs cuBLAS computes it together with its bias.
    run = network_by_network(reference) if stacked else reference
    return run(hidden, kernel, strides, padding)
