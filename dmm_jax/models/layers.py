"""The six layers that own parameters, with PyTorch's defaults where NNX's differ: epsilon, padding, initial weights.

Norms compute and return float32; whoever calls one casts back. Parameters are float32; `dtype` is the arithmetic's.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dmm_jax.models import norms
from dmm_jax.runtime.errors import UserError

# PyTorch's default for Linear and Conv: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), which is variance 1 / (3 fan_in).
_kernel_init = nnx.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


def _bias_init(fan_in: int):
    limit = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)


@jax.custom_vjp
def _plus_bias(hidden, bias):
    """Adds a bias (C,) in the dtype of `hidden`. Its gradient, a sum over thousands of rows, is summed in float32.

    Left to differentiation it would be summed in the dtype of `hidden`: less exact in bfloat16, and slower on GPUs
    (docs/log.md, step 8).
    """
    return hidden + jnp.expand_dims(bias.astype(hidden.dtype), range(hidden.ndim - 1))


def _plus_bias_forward(hidden, bias):
    return _plus_bias(hidden, bias), bias


def _plus_bias_backward(bias, gradient):
    (again,) = norms.read_again(gradient)  # Else it would be written in float32, too, for the sum.
    return gradient, again.astype(jnp.float32).sum(tuple(range(again.ndim - 1))).astype(bias.dtype)


_plus_bias.defvjp(_plus_bias_forward, _plus_bias_backward)


def _biased(hidden, bias: nnx.Param | None):
    return hidden if bias is None else _plus_bias(hidden, bias[...])


class Linear(nnx.Linear):
    """A dense layer as `linear` builds it; its bias is added by `_plus_bias`."""

    def __call__(self, hidden: Float[Array, "*B C"]) -> Float[Array, "*B D"]:
        """Returns hidden @ kernel + bias, in the layer's dtype."""
        hidden, kernel = self.promote_dtype((hidden, self.kernel[...]), dtype=self.dtype)
        return _biased(hidden @ kernel, self.bias)

    def of_heads(self, heads: Float[Array, "*B N K"]) -> Float[Array, "*B D"]:
        """Returns the same of heads side by side, and leaves them where they lie: a TPU would turn them over first."""
        heads, kernel = self.promote_dtype((heads, self.kernel[...]), dtype=self.dtype)
        return _biased(jnp.tensordot(heads, kernel.reshape(*heads.shape[-2:], -1), 2), self.bias)


class Conv(nnx.Conv):
    """A 2-D convolution as `conv` builds it, without groups or dilation; its bias is added by `_plus_bias`."""

    def __call__(self, hidden: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 D"]:
        """Returns the convolution with its bias, in the layer's dtype."""
        hidden, kernel = self.promote_dtype((hidden, self.kernel[...]), dtype=self.dtype)
        hidden = self.conv_general_dilated(
            hidden, kernel, self.strides, self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return _biased(hidden, self.bias)


def linear(in_features: int, out_features: int, *, use_bias: bool = True, dtype, rngs: nnx.Rngs) -> Linear:
    """Builds a dense layer."""
    return Linear(
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
    in_channels: int,
    out_channels: int,
    kernel_size: int | tuple[int, int],
    *,
    stride: int = 1,
    padding=None,
    use_bias: bool = True,
    convolve: Callable = jax.lax.conv_general_dilated,
    dtype,
    rngs: nnx.Rngs,
) -> Conv:
    """Builds a 2-D convolution; `padding`: ((top, bottom), (left, right)), else half the kernel on every side."""
    rows, columns = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    return Conv(
        in_channels,
        out_channels,
        (rows, columns),
        strides=(stride, stride),
        padding=padding if padding is not None else ((rows // 2,) * 2, (columns // 2,) * 2),
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=jnp.float32,
        kernel_init=_kernel_init,
        bias_init=_bias_init(in_channels * rows * columns),
        conv_general_dilated=_by_cell if rows == columns == stride == 1 else convolve,
        rngs=rngs,
    )


def _by_cell(hidden, kernel, *_, **__):
    """A 1x1 convolution as the dense layer that it is."""
    return hidden @ kernel[0, 0]


def for_stacks(model: nnx.Module) -> nnx.Module:
    """Has a network's convolutions run one after the other where several networks run at once, under `jax.vmap`.

    Left to `vmap`, they would become one convolution by groups of channels, with everything turned over before and
    after it. Dense layers become batched products, and the rest does not know that there are several networks.
    """
    for _, node in nnx.iter_graph(model):
        if isinstance(node, Conv) and node.conv_general_dilated is not _by_cell:
            node.conv_general_dilated = _Apart(node.conv_general_dilated)
    return model


@dataclasses.dataclass(frozen=True)
class _Apart:
    """A convolution whose batching rule is a loop, written out. For frozen networks: JAX could not transpose it."""

    convolve: Callable

    def __call__(self, hidden, kernel, *args, **options):
        @jax.custom_batching.custom_vmap
        def one(hidden, kernel):
            return self.convolve(hidden, kernel, *args, **options)

        @one.def_vmap
        def each(size, batched, *given):
            rows = [
                one(*(leaf[k] if there else leaf for leaf, there in zip(given, batched, strict=True)))
                for k in range(size)
            ]
            return jnp.stack(rows), True

        return one(hidden, kernel)


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


def identity(hidden: jax.Array) -> jax.Array:
    """Returns its argument: no activation."""
    return hidden


def normed(
    norm: nnx.GroupNorm | nnx.LayerNorm,
    hidden: jax.Array,
    activation: Callable[[jax.Array], jax.Array] = identity,
    shift: jax.Array | None = None,
) -> jax.Array:
    """Returns a norm's output, behind an activation, in the dtype of `hidden`; a group norm's of `hidden` + `shift`."""
    scale, bias = norm.scale[...], norm.bias[...]
    if isinstance(norm, nnx.GroupNorm):
        return norms.group_norm(hidden, scale, bias, shift, norm.num_groups, norm.epsilon, activation)
    return activation(norms.layer_norm(hidden, scale, bias, norm.epsilon))


def repeated(leaf: jax.Array, batch_size: int) -> jax.Array:
    """Repeats each row, where a batch has become larger than `leaf`: behind its prompts, where a latent has several."""
    return leaf if len(leaf) == batch_size else jnp.repeat(leaf, batch_size // len(leaf), axis=0)


def stored_dtype(path, dtype):
    """Frozen kernels and their biases rest in the compute dtype, which their layers cast to anyway; the rest, float32.

    A norm's scale and bias, and the tables, are small, and computed with in float32.
    """
    in_layer = path[-1].key in ("kernel", "bias") and "norm" not in str(path[-2].key)
    return dtype if in_layer else jnp.float32


class BatchNorm(nnx.Module):
    """The batch norm of a trained network: it scales by the mean and variance that were counted in training.

    Both are parameters here, as they are tensors in a state dict; `nnx.BatchNorm` keeps them apart, and averages.
    """

    def __init__(self, num_features: int, *, epsilon: float):
        self.scale = nnx.Param(jnp.ones(num_features))
        self.bias = nnx.Param(jnp.zeros(num_features))
        self.running_mean = nnx.Param(jnp.zeros(num_features))
        self.running_var = nnx.Param(jnp.ones(num_features))
        self.epsilon = epsilon

    def __call__(self, hidden: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        """Returns (hidden - mean) / sqrt(variance + epsilon), scaled and shifted, by channel."""
        gain = self.scale[...] * jax.lax.rsqrt(self.running_var[...] + self.epsilon)
        shift = self.bias[...] - self.running_mean[...] * gain
        shape = (1,) * (hidden.ndim - 1) + gain.shape
        return hidden * gain.reshape(shape) + shift.reshape(shape)


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
    known = _parameters(build)
    fields = {name: value for name, value in config.items() if not name.startswith("_")}
    others = {name: value for name, value in fields.items() if name not in known}
    wrong = [f"{name}={value!r}" for name, value in others.items() if value not in inert.get(name, (None, False))]
    if wrong:
        raise UserError(f"this architecture is not supported: {', '.join(sorted(wrong))} cannot be computed.")
    return {name: value for name, value in fields.items() if name in known}


def all_arguments(build: Callable, given: Mapping) -> Config:
    """Returns every field that `build` takes: as given, else its default."""
    return Config({name: given.get(name, parameter.default) for name, parameter in _parameters(build).items()})


def _parameters(build) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(build).parameters
    return {name: parameter for name, parameter in parameters.items() if name not in ("self", "dtype", "rngs")}
