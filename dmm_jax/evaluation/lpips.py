"""LPIPS, a perceptual distance of two pictures (arXiv:1801.03924).

The user gives the weights as a file, which `python -m dmm_jax.evaluation.convert_lpips` makes of the two published
pickles: torchvision's AlexNet and the five linear layers of the `lpips` package. Nothing is downloaded.
"""

import functools
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from dmm_jax.evaluation.published_weights import PublishedFile, Weights, load_weights, unknown_weights
from dmm_jax.models.lpips_alex import LPIPS
from dmm_jax.runtime import sharding
from dmm_jax.runtime.chunks import in_chunks

PUBLISHED = (
    PublishedFile(
        "alexnet-owt-7be5be79.pth of torchvision", "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02"
    ),
    PublishedFile(
        "weights/v0.1/alex.pth of the package lpips 0.1.4",
        "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
    ),
)
OMITTED = ("classifier.",)  # AlexNet's last layers; LPIPS uses only the convolutions before them.
CHUNK_SIZE = 8  # Pairs per call of the compiled network.


def load(path: str | pathlib.Path) -> Weights:
    """Reads LPIPS's weights.

    Raises:
      CheckpointError: the file is missing, is a pickle, is damaged, or holds another network.
    """
    return load_weights(path, lambda rngs: LPIPS(rngs=rngs), PUBLISHED, f"LPIPS of {path}")


def distance_name(lpips: Weights) -> str:
    """Returns the name of the distance, which is LPIPS's own only for the published weights."""
    return "LPIPS (alex)" if lpips.published else f"LPIPS (alex, {unknown_weights(lpips.sha256)})"


def settings(lpips: Weights) -> dict[str, str]:
    """Returns what a reader of the report needs to repeat a number."""
    return {"LPIPS": "0.1 with AlexNet, pictures as they are", "LPIPS's weights SHA-256": lpips.sha256}


def distances(
    lpips: Weights, a: UInt8[np.ndarray, "n H W 3"], b: UInt8[np.ndarray, "n H W 3"]
) -> Float[np.ndarray, " n"]:
    """Returns the distance of each pair on the host; 0 if both pictures are equal.

    Raises:
      ValueError: the pictures are too small.
    """

    def compute(*pair):
        return _chunk_distances(lpips.graph, lpips.params, *sharding.spread(pair))

    return in_chunks(compute, CHUNK_SIZE, (), a, b)


@functools.partial(jax.jit, static_argnums=0)
def _chunk_distances(
    graph: nnx.GraphDef,
    params: Mapping,
    a: UInt8[Array | np.ndarray, "chunk H W 3"],
    b: UInt8[Array | np.ndarray, "chunk H W 3"],
) -> Float[Array, " chunk"]:
    scaled = (images.astype(jnp.float32) / 127.5 - 1.0 for images in (a, b))
    with jax.default_matmul_precision("highest"):
        return nnx.merge(graph, params)(*scaled)
