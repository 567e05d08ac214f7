"""LPIPS with AlexNet, version 0.1 (arXiv:1801.03924): how unlike two pictures look, by learned weights of features.

Attributes are the keys of torchvision's AlexNet (`features.*`) and of the `lpips` package's linear layers beside them.
"""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dmm_jax.models.layers import Identity, conv
from dmm_jax.runtime.errors import UserError

# By channel of pictures in [-1, 1]: ImageNet's mean and deviation, rounded.
SHIFT = np.array([[[[-0.030, -0.088, -0.188]]]], np.float32)
SCALE = np.array([[[[0.458, 0.448, 0.450]]]], np.float32)
CHANNELS = (64, 192, 384, 256, 256)
MIN_SIZE = 31  # Pixels; of less, the second pooling leaves nothing.
EPSILON = 1e-10


class LinearLayer(nnx.Module):
    """A weight a channel, behind a dropout that does nothing once trained."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.model = nnx.List([Identity(), conv(channels, 1, 1, use_bias=False, dtype=jnp.float32, rngs=rngs)])

    def __call__(self, hidden: Float[Array, "B h w C"]) -> Float[Array, " B"]:
        """Returns the weighted sum over channels, in the mean over places."""
        return self.model[1](hidden).mean(axis=(1, 2, 3))


class LPIPS(nnx.Module):
    """Compares the outputs of AlexNet's five activations, each place's channels brought to length 1."""

    def __init__(self, *, rngs: nnx.Rngs):
        layer = functools.partial(conv, dtype=jnp.float32, rngs=rngs)
        first, *others = CHANNELS
        self.features = nnx.List(
            [
                layer(3, first, 11, stride=4, padding=((2, 2), (2, 2))),
                nnx.relu,
                _halved,
                layer(first, others[0], 5),
                nnx.relu,
                _halved,
                layer(others[0], others[1], 3),
                nnx.relu,
                layer(others[1], others[2], 3),
                nnx.relu,
                layer(others[2], others[3], 3),
                nnx.relu,
            ]
        )
        for place, channels in enumerate(CHANNELS):
            setattr(self, f"lin{place}", LinearLayer(channels, rngs=rngs))

    def __call__(self, a: Float[Array, "B H W 3"], b: Float[Array, "B H W 3"]) -> Float[Array, " B"]:
        """Returns the distance of each pair of pictures in [-1, 1]; 0 if they are the same.

        Raises:
          ValueError: the pictures are too small.
        """
        if min(a.shape[1:3]) < MIN_SIZE:
            raise UserError(f"LPIPS needs pictures of {MIN_SIZE} pixels a side; got {a.shape[2]} x {a.shape[1]}.")
        distance = jnp.zeros(len(a))
        for place, (one, other) in enumerate(zip(self._activations(a), self._activations(b), strict=True)):
            distance += getattr(self, f"lin{place}")((_unit(one) - _unit(other)) ** 2)
        return distance

    def _activations(self, images: Float[Array, "B H W 3"]) -> list[Float[Array, "B h w C"]]:
        hidden, found = (images - SHIFT) / SCALE, []
        for layer in self.features:
            hidden = layer(hidden)
            found += [hidden] if layer is nnx.relu else []
        return found


_halved = functools.partial(nnx.max_pool, window_shape=(3, 3), strides=(2, 2))


def _unit(hidden: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
    return hidden / (jnp.linalg.norm(hidden, axis=-1, keepdims=True) + EPSILON)
