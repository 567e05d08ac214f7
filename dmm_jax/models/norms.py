"""Group norm and layer norm (arXiv:1803.08494, 1607.06450), their gradients written out: one pass sums, one writes.

Left to differentiation, the backward passes read values and gradients up to four times, and keep in float32 what
several sums share. On GPUs a barrier makes XLA read bfloat16 and compute it again instead (`read_again`).
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

CELLS_AT_ONCE = 512


def read_again(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the arrays; on GPUs XLA computes what comes of them anew, and shares nothing with what came before.

    On TPUs, whose compiler reads once for several sums, it would move a tenth more bytes (docs/plan.md).
    """
    return jax.lax.platform_dependent(*arrays, cuda=_behind_barrier, default=lambda *same: same)


def _behind_barrier(*arrays):
    return jax.lax.optimization_barrier(arrays)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def group_norm(
    hidden: Float[Array, "B *cells C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    shift: Float[Array, "B C"] | None,
    num_groups: int,
    epsilon: float,
    activation: Callable[[jax.Array], jax.Array],
) -> Float[Array, "B *cells C"]:
    """Returns activation(standardized * scale + bias), in the dtype of `hidden`; in between all is float32.

    Args:
      shift: added to all cells of an image first, without a map of the sum; None for none.
    """
    return _group_norm_forward(hidden, scale, bias, shift, num_groups, epsilon, activation)[0]


def _group_norm_forward(hidden, scale, bias, shift, num_groups, epsilon, activation):
    mean, of_channel, variance = _moments(hidden, shift, num_groups)
    inverse_deviation = jax.lax.rsqrt(variance + epsilon)
    centre = mean if shift is None else mean - shift.astype(jnp.float32)
    kept = read_again(centre, of_channel - mean, inverse_deviation, inverse_deviation * _wide(scale, mean))
    centre, _, _, gain = kept  # (B, C) each
    output = activation(_centred(hidden, centre) * _of_images(gain, hidden) + _wide(bias, hidden))
    return output.astype(hidden.dtype), (hidden, bias, shift, kept)


def _group_norm_backward(num_groups, epsilon, activation, kept, gradient):
    hidden, bias, shift, (centre, skew, inverse_deviation, gain) = kept

    def slopes():
        nonlocal hidden, gradient
        hidden, gradient = read_again(hidden, gradient)
        centred = _centred(hidden, centre)
        _, pull = jax.vjp(activation, centred * _of_images(gain, hidden) + _wide(bias, hidden))
        return centred, pull(gradient.astype(jnp.float32))[0]

    (_, slope), (centred, again) = slopes(), slopes()
    of_bias, tilt = _over_cells(slope, again * centred)
    size = math.prod(hidden.shape[1:]) // num_groups
    offset = _over_group(of_bias * gain, num_groups) / size
    slant = _over_group(tilt * gain, num_groups) / size * jnp.square(inverse_deviation)
    offset, slant = read_again(offset, slant)
    hidden, gradient = _behind_barrier(hidden, gradient)  # Else a TPU keeps the slopes for this, in float32.
    centred, slope = slopes()
    back = slope * _of_images(gain, hidden) - _of_images(offset, hidden) - centred * _of_images(slant, hidden)
    if shift is not None:  # The sum of `back` over an image's cells.
        shift = (of_bias * gain - _num_cells(hidden) * (offset + slant * skew)).astype(shift.dtype)
    return back.astype(hidden.dtype), (tilt * inverse_deviation).sum(0), of_bias.sum(0), shift


def _moments(hidden, shift, num_groups):
    """Returns the mean of every channel's group, its own, and the group's variance, (B, C) each; of what is shifted."""
    num_channels = hidden.shape[-1] // num_groups
    (of_channel,) = _over_cells(hidden.astype(jnp.float32))
    of_channel = of_channel / _num_cells(hidden)
    if shift is not None:
        shift = shift.astype(jnp.float32)
        of_channel = of_channel + shift
    mean = _over_group(of_channel, num_groups) / num_channels
    (squares,) = _over_cells(jnp.square(_centred(hidden, mean if shift is None else mean - shift)))
    return mean, of_channel, _over_group(squares / _num_cells(hidden), num_groups) / num_channels


group_norm.defvjp(_group_norm_forward, _group_norm_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    hidden: Float[Array, "*B C"], scale: Float[Array, " C"], bias: Float[Array, " C"], epsilon: float
) -> Float[Array, "*B C"]:
    """Returns standardized * scale + bias, in the dtype of `hidden`; in between all is float32."""
    return _layer_norm_forward(hidden, scale, bias, epsilon)[0]


def _layer_norm_forward(hidden, scale, bias, epsilon):
    values = hidden.astype(jnp.float32)
    mean = values.mean(-1, keepdims=True)
    variance = jnp.square(values - mean).mean(-1, keepdims=True)
    moments = mean, jax.lax.rsqrt(variance + epsilon)  # (*B, 1) each
    output = _standardized(hidden, *moments) * _wide(scale, hidden) + _wide(bias, hidden)
    return output.astype(hidden.dtype), (hidden, scale, moments)


def _layer_norm_backward(epsilon, kept, gradient):
    hidden, scale, moments = kept

    def read():
        nonlocal hidden, gradient
        hidden, gradient = read_again(hidden, gradient)
        return _standardized(hidden, *moments), gradient.astype(jnp.float32)

    rows = tuple(range(hidden.ndim - 1))
    values, slope = read()
    of_bias, of_scale = slope.sum(rows), (values * slope).sum(rows)
    values, slope = read()
    slope = slope * _wide(scale, hidden)
    tilt = (slope * values).mean(-1, keepdims=True)
    back = (slope - slope.mean(-1, keepdims=True) - values * tilt) * moments[1]
    return back.astype(hidden.dtype), of_scale, of_bias


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def _standardized(hidden, mean, inverse_deviation):
    return (hidden.astype(jnp.float32) - mean) * inverse_deviation


def _centred(hidden, mean):
    return hidden.astype(jnp.float32) - _of_images(mean, hidden)


def _wide(vector, hidden):
    return jnp.expand_dims(vector, range(hidden.ndim - 1))


def _of_images(vectors, hidden):
    """Repeats a vector an image (B, C) for all cells of `hidden`."""
    return vectors.reshape(len(vectors), *(1 for _ in hidden.shape[1:-1]), -1)


def _num_cells(hidden):
    return math.prod(hidden.shape[1:-1])


def _over_cells(*maps):
    """Sums maps (B, *cells, C) over their cells, all in one reading; of the sums (B, C) all else can be made."""
    return jax.lax.platform_dependent(*maps, cuda=_in_parts, default=_at_once)


def _at_once(*maps):
    return tuple(cells.sum(tuple(range(1, cells.ndim - 1))) for cells in maps)


def _in_parts(*maps):
    """First over many cells each: XLA's kernels for GPUs take a block of threads for each such sum.

    Over few, a block has nothing to do; over all, there are too few blocks. A barrier keeps XLA from making one sum of
    the two, and from going back to the cells for what is made of the sums.
    """
    size = math.gcd(_num_cells(maps[0]), CELLS_AT_ONCE)
    parts = jax.lax.optimization_barrier([cells.reshape(-1, size, cells.shape[-1]).sum(1) for cells in maps])
    return tuple(part.reshape(len(maps[0]), -1, part.shape[-1]).sum(1) for part in parts)


def _over_group(values, num_groups):
    """Sums (B, C) over the channels of each group, and repeats the sum for each of them."""
    groups = values.reshape(len(values), num_groups, -1).sum(-1)
    return jnp.repeat(groups, values.shape[-1] // num_groups, axis=-1)
