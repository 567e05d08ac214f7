"""LPIPS of pairs of pictures, from a weight file that the user gives; nothing is fetched.

The published weights are two pickles: torchvision's AlexNet, and five linear layers of the `lpips` package.
`python -m dmm_jax.evaluation.convert_lpips` makes one safetensors file of them, which says what it was made of.
"""

import functools
import hashlib
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.abstract import abstract_model
from dmm_jax.checkpoints.formats import safetensors_io
from dmm_jax.evaluation.inception import CONTENTS, SOURCE, contents_sha256
from dmm_jax.models.lpips_alex import LPIPS
from dmm_jax.runtime import sharding

# Of alexnet-owt-7be5be79.pth (torchvision) and of weights/v0.1/alex.pth (lpips 0.1.4 on PyPI).
PUBLISHED_SHA256 = (
    "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
    "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
)
CHUNK_SIZE = 8  # Pairs a call of the compiled network takes; the last chunk is padded to it.


class Lpips(NamedTuple):
    """The network with its weights; `sha256` is of their file, `published` tells whether they are LPIPS 0.1's."""

    graph: nnx.GraphDef
    params: Mapping
    sha256: str
    published: bool

    @property
    def name(self) -> str:
        """What its distance may be called."""
        return "LPIPS (alex)" if self.published else f"LPIPS (alex, unknown weights SHA-256 {self.sha256[:10]})"

    @property
    def facts(self) -> dict[str, str]:
        """What has to be known to repeat a number, for the report."""
        return {"LPIPS": "0.1 with AlexNet, pictures as they are", "LPIPS's weights SHA-256": self.sha256}


def load(path: str | pathlib.Path) -> Lpips:
    """Reads the weights.

    Raises:
      CheckpointError: the file is missing, is a pickle, is damaged, or holds another network.
    """
    tensors = safetensors_io.TensorFile(path)
    graph, state = nnx.split(abstract_model(lambda rngs: LPIPS(rngs=rngs)), nnx.Param)
    params = naming.from_torch(nnx.to_pure_dict(state), tensors, np.float32, where=f"LPIPS of {path}")
    with tensors.path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    said = tensors.metadata
    published = said.get(SOURCE) == " ".join(PUBLISHED_SHA256) and said.get(CONTENTS) == contents_sha256(tensors)
    return Lpips(graph, sharding.on_each_device(params), sha256, published)


def distances(
    network: Lpips, a: UInt8[np.ndarray, "n H W 3"], b: UInt8[np.ndarray, "n H W 3"]
) -> Float[np.ndarray, " n"]:
    """Returns the distance of each pair on the host; 0 if they are the same.

    Raises:
      ValueError: the pictures are too small.
    """
    found = np.empty(len(a), np.float32)
    for start in range(0, len(a), CHUNK_SIZE):
        pair = [images[start : start + CHUNK_SIZE] for images in (a, b)]
        count = len(pair[0])
        padded = [np.pad(images, ((0, CHUNK_SIZE - count), (0, 0), (0, 0), (0, 0))) for images in pair]
        found[start : start + count] = _chunk_distances(network.graph, network.params, *sharding.spread(padded))[:count]
    return found


@functools.partial(jax.jit, static_argnums=0)
def _chunk_distances(
    graph: nnx.GraphDef,
    params: Mapping,
    a: UInt8[Array | np.ndarray, "chunk H W 3"],
    b: UInt8[Array | np.ndarray, "chunk H W 3"],
) -> Float[Array, " chunk"]:
    one, other = (images.astype(jnp.float32) / 127.5 - 1.0 for images in (a, b))
    with jax.default_matmul_precision("highest"):
        return nnx.merge(graph, params)(one, other)
