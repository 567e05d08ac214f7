"""Group norm (arXiv:1803.08494), together with the addition before it and the activation after it."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmm_jax.kernels.broadcast import per_channel, per_image
from dmm_jax.kernels.recomputation import barrier, reread
from dmm_jax.kernels.shared_rows import per_prompt

Activation = Callable[[jax.Array], jax.Array]
CELLS_PER_BLOCK = 512


def identity(hidden: jax.Array) -> jax.Array:
    """Returns its argument: no activation."""
    return hidden


def reference(hidden, scale, bias, num_groups, epsilon, shift=None, activation=identity):
    """Returns the paper's eq. 1, 2 and 6 for float32 arrays; arguments as in `group_norm`."""
    hidden = hidden if shift is None else hidden + per_image(shift, hidden)
    groups = hidden.reshape(len(hidden), -1, num_groups, hidden.shape[-1] // num_groups)
    mean, variance = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    standardized = ((groups - mean) / jnp.sqrt(variance + epsilon)).reshape(hidden.shape)
    return activation(standardized * per_channel(scale, hidden) + per_channel(bias, hidden))


# The rule: every platform takes the form with the gradient written out. Left to differentiation, the backward pass
# reads hidden and gradient four times and writes a float32 map: 12 ms of a training step of 503 ms, by its bytes.
# How cells are summed depends on the platform: see `_sum_over_cells`.
def group_norm(
    hidden: Float[Array, "B *cells C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    num_groups: int,
    epsilon: float,
    shift: Float[Array, "_B C"] | None = None,
    activation: Activation = identity,
) -> Float[Array, "B *cells C"]:
    """Returns activation(standardized(hidden + shift) * scale + bias), in the dtype of `hidden`; computes in float32.

    Args:
      shift: one vector per image, added to all its cells; the sum is never written to memory. Several adjacent images
        may share a vector.
    """
    shift = None if shift is None else per_prompt(shift, len(hidden))
    return _group_norm(hidden, scale, bias, shift, num_groups, epsilon, activation)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _group_norm(hidden, scale, bias, shift, num_groups, epsilon, activation):
    return _forward(hidden, scale, bias, shift, num_groups, epsilon, activation)[0]


def _forward(hidden, scale, bias, shift, num_groups, epsilon, activation):
    # All statistics are (B, C), repeated for the channels of a group: looking up a cell's group takes an integer
    # division per cell (105 instead of 88 microseconds for 48 x 64 x 64 x 320).
    mean, channel_mean, variance = _moments(hidden, shift, num_groups)
    inverse_deviation = jax.lax.rsqrt(variance + epsilon)
    centre = mean if shift is None else mean - shift.astype(jnp.float32)
    channel_offset, gain = channel_mean - mean, inverse_deviation * per_channel(scale, mean)
    statistics = reread(centre, channel_offset, inverse_deviation, gain)
    centre, _, _, gain = statistics
    output = activation(_centred(hidden, centre) * per_image(gain, hidden) + per_channel(bias, hidden))
    return output.astype(hidden.dtype), (hidden, bias, shift, statistics)


def _backward(num_groups, epsilon, activation, residuals, gradient):
    """Returns the gradients of hidden, scale, bias and shift: one reading for all sums, one for the result.

    With slope = gradient * activation' and x = hidden - mean, the gradient of hidden is
    gain * slope - mean_g(gain * slope) - x / variance * mean_g(gain * slope * x), where mean_g is a group's mean.
    """
    hidden, bias, shift, (centre, channel_offset, inverse_deviation, gain) = residuals

    def centred_and_slope(hidden, gradient):
        centred = _centred(hidden, centre)
        _, pull = jax.vjp(activation, centred * per_image(gain, hidden) + per_channel(bias, hidden))
        return centred, pull(gradient.astype(jnp.float32))[0]

    # Each sum has a kernel of its own, and each kernel computes the slope from bfloat16.
    hidden, gradient = reread(hidden, gradient)
    _, slope = centred_and_slope(hidden, gradient)
    hidden, gradient = reread(hidden, gradient)
    centred, same_slope = centred_and_slope(hidden, gradient)
    slope_sum, moment = _sum_over_cells(slope, same_slope * centred)  # (B, C) each
    size = math.prod(hidden.shape[1:]) // num_groups
    mean_slope = _sum_over_group(slope_sum * gain, num_groups) / size
    mean_moment = _sum_over_group(moment * gain, num_groups) / size * jnp.square(inverse_deviation)
    mean_slope, mean_moment = reread(mean_slope, mean_moment)
    hidden, gradient = barrier(hidden, gradient)  # Without it, a TPU keeps the slopes in float32 from above.
    hidden, gradient = reread(hidden, gradient)
    centred, slope = centred_and_slope(hidden, gradient)
    of_hidden = slope * per_image(gain, hidden) - per_image(mean_slope, hidden)
    of_hidden = of_hidden - centred * per_image(mean_moment, hidden)
    of_shift = None
    if shift is not None:  # The sum of `of_hidden` over an image's cells.
        of_shift = slope_sum * gain - _num_cells(hidden) * (mean_slope + mean_moment * channel_offset)
        of_shift = of_shift.astype(shift.dtype)
    return of_hidden.astype(hidden.dtype), (moment * inverse_deviation).sum(0), slope_sum.sum(0), of_shift


_group_norm.defvjp(_forward, _backward)


def _moments(hidden, shift, num_groups):
    """Returns the group's mean, the channel's mean and the group's variance of hidden + shift, (B, C) each."""
    # The variance comes from squares around the mean: the difference of two means of squares would lose digits, and
    # XLA takes 98 microseconds to compute two sums in one reading, where two kernels take 34 each.
    num_channels = hidden.shape[-1] // num_groups
    (channel_sum,) = _sum_over_cells(hidden.astype(jnp.float32))
    channel_mean = channel_sum / _num_cells(hidden)
    if shift is not None:
        shift = shift.astype(jnp.float32)
        channel_mean = channel_mean + shift
    mean = _sum_over_group(channel_mean, num_groups) / num_channels
    (squares,) = _sum_over_cells(jnp.square(_centred(hidden, mean if shift is None else mean - shift)))
    return mean, channel_mean, _sum_over_group(squares / _num_cells(hidden), num_groups) / num_channels


def _centred(hidden, mean):
    return hidden.astype(jnp.float32) - per_image(mean, hidden)


def _num_cells(hidden):
    return math.prod(hidden.shape[1:-1])


def _sum_over_group(values, num_groups):
    """Sums (B, C) over the channels of each group, and repeats the sum for each of them."""
    groups = values.reshape(len(values), num_groups, -1).sum(-1)
    return jnp.repeat(groups, values.shape[-1] // num_groups, axis=-1)


def _sum_over_cells(*maps):
    """Sums each map (B, *cells, C) over its cells, to (B, C)."""
    # On NVIDIA GPUs XLA runs one block of threads per sum. With 64 cells per sum most threads have nothing to do (21 ms
    # of a training step of 407 ms, at 1.5 TB/s); with all cells of an image there are too few blocks.
    return jax.lax.platform_dependent(*maps, cuda=_sum_in_blocks, default=_sum_at_once)


def _sum_at_once(*maps):
    return tuple(cells.sum(tuple(range(1, cells.ndim - 1))) for cells in maps)


def _sum_in_blocks(*maps):
    """Sums blocks of cells, then the blocks; the barrier keeps XLA from joining the two sums."""
    size = math.gcd(_num_cells(maps[0]), CELLS_PER_BLOCK)
    blocks = jax.lax.optimization_barrier([cells.reshape(-1, size, cells.shape[-1]).sum(1) for cells in maps])
    return tuple(block.reshape(len(maps[0]), -1, block.shape[-1]).sum(1) for block in blocks)
