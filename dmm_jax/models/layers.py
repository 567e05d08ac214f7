"""The five layers that own parameters, with PyTorch's defaults where NNX's differ: epsilon, padding, initial weights.

Norms compute and return float32; whoever calls one casts back. Parameters are float32; `dtype` is the arithmetic's.
"""

import inspect
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

# PyTorch's default for Linear and Conv: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), which is variance 1 / (3 fan_in).
_kernel_init = nnx.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


def _bias_init(fan_in: int):
    limit = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)


def linear(in_features: int, out_features: int, *, use_bias: bool = True, dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """Builds a dense layer."""
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=jnp.float32,
        kernel_init=_kernel_init,
        bias_init=_bias_init(in_features),
        rngs=rngs,
    )


def conv(
    in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, padding=None, dtype, rngs: nnx.Rngs
) -> nnx.Conv:
    """Builds a square 2-D convolution; `padding`: ((top, bottom), (left, right)), else kernel_size // 2 all round."""
    return nnx.Conv(
        in_channels,
        out_channels,
        (kernel_size, kernel_size),
        strides=stride,
        padding=padding if padding is not None else ((kernel_size // 2,) * 2,) * 2,
        dtype=dtype,
        param_dtype=jnp.float32,
        kernel_init=_kernel_init,
        bias_init=_bias_init(in_channels * kernel_size**2),
        rngs=rngs,
    )


def group_norm(num_groups: int, channels: int, *, epsilon: float, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Builds a group norm; the epsilon has no default, since the networks use two."""
    return nnx.GroupNorm(
        channels,
        num_groups=num_groups,
        epsilon=epsilon,
        use_fast_variance=False,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs=rngs,
    )


def layer_norm(features: int, *, epsilon: float = 1e-5, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Builds a layer norm."""
    return nnx.LayerNorm(
        features, epsilon=epsilon, use_fast_variance=False, dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs
    )


def normed(
    norm: nnx.Module, hidden: jax.Array, activation: Callable[[jax.Array], jax.Array] | None = None
) -> jax.Array:
    """Returns a norm's output, behind an activation, in the dtype of `hidden`.

    The float32 values in between are computed again in the backward pass: writing and reading them, at 20 bytes a
    number, took a fifth of a training step.
    """

    graph, params = nnx.split(norm)

    @jax.checkpoint
    def compute(params, hidden):
        output = nnx.merge(graph, params)(hidden)
        return (output if activation is None else activation(output)).astype(hidden.dtype)

    return compute(params, hidden)


class Identity(nnx.Module):
    """Holds a place in a list: diffusers has a Dropout there, which does nothing once trained."""

    def __call__(self, hidden):
        """Returns its argument."""
        return hidden


class Config(dict):
    """A config.json that a graph definition can carry: static arguments of compiled programs must be hashable."""

    def __hash__(self):
        return hash(repr(sorted(self.items(), key=lambda item: item[0])))


def constructor_arguments(build, config: Mapping, inert: Mapping) -> dict:
    """Returns the fields of a config.json that `build` takes.

    Args:
      build: a constructor whose keyword arguments are named as the config's fields.
      config: the parsed config.json; names that begin with "_" are diffusers' own notes.
      inert: fields that `build` does not take, each with the values under which they change nothing.

    Raises:
      ValueError: names every field that this port does not compute, with its value.
    """
    known = {name for name in inspect.signature(build).parameters if name not in ("self", "dtype", "rngs")}
    fields = {name: value for name, value in config.items() if not name.startswith("_")}
    others = {name: value for name, value in fields.items() if name not in known}
    wrong = [f"{name}={value!r}" for name, value in others.items() if value not in inert.get(name, (None, False))]
    if wrong:
        raise ValueError(f"this architecture is not supported: {', '.join(sorted(wrong))} cannot be computed.")
    return {name: value for name, value in fields.items() if name in known}
