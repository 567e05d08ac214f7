"""The layers that own parameters, with PyTorch's defaults where NNX's differ: epsilon, padding, initial weights.

Parameters are float32; `dtype` is the dtype of the arithmetic and of the output. Norms compute in float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dmm_jax.kernels import group_norm, layer_norm
from dmm_jax.kernels.add_bias import add_bias
from dmm_jax.kernels.convolution import convolve
from dmm_jax.kernels.dense import dense
from dmm_jax.kernels.upsample_convolution import upsample_convolve

# PyTorch's default for Linear and Conv: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), which is variance 1 / (3 fan_in).
_kernel_init = nnx.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


def _bias_init(fan_in: int):
    limit = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)


class Linear(nnx.Linear):
    """A dense layer."""

    def __init__(self, in_features: int, out_features: int, *, use_bias: bool = True, dtype, rngs: nnx.Rngs):
        super().__init__(
            in_features,
            out_features,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=jnp.float32,
            kernel_init=_kernel_init,
            bias_init=_bias_init(in_features),
            rngs=rngs,
        )
        self.lora_A = self.lora_B = None  # Set by `lora.add_factors`.

    def __call__(self, hidden: Float[Array, "*B _C"], num_axes: int = 1) -> Float[Array, "*B2 D"]:
        """Returns hidden @ kernel + bias; the last `num_axes` axes of `hidden` together are the kernel's rows."""
        hidden, kernel = self.promote_dtype((hidden, self.kernel[...]), dtype=self.dtype)
        output = dense(hidden, kernel, num_axes)
        if self.lora_A is not None:
            output = output + self.lora_B(self.lora_A(hidden, num_axes))
        return output if self.bias is None else add_bias(output, self.bias[...])


class Conv(nnx.Conv):
    """A 2-D convolution without groups or dilation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int = 1,
        padding=None,
        use_bias: bool = True,
        dtype,
        rngs: nnx.Rngs,
    ):
        """Builds the layer; `padding`: ((top, bottom), (left, right)), else half the kernel on every side."""
        rows, columns = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        super().__init__(
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
            rngs=rngs,
        )
        self.stacked = False  # Set by `for_stacks`.
        self.lora_A = self.lora_B = None  # Set by `lora.add_factors`.

    def narrowed(self, out_channels: int, **options) -> "Conv":
        """Returns a new convolution with the same window, strides and padding to another number of channels."""
        window = {"stride": self.strides[0], "padding": self.padding}
        return Conv(self.in_features, out_channels, self.kernel_size, **window, **options)

    def __call__(self, hidden: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 D"]:
        """Returns the convolution plus the bias."""
        hidden, kernel = self.promote_dtype((hidden, self.kernel[...]), dtype=self.dtype)
        output = self.convolve(hidden, kernel)
        if self.lora_A is not None:
            output = output + self.lora_B(self.lora_A(hidden))
        return output if self.bias is None else add_bias(output, self.bias[...])

    def convolve(self, hidden: Float[Array, "B h w C"], kernel: Array) -> Float[Array, "B h2 w2 D"]:
        """Returns the convolution without the bias."""
        return convolve(hidden, kernel, self.strides, self.padding, self.stacked)


class UpsampleConv(Conv):
    """A 3x3 convolution of a feature map whose resolution is doubled first, by nearest neighbours."""

    def __init__(self, in_channels: int, out_channels: int, *, use_bias: bool = True, dtype, rngs: nnx.Rngs):
        super().__init__(in_channels, out_channels, 3, use_bias=use_bias, dtype=dtype, rngs=rngs)

    def narrowed(self, out_channels: int, **options) -> "UpsampleConv":
        """Returns a new layer of the same kind to another number of channels."""
        return UpsampleConv(self.in_features, out_channels, **options)

    def convolve(self, hidden: Float[Array, "B h w C"], kernel: Array) -> Float[Array, "B h2 w2 D"]:
        """Returns the convolution without the bias."""
        return upsample_convolve(hidden, kernel, self.stacked)


def for_stacks(model: nnx.Module) -> nnx.Module:
    """Marks the convolutions of a frozen network that `jax.vmap` runs as one of several; returns the network."""
    for _, node in nnx.iter_graph(model):
        if isinstance(node, Conv):
            node.stacked = True
    return model


class GroupNorm(nnx.GroupNorm):
    """Group norm; the epsilon has no default, since the networks use two."""

    def __init__(self, num_groups: int, channels: int, *, epsilon: float, rngs: nnx.Rngs):
        super().__init__(
            channels,
            num_groups=num_groups,
            epsilon=epsilon,
            use_fast_variance=False,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            rngs=rngs,
        )

    def __call__(
        self,
        hidden: Float[Array, "B *cells C"],
        shift: Float[Array, "_B C"] | None = None,
        activation: group_norm.Activation = group_norm.identity,
    ) -> Float[Array, "B *cells C"]:
        """Returns activation(norm(hidden + shift)), in the dtype of `hidden`; `shift` is one vector per image."""
        scale, bias = self.scale[...], self.bias[...]
        return group_norm.group_norm(hidden, scale, bias, self.num_groups, self.epsilon, shift, activation)


class LayerNorm(nnx.LayerNorm):
    """Layer norm."""

    def __init__(self, features: int, *, epsilon: float = 1e-5, rngs: nnx.Rngs):
        super().__init__(
            features, epsilon=epsilon, use_fast_variance=False, dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs
        )

    def __call__(self, hidden: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        """Returns the norm of each row, in the dtype of `hidden`."""
        return layer_norm.layer_norm(hidden, self.scale[...], self.bias[...], self.epsilon)


class Identity(nnx.Module):
    """Takes the place of diffusers' Dropout in a list, so that the names of the parameters agree; does nothing."""

    def __call__(self, hidden):
        """Returns its argument."""
        return hidden


def stored_dtype(path, dtype):
    """Returns the dtype in which a frozen parameter is stored, so that its layer casts nothing at every call.

    Kernels and their biases have the compute dtype. Norms' parameters and tables are small and float32.
    """
    in_layer = path[-1].key in ("kernel", "bias") and "norm" not in str(path[-2].key)
    return dtype if in_layer else jnp.float32
