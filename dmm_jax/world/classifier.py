"""Classifiers of small pictures. `FD (shapes)` compares the penultimate features of one, as FID does Inception's."""

import functools
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped, UInt8

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.formats import safetensors_io
from dmm_jax.models.layers import Conv, Linear
from dmm_jax.runtime import sharding
from dmm_jax.runtime.chunks import in_chunks
from dmm_jax.world.scenes import COLOURS, RELATIONS, SHAPES, SIZES, Content

NUM_FEATURES = 32
CHANNELS = (24, 48, 64, 96)
STYLE_LOSS_WEIGHT = 2.0  # Times the mean squared error of the style vector, added to the cross entropies.
CHUNK_SIZE = 256  # Images per call of the compiled network.


class PictureFeatures(nnx.Module):
    """Features of a 64x64 picture; a subclass adds what they predict.

    Args:
      channels: of the convolutions; each one halves the picture.
      num_features: number of features.
    """

    def __init__(self, channels: Sequence[int], num_features: int, *, rngs: nnx.Rngs):
        sizes = (3, *channels)
        self.convs = nnx.List(
            Conv(sizes[i], sizes[i + 1], 3, stride=2, dtype=jnp.float32, rngs=rngs) for i in range(len(channels))
        )
        norm = functools.partial(nnx.GroupNorm, num_groups=8, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.norms = nnx.List(norm(size) for size in channels)
        self.to_features = Linear(2 * channels[-1], num_features, dtype=jnp.float32, rngs=rngs)

    def __call__(self, images: Float[Array, "B 64 64 3"]) -> Float[Array, "B D"]:
        """Returns the features of images in [-1, 1]: linear outputs, which are closer to Gaussian than activations."""
        hidden = images
        for convolve, norm in zip(self.convs, self.norms, strict=True):
            hidden = nnx.silu(norm(convolve(hidden)))
        pooled = jnp.concatenate([hidden.mean((1, 2)), hidden.max((1, 2))], axis=-1)  # (B, 2 * channels[-1])
        return self.to_features(pooled)


class ShapeFeatures(PictureFeatures):
    """Predicts caption and style of a picture. Only `world.recipe` trains it.

    Args:
      style_dim: length of the vector that describes a style.
    """

    def __init__(self, style_dim: int, *, rngs: nnx.Rngs):
        super().__init__(CHANNELS, NUM_FEATURES, rngs=rngs)
        dense = functools.partial(Linear, dtype=jnp.float32, rngs=rngs)
        self.num_objects = dense(NUM_FEATURES, 2)
        self.shapes = dense(NUM_FEATURES, 2 * len(SHAPES))
        self.colours = dense(NUM_FEATURES, 2 * len(COLOURS))
        self.sizes = dense(NUM_FEATURES, 2 * len(SIZES))
        self.relation = dense(NUM_FEATURES, len(RELATIONS))
        self.style = dense(NUM_FEATURES, style_dim)

    def predict(self, images: Float[Array, "B 64 64 3"]) -> dict[str, Float[Array, "B ..."]]:
        """Returns "style" and, by field of `canonical` content, the logits: num_objects of 1 and 2, slots on axis 1."""
        hidden = nnx.silu(self(images))
        slots = {"shape_ids": self.shapes, "colour_ids": self.colours, "size_ids": self.sizes}
        return {
            "num_objects": self.num_objects(hidden),
            **{name: head(hidden).reshape(len(images), 2, -1) for name, head in slots.items()},
            "relation_ids": self.relation(hidden),
            "style": self.style(hidden),
        }

    def loss(
        self, images: Float[Array, "B 64 64 3"], content: Content, style_vectors: Float[Array, "B S"]
    ) -> Float[Array, ""]:
        """Returns the cross entropies, summed over the fields of `content`, plus the style vector's weighted error.

        Args:
          images: in [-1, 1].
          content: of the captions, with the shapes in their order; ids of -1 (absent shapes) do not count.
          style_vectors: the true ones.
        """
        predicted = self.predict(images)
        truth = canonical(content)
        truth = truth._replace(num_objects=truth.num_objects - 1)._asdict()
        words = sum(cross_entropy(predicted[name], jnp.asarray(ids)) for name, ids in truth.items())
        return words + STYLE_LOSS_WEIGHT * jnp.mean((predicted["style"] - style_vectors) ** 2)


def canonical(content: Content) -> Content:
    """Returns the scenes in one of two equal forms: "A below B" becomes "B above A", "right of" becomes "left of"."""
    canonical_ids = np.array([0, 0, 2, 2, -1])  # below -> above, right of -> left of; index -1 reads the last entry.
    relation_ids = jnp.asarray(canonical_ids)[content.relation_ids]
    swapped = (relation_ids != content.relation_ids)[..., None]
    slots = (jnp.where(swapped, ids[..., ::-1], ids) for ids in content[1:4])
    return Content(jnp.asarray(content.num_objects), *slots, relation_ids)


def features(graph: nnx.GraphDef, params: Mapping, images: UInt8[np.ndarray, "n 64 64 3"]) -> Float[np.ndarray, "n D"]:
    """Returns the features of pictures on the host."""

    def compute(chunk):
        return _chunk_features(graph, params, sharding.spread(chunk))

    return in_chunks(compute, CHUNK_SIZE, params["to_features"]["bias"].shape, images)


def scene_accuracy(
    graph: nnx.GraphDef, params: Mapping, images: UInt8[np.ndarray, "n 64 64 3"], content: Content
) -> dict[str, float]:
    """Returns the share of correct words by field of `content`, and "scene", the share of pictures with all correct."""
    predicted = _predictions(graph, params, jnp.asarray(images))
    truth = canonical(content)
    truth = truth._replace(num_objects=truth.num_objects - 1)._asdict()
    shares, scene = {}, np.ones(len(images), bool)
    for name, ids in truth.items():
        ids = np.asarray(ids).reshape(len(images), -1)  # (n, 2) for the fields of two shapes, else (n, 1)
        correct = np.asarray(predicted[name].argmax(-1)).reshape(ids.shape) == ids
        shares[name] = float(correct[ids >= 0].mean())
        scene &= (correct | (ids < 0)).all(axis=1)
    return shares | {"scene": float(scene.mean())}


def load(path: str | pathlib.Path) -> tuple[nnx.GraphDef, dict]:
    """Reads a classifier's graph and parameters, the first arguments of `features`, from a safetensors file.

    Raises:
      CheckpointError: the file is damaged or does not hold a classifier.
    """
    tensors = safetensors_io.TensorFile(path)
    style_dim = tensors.shape("style.bias")[0] if "style.bias" in tensors.keys() else 1  # 1: `from_torch` reports it.
    abstract = nnx.eval_shape(lambda: ShapeFeatures(style_dim, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract, nnx.Param)
    return graph, naming.from_torch(nnx.to_pure_dict(state), tensors, where=f"classifier of {path}")


@functools.partial(jax.jit, static_argnums=0)
def _chunk_features(
    graph: nnx.GraphDef, params: Mapping, images: UInt8[Array, "chunk 64 64 3"]
) -> Float[Array, "chunk D"]:
    return nnx.merge(graph, params)(images.astype(jnp.float32) / 127.5 - 1.0)


@functools.partial(jax.jit, static_argnums=0)
def _predictions(
    graph: nnx.GraphDef, params: Mapping, images: UInt8[Array, "n 64 64 3"]
) -> dict[str, Float[Array, "n ..."]]:
    return nnx.merge(graph, params).predict(images.astype(jnp.float32) / 127.5 - 1.0)


def cross_entropy(logits: Float[Array, "*B classes"], ids: Shaped[Array, "*B"]) -> Float[Array, ""]:
    """Returns the mean over all ids that are not -1."""
    present = ids >= 0
    chosen = jnp.take_along_axis(nnx.log_softmax(logits), jnp.maximum(ids, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(present, chosen, 0.0)) / jnp.maximum(jnp.sum(present), 1)
