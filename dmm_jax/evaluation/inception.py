"""Inception's features of pictures, for FID and KID.

The user gives the weights as a file, which `python -m dmm_jax.evaluation.convert_inception` makes of the published
pickle. Nothing is downloaded.
"""

import functools
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from dmm_jax.evaluation.published_weights import PublishedFile, Weights, load_weights
from dmm_jax.evaluation.resize import resize_clean, resize_tf1
from dmm_jax.models.inception_v3 import IMAGE_SIZE, NUM_FEATURES, InceptionV3
from dmm_jax.runtime import sharding
from dmm_jax.runtime.chunks import in_chunks

PUBLISHED = (  # In pytorch-fid; torch-fidelity publishes the same file as weights-inception-2015-12-05-6726825d.pth.
    PublishedFile(
        "pt_inception-2015-12-05-6726825d.pth", "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
    ),
)
CHUNK_SIZE = 32  # Pictures per call of the compiled network.


def load(path: str | pathlib.Path) -> Weights:
    """Reads Inception's weights.

    Raises:
      CheckpointError: the file is missing, is a pickle, is damaged, or holds another network.
    """
    return load_weights(path, lambda rngs: InceptionV3(rngs=rngs), PUBLISHED, f"Inception of {path}")


def features(inception: Weights, images: UInt8[np.ndarray, "n H W 3"], clean: bool) -> Float[np.ndarray, "n 2048"]:
    """Returns the features of pictures on the host.

    Args:
      clean: resize as clean-fid does; otherwise as TensorFlow 1 did.
    """
    resize = functools.partial(resize_clean, size=IMAGE_SIZE) if clean else _resize_tf1

    def compute(chunk):
        return _chunk_features(inception.graph, inception.params, sharding.spread(resize(chunk)))

    return in_chunks(compute, CHUNK_SIZE, (NUM_FEATURES,), images)


def _resize_tf1(images: UInt8[np.ndarray, "chunk H W 3"]) -> Float[Array, "chunk 299 299 3"]:
    """Resizes outside `jit`, which fuses products with sums, so that the last bits would differ from TensorFlow's."""
    return resize_tf1(jnp.asarray(images, jnp.float32), IMAGE_SIZE)


@functools.partial(jax.jit, static_argnums=0)
def _chunk_features(
    graph: nnx.GraphDef, params: Mapping, images: Float[Array | np.ndarray, "chunk 299 299 3"]
) -> Float[Array, "chunk 2048"]:
    # By default, accelerators round the factors of a convolution to 10 bits or fewer.
    with jax.default_matmul_precision("highest"):
        return nnx.merge(graph, params)(images)
