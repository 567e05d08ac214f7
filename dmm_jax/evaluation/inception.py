"""Inception's features of pictures, for FID and KID, from a weight file that the user gives; nothing is fetched.

The published file is a pickle. `python -m dmm_jax.evaluation.convert_inception` makes a safetensors file of it, which
says from which file it came and what it held: only distances of such weights are called FID.
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
from dmm_jax.evaluation.resize import resize_clean, resize_tf1
from dmm_jax.models.inception_v3 import IMAGE_SIZE, NUM_FEATURES, InceptionV3
from dmm_jax.runtime import sharding

# Of pt_inception-2015-12-05-6726825d.pth (pytorch-fid), which torch-fidelity names weights-inception-2015-12-05-...
PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SOURCE, CONTENTS = "source_sha256", "contents_sha256"  # In the converted file's metadata.
CHUNK_SIZE = 32  # Pictures a call of the compiled network takes; the last chunk is padded to it.


class Inception(NamedTuple):
    """The network with its weights; `sha256` is of their file, `published` tells whether FIDs are made with them."""

    graph: nnx.GraphDef
    params: Mapping
    sha256: str
    published: bool


def load(path: str | pathlib.Path) -> Inception:
    """Reads the weights.

    Raises:
      CheckpointError: the file is missing, is a pickle, is damaged, or holds another network.
    """
    tensors = safetensors_io.TensorFile(path)
    graph, state = nnx.split(abstract_model(lambda rngs: InceptionV3(rngs=rngs)), nnx.Param)
    params = naming.from_torch(nnx.to_pure_dict(state), tensors, np.float32, where=f"Inception of {path}")
    with tensors.path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Inception(graph, jax.tree.map(jnp.asarray, params), sha256, _published(tensors))


def _published(tensors: safetensors_io.TensorFile) -> bool:
    """Tells whether the converter wrote this file from the published one, and no tensor changed since."""
    said = tensors.metadata
    return said.get(SOURCE) == PUBLISHED_SHA256 and said.get(CONTENTS) == contents_sha256(tensors)


def contents_sha256(tensors: Mapping) -> str:
    """Returns the SHA-256 of a state dict's keys and bytes, which converting the file elsewhere does not change."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(f"{key}\0".encode())
        digest.update(safetensors_io.raw_bytes(tensors[key]))
    return digest.hexdigest()


def features(network: Inception, images: UInt8[np.ndarray, "n H W 3"], clean: bool) -> Float[np.ndarray, "n 2048"]:
    """Returns the features of pictures on the host.

    Args:
      clean: resize as clean-fid does, else as TensorFlow 1 did.
    """
    found = np.empty((len(images), NUM_FEATURES), np.float32)
    for start in range(0, len(images), CHUNK_SIZE):
        chunk = images[start : start + CHUNK_SIZE]
        padded = np.pad(chunk, ((0, CHUNK_SIZE - len(chunk)), (0, 0), (0, 0), (0, 0)))
        resized = sharding.spread(resize_clean(padded, IMAGE_SIZE) if clean else _resize_tf1(padded))
        found[start : start + len(chunk)] = _chunk_features(network.graph, network.params, resized)[: len(chunk)]
    return found


def _resize_tf1(images: UInt8[np.ndarray, "chunk H W 3"]) -> Float[Array, "chunk 299 299 3"]:
    """Resizes outside `jit`, which fuses products with sums, so that the last bits would differ from TensorFlow's."""
    return resize_tf1(jnp.asarray(images, jnp.float32), IMAGE_SIZE)


@functools.partial(jax.jit, static_argnums=0)
def _chunk_features(
    graph: nnx.GraphDef, params: Mapping, images: Float[Array | np.ndarray, "chunk 299 299 3"]
) -> Float[Array, "chunk 2048"]:
    # Accelerators round the factors of a convolution to 10 bits or fewer unless they are told not to.
    with jax.default_matmul_precision("highest"):
        return nnx.merge(graph, params)(images)
