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


def read_again(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the arrays; on GPUs XLA computes what comes of them anew, and shares nothing with what came before.

    On TPUs, whose compiler reads once for several sums, it would move a tenth more bytes (docs/plan.md).
    """
    return jax.lax.platform_dependent(*arrays, cuda=_behind_barrier, default=lambda *same: same)


def _behind_barrier(*arrays):
    return jax.lax.optimization_barrier(arrays)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def group_norm(
    hidden: Float[Array, "B *cells C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    num_groups: int,
    epsilon: float,
    activation: Callable[[jax.Array], jax.Array],
) -> Float[Array, "B *cells C"]:
    """Returns activation(standardized * scale + bias), in the dtype of `hidden`; in between all is float32."""
    return _group_norm_forward(hidden, scale, bias, num_groups, epsilon, activation)[0]


def _group_norm_forward(hidden, scale, bias, num_groups, epsilon, activation):
    groups = _grouped(hidden.astype(jnp.float32), num_groups)
    mean = groups.mean((1, 3))
    variance = jnp.square(groups - mean[:, None, :, None]).mean((1, 3))
    moments = mean, jax.lax.rsqrt(variance + epsilon)  # (B, G) each
    values, _ = _standardized_by_group(hidden, moments)
    output = activation(values * _wide(scale, hidden) + _wide(bias, hidden))
    return output.astype(hidden.dtype), (hidden, scale, bias, moments)


def _group_norm_backward(num_groups, epsilon, activation, kept, gradient):
    hidden, scale, bias, moments = kept
    wide_scale, wide_bias = _wide(scale, hidden), _wide(bias, hidden)

    def slopes():
        nonlocal hidden, gradient
        hidden, gradient = read_again(hidden, gradient)
        values, inverse_deviation = _standardized_by_group(hidden, moments)
        _, pull = jax.vjp(activation, values * wide_scale + wide_bias)
        return values, inverse_deviation, pull(gradient.astype(jnp.float32))[0]

    (_, _, slope), (values, _, again) = slopes(), slopes()
    # Of these all other sums are made, for which XLA would go back to the cells.
    parts = jax.lax.optimization_barrier((slope.sum(-2), (again * values).sum(-2)))
    of_bias, of_scale = (part.sum(tuple(range(part.ndim - 1))) for part in parts)
    size = math.prod(hidden.shape[1:]) // num_groups
    mean, tilt = (
        _of_groups(_grouped(part * _wide(scale, part), num_groups).sum((1, 3)) / size, hidden) for part in parts
    )
    values, inverse_deviation, slope = slopes()
    return ((slope * wide_scale - mean - values * tilt) * inverse_deviation).astype(hidden.dtype), of_scale, of_bias


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
    (_, slope), (values, again) = read(), read()
    of_bias, of_scale = slope.sum(rows), (values * again).sum(rows)
    values, slope = read()
    slope = slope * _wide(scale, hidden)
    tilt = (slope * values).mean(-1, keepdims=True)
    back = (slope - slope.mean(-1, keepdims=True) - values * tilt) * moments[1]
    return back.astype(hidden.dtype), of_scale, of_bias


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def _standardized(hidden, mean, inverse_deviation):
    return (hidden.astype(jnp.float32) - mean) * inverse_deviation


def _standardized_by_group(hidden, moments):
    mean, inverse_deviation = (_of_groups(moment, hidden) for moment in moments)
    return _standardized(hidden, mean, inverse_deviation), inverse_deviation


def _wide(vector, hidden):
    return jnp.expand_dims(vector, range(hidden.ndim - 1))


def _grouped(hidden, num_groups):
    return hidden.reshape(len(hidden), -1, num_groups, hidden.shape[-1] // num_groups)


def _of_groups(values, hidden):
    """Repeats a number a group (B, G) for each of its channels, and for all cells of `hidden`."""
    channels = jnp.repeat(values, hidden.shape[-1] // values.shape[-1], axis=-1)
    return channels.reshape(len(values), *(1 for _ in hidden.shape[1:-1]), -1)
