"""The Inception of FID: TensorFlow's network of 2015-12-05 (arXiv:1512.00567, 1706.08500), up to its 2048 features.

It differs from torchvision's: average pools leave the padding out of the mean, and the last block pools by maximum.
Attributes are the keys of `pt_inception-2015-12-05-6726825d.pth`.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dmm_jax.models.layers import Conv, Linear

IMAGE_SIZE = 299
NUM_FEATURES = 2048
NUM_CLASSES = 1008
BATCH_NORM_EPSILON = 1e-3

_halved = functools.partial(nnx.max_pool, window_shape=(3, 3), strides=(2, 2))
_maximum = functools.partial(nnx.max_pool, window_shape=(3, 3), padding="SAME")
_average = functools.partial(nnx.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False)


class BatchNorm(nnx.Module):
    """Batch norm of a trained network, by the mean and variance counted in training.

    Both are parameters here, as in a state dict; `nnx.BatchNorm` keeps them apart, and averages.
    """

    def __init__(self, num_features: int, *, epsilon: float):
        self.scale = nnx.Param(jnp.ones(num_features))
        self.bias = nnx.Param(jnp.zeros(num_features))
        self.running_mean = nnx.Param(jnp.zeros(num_features))
        self.running_var = nnx.Param(jnp.ones(num_features))
        self.epsilon = epsilon

    def __call__(self, hidden: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        """Returns (hidden - mean) / sqrt(variance + epsilon) * scale + bias, per channel."""
        gain = self.scale[...] * jax.lax.rsqrt(self.running_var[...] + self.epsilon)
        shift = self.bias[...] - self.running_mean[...] * gain
        shape = (1,) * (hidden.ndim - 1) + gain.shape
        return hidden * gain.reshape(shape) + shift.reshape(shape)


class BasicConv2d(nnx.Module):
    """Convolution without bias, batch norm, ReLU.

    Args:
      kernel_size: rows and columns.
      valid: without padding; else the picture keeps its size.
    """

    def __init__(self, in_channels, out_channels, kernel_size=(1, 1), *, stride=1, valid=False, rngs: nnx.Rngs):
        self.conv = Conv(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding="VALID" if valid else None,
            use_bias=False,
            dtype=jnp.float32,
            rngs=rngs,
        )
        self.bn = BatchNorm(out_channels, epsilon=BATCH_NORM_EPSILON)

    def __call__(self, hidden: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Returns the channels, none below zero."""
        return nnx.relu(self.bn(self.conv(hidden)))


class InceptionA(nnx.Module):
    """Parallel convolutions of 1, 5 and twice 3, at 35 x 35."""

    def __init__(self, in_channels: int, pool_features: int, *, rngs: nnx.Rngs):
        layer = functools.partial(BasicConv2d, rngs=rngs)
        self.branch1x1 = layer(in_channels, 64)
        self.branch5x5_1 = layer(in_channels, 48)
        self.branch5x5_2 = layer(48, 64, (5, 5))
        self.branch3x3dbl_1 = layer(in_channels, 64)
        self.branch3x3dbl_2 = layer(64, 96, (3, 3))
        self.branch3x3dbl_3 = layer(96, 96, (3, 3))
        self.branch_pool = layer(in_channels, pool_features)

    def __call__(self, hidden: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        """Returns the branches' channels."""
        branches = (
            self.branch1x1(hidden),
            self.branch5x5_2(self.branch5x5_1(hidden)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(hidden))),
            self.branch_pool(_average(hidden)),
        )
        return jnp.concatenate(branches, axis=-1)


class InceptionB(nnx.Module):
    """Halves 35 x 35 to 17 x 17."""

    def __init__(self, in_channels: int, *, rngs: nnx.Rngs):
        layer = functools.partial(BasicConv2d, rngs=rngs)
        self.branch3x3 = layer(in_channels, 384, (3, 3), stride=2, valid=True)
        self.branch3x3dbl_1 = layer(in_channels, 64)
        self.branch3x3dbl_2 = layer(64, 96, (3, 3))
        self.branch3x3dbl_3 = layer(96, 96, (3, 3), stride=2, valid=True)

    def __call__(self, hidden: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Returns the branches' channels."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(hidden)))
        return jnp.concatenate((self.branch3x3(hidden), double, _halved(hidden)), axis=-1)


class InceptionC(nnx.Module):
    """Parallel convolutions of 1, 7 and twice 7, factored into rows and columns, at 17 x 17."""

    def __init__(self, in_channels: int, channels_7x7: int, *, rngs: nnx.Rngs):
        layer = functools.partial(BasicConv2d, rngs=rngs)
        row, column, inner = (1, 7), (7, 1), channels_7x7
        self.branch1x1 = layer(in_channels, 192)
        self.branch7x7_1 = layer(in_channels, inner)
        self.branch7x7_2 = layer(inner, inner, row)
        self.branch7x7_3 = layer(inner, 192, column)
        self.branch7x7dbl_1 = layer(in_channels, inner)
        self.branch7x7dbl_2 = layer(inner, inner, column)
        self.branch7x7dbl_3 = layer(inner, inner, row)
        self.branch7x7dbl_4 = layer(inner, inner, column)
        self.branch7x7dbl_5 = layer(inner, 192, row)
        self.branch_pool = layer(in_channels, 192)

    def __call__(self, hidden: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        """Returns the branches' channels."""
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(hidden)))
        branches = (
            self.branch1x1(hidden),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(hidden))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(_average(hidden)),
        )
        return jnp.concatenate(branches, axis=-1)


class InceptionD(nnx.Module):
    """Halves 17 x 17 to 8 x 8."""

    def __init__(self, in_channels: int, *, rngs: nnx.Rngs):
        layer = functools.partial(BasicConv2d, rngs=rngs)
        self.branch3x3_1 = layer(in_channels, 192)
        self.branch3x3_2 = layer(192, 320, (3, 3), stride=2, valid=True)
        self.branch7x7x3_1 = layer(in_channels, 192)
        self.branch7x7x3_2 = layer(192, 192, (1, 7))
        self.branch7x7x3_3 = layer(192, 192, (7, 1))
        self.branch7x7x3_4 = layer(192, 192, (3, 3), stride=2, valid=True)

    def __call__(self, hidden: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Returns the branches' channels."""
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(hidden)))
        branches = (self.branch3x3_2(self.branch3x3_1(hidden)), self.branch7x7x3_4(seven), _halved(hidden))
        return jnp.concatenate(branches, axis=-1)


class InceptionE(nnx.Module):
    """Parallel convolutions over rows and over columns, at 8 x 8.

    Args:
      pool: the pooling branch; TensorFlow's network takes the mean in one such block, the maximum in the next.
    """

    def __init__(self, in_channels: int, pool, *, rngs: nnx.Rngs):
        layer = functools.partial(BasicConv2d, rngs=rngs)
        row, column = (1, 3), (3, 1)
        self.pool = pool
        self.branch1x1 = layer(in_channels, 320)
        self.branch3x3_1 = layer(in_channels, 384)
        self.branch3x3_2a = layer(384, 384, row)
        self.branch3x3_2b = layer(384, 384, column)
        self.branch3x3dbl_1 = layer(in_channels, 448)
        self.branch3x3dbl_2 = layer(448, 384, (3, 3))
        self.branch3x3dbl_3a = layer(384, 384, row)
        self.branch3x3dbl_3b = layer(384, 384, column)
        self.branch_pool = layer(in_channels, 192)

    def __call__(self, hidden: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        """Returns the branches' channels."""
        single = self.branch3x3_1(hidden)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(hidden))
        branches = (
            self.branch1x1(hidden),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(hidden)),
        )
        return jnp.concatenate(branches, axis=-1)


class InceptionV3(nnx.Module):
    """Maps pictures to the features that FID compares; `fc`, a part of the file, is not computed."""

    def __init__(self, *, rngs: nnx.Rngs):
        layer = functools.partial(BasicConv2d, rngs=rngs)
        self.Conv2d_1a_3x3 = layer(3, 32, (3, 3), stride=2, valid=True)
        self.Conv2d_2a_3x3 = layer(32, 32, (3, 3), valid=True)
        self.Conv2d_2b_3x3 = layer(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = layer(64, 80)
        self.Conv2d_4a_3x3 = layer(80, 192, (3, 3), valid=True)
        self.Mixed_5b = InceptionA(192, pool_features=32, rngs=rngs)
        self.Mixed_5c = InceptionA(256, pool_features=64, rngs=rngs)
        self.Mixed_5d = InceptionA(288, pool_features=64, rngs=rngs)
        self.Mixed_6a = InceptionB(288, rngs=rngs)
        self.Mixed_6b = InceptionC(768, channels_7x7=128, rngs=rngs)
        self.Mixed_6c = InceptionC(768, channels_7x7=160, rngs=rngs)
        self.Mixed_6d = InceptionC(768, channels_7x7=160, rngs=rngs)
        self.Mixed_6e = InceptionC(768, channels_7x7=192, rngs=rngs)
        self.Mixed_7a = InceptionD(768, rngs=rngs)
        self.Mixed_7b = InceptionE(1280, _average, rngs=rngs)
        self.Mixed_7c = InceptionE(2048, _maximum, rngs=rngs)
        self.fc = Linear(NUM_FEATURES, NUM_CLASSES, dtype=jnp.float32, rngs=rngs)

    def __call__(self, images: Float[Array, "B 299 299 3"]) -> Float[Array, "B 2048"]:
        """Returns the features of pictures in [0, 255], already resized."""
        hidden = (images - 128.0) / 128.0
        hidden = self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(hidden))  # (B, 147, 147, 32)
        hidden = _halved(self.Conv2d_2b_3x3(hidden))  # (B, 73, 73, 64)
        hidden = _halved(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(hidden)))  # (B, 35, 35, 192)
        hidden = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(hidden)))  # (B, 35, 35, 288)
        hidden = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(hidden)))  # (B, 17, 17, 768)
        hidden = self.Mixed_6e(self.Mixed_6d(hidden))
        hidden = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(hidden)))  # (B, 8, 8, 2048)
        return hidden.mean(axis=(1, 2))
