"""The bias of a dense layer or a convolution."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmm_jax.kernels.broadcast import per_channel
from dmm_jax.kernels.recomputation import reread


def reference(hidden: Float[Array, "*B C"], bias: Float[Array, " C"]) -> Float[Array, "*B C"]:
    """Returns hidden + bias, in the dtype of `hidden`."""
    return hidden + per_channel(bias.astype(hidden.dtype), hidden)


# The rule: every platform sums the bias's gradient in float32. In bfloat16 the sum over thousands of rows is less exact
# and slower: XLA needs 77 microseconds for its last part, and 3 in float32.
@jax.custom_vjp
def add_bias(hidden: Float[Array, "*B C"], bias: Float[Array, " C"]) -> Float[Array, "*B C"]:
    """Returns hidden + bias, in the dtype of `hidden`; the bias's gradient is summed in float32."""
    return reference(hidden, bias)


def _forward(hidden, bias):
    return add_bias(hidden, bias), bias


def _backward(bias, gradient):
    (rows,) = reread(gradient)  # Without the barrier, XLA also writes the gradient in float32.
    return gradient, rows.astype(jnp.float32).sum(tuple(range(rows.ndim - 1))).astype(bias.dtype)


add_bias.defvjp(_forward, _backward)
