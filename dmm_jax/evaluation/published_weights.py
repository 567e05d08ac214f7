"""Network weights that others publish as pickles, read from safetensors files that `convert_weights` makes of them.

A distance is named after published weights (FID, KID, LPIPS) only if the file records its source and still holds the
same tensors.
"""

import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from flax import nnx

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.abstract import abstract_model
from dmm_jax.checkpoints.formats import safetensors_io
from dmm_jax.runtime import sharding

SOURCE, CONTENTS = "source_sha256", "contents_sha256"  # Keys in a converted file's metadata.


class PublishedFile(NamedTuple):
    """A published pickle: its name and the SHA-256 of its bytes."""

    name: str
    sha256: str


class Weights(NamedTuple):
    """A network with its weights.

    Attributes:
      sha256: of the weight file.
      published: whether these are the published weights.
    """

    graph: nnx.GraphDef
    params: Mapping
    sha256: str
    published: bool


def load_weights(
    path: str | pathlib.Path, build: Callable[[nnx.Rngs], nnx.Module], published: Sequence[PublishedFile], where: str
) -> Weights:
    """Reads the weights of a network from a safetensors file.

    Args:
      published: the files that `convert_weights` makes the published weights of.
      where: names the weights in errors.

    Raises:
      CheckpointError: the file is missing, is a pickle, is damaged, or holds another network.
    """
    tensors = safetensors_io.TensorFile(path)
    graph, state = nnx.split(abstract_model(build), nnx.Param)
    params = naming.from_torch(nnx.to_pure_dict(state), tensors, np.float32, where=where)
    with tensors.path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    metadata = tensors.metadata
    same = metadata.get(SOURCE) == source(published) and metadata.get(CONTENTS) == contents_sha256(tensors)
    return Weights(graph, sharding.on_each_device(params), sha256, same)


def source(published: Sequence[PublishedFile]) -> str:
    """Returns what a converted file's metadata says of its source."""
    return " ".join(file.sha256 for file in published)


def contents_sha256(tensors: Mapping) -> str:
    """Returns the SHA-256 of a state dict's keys and bytes, which does not depend on the layout of a file."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(f"{key}\0".encode())
        digest.update(safetensors_io.raw_bytes(tensors[key]))
    return digest.hexdigest()


def unknown_weights(sha256: str) -> str:
    """Returns a description of weights that are not the published ones, for the name of a distance."""
    return f"unknown weights SHA-256 {sha256[:10]}"
