"""Tells an emoji's concept and set from its picture; `FD (emoji)` compares its features, as FID does Inception's."""

import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.formats import safetensors_io
from dmm_jax.models.layers import Linear
from dmm_jax.runtime.chunks import in_chunks
from dmm_jax.world.classifier import CHUNK_SIZE, PictureFeatures, cross_entropy
from dmm_jax.world.training import Fit, Plan, Stretch, params_of, pictures_of

NUM_FEATURES = 128
MAX_SHIFT_PX, NOISE = 4, 0.05  # Training pictures are moved and noisy, as drawn ones may be.


class EmojiFeatures(PictureFeatures):
    """Predicts concept and set of a picture."""

    def __init__(self, channels: Sequence[int], num_concepts: int, num_sets: int, *, rngs: nnx.Rngs):
        super().__init__(channels, NUM_FEATURES, rngs=rngs)
        self.concept = Linear(NUM_FEATURES, num_concepts, dtype=jnp.float32, rngs=rngs)
        self.set = Linear(NUM_FEATURES, num_sets, dtype=jnp.float32, rngs=rngs)

    def predict(self, features: Float[Array, "B D"]) -> dict[str, Float[Array, "B classes"]]:
        """Returns the logits of "concept" and "set"."""
        hidden = nnx.silu(features)
        return {"concept": self.concept(hidden), "set": self.set(hidden)}


class Classifier(NamedTuple):
    """A trained classifier with the names of its classes."""

    graph: nnx.GraphDef
    params: Mapping
    concepts: tuple[str, ...]
    sets: tuple[str, ...]

    def __call__(self, images: UInt8[np.ndarray, "n 64 64 3"]) -> dict[str, Float[np.ndarray, "n D"]]:
        """Returns "features", and the probabilities of every "concept" and "set"."""
        sizes = [NUM_FEATURES, len(self.concepts), len(self.sets)]
        compute = functools.partial(_outputs, self.graph, self.params)
        parts = np.split(in_chunks(compute, CHUNK_SIZE, (sum(sizes),), images), np.cumsum(sizes)[:-1], axis=1)
        return dict(zip(("features", "concept", "set"), parts, strict=True))


@functools.partial(jax.jit, static_argnums=0)
def _outputs(graph: nnx.GraphDef, params: Mapping, images: UInt8[Array, "B 64 64 3"]) -> Float[Array, "B D"]:
    model = nnx.merge(graph, params)
    features = model(images.astype(jnp.float32) / 127.5 - 1.0)
    logits = model.predict(features)
    return jnp.concatenate([features, *(nnx.softmax(logits[name]) for name in ("concept", "set"))], axis=1)


def train(
    channels: Sequence[int], sizes: tuple[int, int], bank: Mapping, plan: Plan, rate: float, stretch: Stretch | None
) -> dict:
    """Returns the parameters of a classifier trained on a bank of "images" with their "concept" and "set" numbers.

    Args:
      sizes: the number of concepts, and of sets.
    """
    graph, params = params_of(EmojiFeatures(channels, *sizes, rngs=nnx.Rngs(4)))

    def loss_fn(params, data, rows, key):
        images = augmented(pictures_of(data, rows), key)
        model = nnx.merge(graph, params)
        logits = model.predict(model(images))
        return sum(cross_entropy(logits[name], data[name][rows]) for name in ("concept", "set"))

    return Fit(loss_fn, plan, rate)(params, bank, "classifier", seed=4, stretch=stretch)


def augmented(images: Float[Array, "B 64 64 3"], key: PRNGKeyArray) -> Float[Array, "B 64 64 3"]:
    """Returns pictures moved by up to MAX_SHIFT_PX pixels in each direction, their edges repeated, with noise."""
    shift_key, noise_key = jax.random.split(key)
    corners = jax.random.randint(shift_key, (len(images), 2), 0, 2 * MAX_SHIFT_PX + 1)
    wide = jnp.pad(images, ((0, 0), *((MAX_SHIFT_PX, MAX_SHIFT_PX),) * 2, (0, 0)), mode="edge")
    crop = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:]))
    return crop(wide, corners) + NOISE * jax.random.normal(noise_key, images.shape)


def save(path: pathlib.Path, params: Mapping, concepts: Sequence[str], sets: Sequence[str]) -> None:
    """Writes a classifier with the names of its classes."""
    names = {"concepts": json.dumps(list(concepts)), "sets": json.dumps(list(sets))}
    safetensors_io.save(path, naming.to_torch(params), {"format": "pt"} | names)


def load(path: pathlib.Path, channels: Sequence[int]) -> Classifier:
    """Reads a classifier that `save` wrote.

    Raises:
      CheckpointError: the file is damaged, or holds another network.
    """
    tensors = safetensors_io.TensorFile(path)
    concepts, sets = (tuple(json.loads(tensors.metadata[name])) for name in ("concepts", "sets"))
    abstract = nnx.eval_shape(lambda: EmojiFeatures(channels, len(concepts), len(sets), rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract, nnx.Param)
    params = naming.from_torch(nnx.to_pure_dict(state), tensors, where=f"classifier of {path}")
    return Classifier(graph, params, concepts, sets)


def accuracy(probabilities: Float[np.ndarray, "n classes"], truth: Int[np.ndarray, " n"]) -> float:
    """Returns the share of rows whose most probable class is the true one."""
    return float(np.mean(probabilities.argmax(axis=1) == truth))


def largest_jump(probabilities: Float[np.ndarray, "points classes"]) -> float:
    """Returns the largest change of a class's probability between neighbouring points of a strip.

    A strip is a line of pictures from one set to another, one picture per tenth of the mix.
    """
    return float(np.abs(np.diff(probabilities, axis=0)).max())


def backward_steps(probabilities: Float[np.ndarray, "points classes"], first: int, last: int) -> float:
    """Returns how far the probabilities of a strip's two sets move the wrong way in all: 0 along a monotonic strip.

    Args:
      first, last: the sets at the strip's ends.
    """
    rises = np.maximum(np.diff(probabilities[:, first]), 0.0).sum()
    falls = np.maximum(-np.diff(probabilities[:, last]), 0.0).sum()
    return float(rises + falls)
