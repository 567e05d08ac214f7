"""Small pictures of latents, one pixel per latent cell, by a linear map that costs next to nothing."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

PATCH = 4  # Latent cells along the side of a patch of one colour.


class Preview(NamedTuple):
    """The linear map from latents to colours of 0 to 1."""

    matrix: Float[Array | np.ndarray, "C 3"]
    bias: Float[Array | np.ndarray, " 3"]

    def draw(self, latents: Float[Array | np.ndarray, "B h w C"]) -> UInt8[Array, "B h w 3"]:
        """Returns a picture of each image's latents."""
        colours = jnp.einsum("Bhwc,cr->Bhwr", latents, self.matrix) + self.bias.reshape(1, 1, 1, 3)
        return (jnp.clip(colours, 0.0, 1.0) * 255.0).astype(jnp.uint8)


GREY = Preview(np.zeros((4, 3), np.float32), np.full(3, 0.5, np.float32))


def patches(shape: tuple[int, ...]) -> Float[np.ndarray, "B h w C"]:
    """Returns latents of random patches, whose colours a decoder shows."""
    corners = (shape[0], *(-(-side // PATCH) for side in shape[1:3]), shape[3])
    values = np.random.default_rng(0).standard_normal(corners)
    return values.repeat(PATCH, 1).repeat(PATCH, 2)[:, : shape[1], : shape[2]].astype(np.float32)


def fit_preview(latents: Float[np.ndarray, "B h w C"], images: UInt8[np.ndarray, "B H W 3"]) -> Preview:
    """Returns the linear map that is nearest to the decoder that made `images` from `latents`."""
    height, width, channels = latents.shape[1:]
    factor = images.shape[1] // height
    colours = images.reshape(len(images), height, factor, width, factor, 3).mean((2, 4)) / 255.0
    inputs = latents.reshape(-1, channels)
    inputs = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
    solution = np.linalg.lstsq(inputs, colours.reshape(-1, 3), rcond=None)[0]
    return Preview(jnp.asarray(solution[:-1], jnp.float32), jnp.asarray(solution[-1], jnp.float32))
