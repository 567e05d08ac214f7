"""The networks whose features can compare sets of pictures, and the names of their distances."""

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.evaluation import clip, inception
from dmm_jax.evaluation.frechet import Statistics, frechet_distance
from dmm_jax.evaluation.kernel_distances import CMMD_SCALE, CMMD_SIGMA, Features, cmmd
from dmm_jax.evaluation.published_weights import Weights, unknown_weights
from dmm_jax.models.inception_v3 import NUM_FEATURES as NUM_INCEPTION_FEATURES
from dmm_jax.runtime.errors import UserError
from dmm_jax.text.tokenizer import Tokenizers
from dmm_jax.world import classifier
from dmm_jax.world.shipped_checkpoints import BASE, CLASSIFIER, FOLDER

SHAPES = "shapes"
NONE = "none"  # No network: pairs of pictures are compared, and no sets of them.
CLIP = "clip"
RESIZES = {"inception": "TensorFlow 1 bilinear to 299", "clean-inception": "clean-fid bicubic to 299"}

Summary = Statistics | Features  # Holds what a distance needs of the features of one model's pictures.


class FeatureNetwork(NamedTuple):
    """A network whose features compare sets of pictures.

    Attributes:
      features: maps pictures uint8 (n, H, W, 3) to features float32 (n, D).
      distance_name: the name of the distance in reports.
      empty: returns the summary of no pictures; its `update` adds features.
      distance: maps two summaries to their distance.
      kernel_name: the name of KID in reports; "" if KID is not measured.
      settings: what a reader needs to repeat a number.
    """

    features: Callable[[np.ndarray], np.ndarray]
    distance_name: str
    empty: Callable[[], Summary]
    distance: Callable[..., float]
    kernel_name: str
    settings: Mapping[str, str]


def open_feature_network(spec: str) -> FeatureNetwork:
    """Opens `shapes`, `inception:PATH`, `clean-inception:PATH` or `clip:PATH`.

    Raises:
      ValueError: `spec` has another form.
      CheckpointError: the weights cannot be used.
    """
    kind, _, path = spec.partition(":")
    if spec == SHAPES:
        return _shapes_classifier()
    if kind == CLIP and path:
        return from_clip(clip.load(path))
    if kind in RESIZES and path:
        return from_inception(inception.load(path), kind)
    raise UserError(
        f"unknown features {spec!r}; use {NONE}, {SHAPES} (of the embedded world), one of "
        f"{', '.join(f'{name}:PATH' for name in RESIZES)}, where PATH is Inception's weights as .safetensors, "
        f"or {CLIP}:PATH, where PATH is a CLIP's folder."
    )


def draws_shapes_world(base: Checkpoint) -> bool:
    """Tells whether a base checkpoint draws the embedded world, by its tokenizer: the world has its own."""
    shipped = Tokenizers.from_folders([FOLDER / BASE / "tokenizer"])
    return base.tokenizers().digest == shipped.digest


def _shapes_classifier() -> FeatureNetwork:
    features = functools.partial(classifier.features, *classifier.load(FOLDER / CLASSIFIER))
    sha256 = hashlib.sha256((FOLDER / CLASSIFIER).read_bytes()).hexdigest()
    settings = {"features": "the embedded world's classifier", "weights SHA-256": sha256}
    empty = functools.partial(Statistics.empty, classifier.NUM_FEATURES)
    return FeatureNetwork(features, "FD (shapes)", empty, frechet_distance, "", settings)


def from_inception(weights: Weights, kind: str) -> FeatureNetwork:
    """Returns Inception with one of RESIZES; its distances are called FID and KID only for the published weights."""
    clean = kind == "clean-inception"
    names = [f"{'clean-' * clean}{name}" for name in ("FID", "KID")]
    if not weights.published:
        names = [f"{name} ({kind}, {unknown_weights(weights.sha256)})" for name in ("FD", "KD")]
    settings = {"features": "Inception 2015-12-05, 2048", "weights SHA-256": weights.sha256, "resize": RESIZES[kind]}
    features = functools.partial(inception.features, weights, clean=clean)
    empty = functools.partial(Statistics.empty, NUM_INCEPTION_FEATURES)
    return FeatureNetwork(features, names[0], empty, frechet_distance, names[1], settings)


def from_clip(network: clip.Clip) -> FeatureNetwork:
    """Returns CLIP's image encoder; its distance is called CMMD only for CMMD's network (arXiv:2401.09603, 3)."""
    features = functools.partial(clip.image_embeddings, network)
    settings = network.settings | {"kernel": f"Gaussian of width {CMMD_SIGMA:g}, times {CMMD_SCALE:g}, biased"}
    name = "CMMD" if network.is_large_336 else "MMD"
    return FeatureNetwork(features, f"{name} ({network.weights_name})", Features, _cmmd, "", settings)


def _cmmd(a: Features, b: Features) -> float:
    return cmmd(a.rows, b.rows)
