"""LPIPS with AlexNet, version 0.1 (arXiv:1801.03924): a perceptual distance, by learned weights of features.

Attributes are the keys of torchvision's AlexNet (`features.*`) and those of the `lpips` package's linear layers.
"""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dmm_jax.models.layers import Conv, Identity
from dmm_jax.runtime.errors import UserError

# ImageNet's mean and deviation per channel, rounded, for pictures in [-1, 1].
SHIFT = np.array([[[[-0.030, -0.088, -0.188]]]], np.float32)
SCALE = np.array([[[[0.458, 0.448, 0.450]]]], np.float32)
CHANNELS = (64, 192, 384, 256, 256)
MIN_SIZE = 31  # Pixels per side; from fewer, the second pooling leaves none.
EPSILON = 1e-10


class LinearLayer(nnx.Module):
    """One weight per channel."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.model = nnx.List([Identity(), Conv(channels, 1, 1, use_bias=False, dtype=jnp.float32, rngs=rngs)])

    def __call__(self, hidden: Float[Array, "B h w C"]) -> Float[Array, " B"]:
        """Returns the weighted sum over channels, averaged over cells."""
        return self.model[1](hidden).mean(axis=(1, 2, 3))


class LPIPS(nnx.Module):
    """Compares the outputs of AlexNet's five activations, after scaling each cell's channels to length 1."""

    def __init__(self, *, rngs: nnx.Rngs):
        layer = functools.partial(Conv, dtype=jnp.float32, rngs=rngs)
        first, second, third, fourth, fifth = CHANNELS
        self.features = nnx.List(
            [
                layer(3, first, 11, stride=4, padding=((2, 2), (2, 2))),
                nnx.relu,
                _halved,
                layer(first, second, 5),
                nnx.relu,
                _halved,
                layer(second, third, 3),
                nnx.relu,
                layer(third, fourth, 3),
                nnx.relu,
                layer(fourth, fifth, 3),
                nnx.relu,
            ]
        )
        for index, channels in enumerate(CHANNELS):
            setattr(self, f"lin{index}", LinearLayer(channels, rngs=rngs))

    def __call__(self, a: Float[Array, "B H W 3"], b: Float[Array, "B H W 3"]) -> Float[Array, " B"]:
        """Returns the distance of each pair of pictures in [-1, 1]; 0 if they are the same.

        Raises:
          ValueError: the pictures are too small.
        """
        if min(a.shape[1:3]) < MIN_SIZE:
            raise UserError(f"LPIPS needs pictures of {MIN_SIZE} pixels a side; got {a.shape[2]} x {a.shape[1]}.")
        distance = jnp.zeros(len(a))
        for index, (of_a, of_b) in enumerate(zip(self._activations(a), self._activations(b), strict=True)):
            distance += getattr(self, f"lin{index}")((_unit(of_a) - _unit(of_b)) ** 2)
        return distance

    def _activations(self, images: Float[Array, "B H W 3"]) -> list[Float[Array, "B h w C"]]:
        hidden, activations = (images - SHIFT) / SCALE, []
        for layer in self.features:
            hidden = layer(hidden)
            activations += [hidden] if layer is nnx.relu else []
        return activations


_halved = functools.partial(nnx.max_pool, window_shape=(3, 3), strides=(2, 2))


def _unit(hidden: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
    return hidden / (jnp.linalg.norm(hidden, axis=-1, keepdims=True) + EPSILON)
