"""The feature networks that `evaluate` can measure with, and what their distances may be called."""

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.evaluation import clip, inception
from dmm_jax.evaluation.frechet import Statistics, frechet_distance
from dmm_jax.evaluation.kid import CMMD_SCALE, CMMD_SIGMA, Features, cmmd
from dmm_jax.models.inception_v3 import NUM_FEATURES as NUM_INCEPTION_FEATURES
from dmm_jax.runtime.errors import UserError
from dmm_jax.text.tokenizer import Tokenizers
from dmm_jax.world import classifier as features
from dmm_jax.world.shipped_checkpoints import BASE, CLASSIFIER, FOLDER

SHAPES = "shapes"
CLIP = "clip"
RESIZES = {"inception": "TensorFlow 1 bilinear to 299", "clean-inception": "clean-fid bicubic to 299"}


class FeatureNetwork(NamedTuple):
    """A network as `evaluate` uses it.

    Attributes:
      features: pictures uint8 (n, H, W, 3) to features float32 (n, D).
      distance: its name.
      empty, between: what is kept of no picture yet, and the distance of two such; `update` adds features.
      kernel: the name of KID where it is told beside the distance, else empty.
      facts: what has to be known to repeat a number, for the report.
    """

    features: Callable[[np.ndarray], np.ndarray]
    distance: str
    empty: Callable[[], Statistics | Features]
    between: Callable[..., float]
    kernel: str
    facts: Mapping[str, str]


def open_network(spec: str) -> FeatureNetwork:
    """Opens `shapes`, `inception:PATH`, `clean-inception:PATH` or `clip:PATH`.

    Raises:
      ValueError: there is no such network, or a path is missing.
      CheckpointError: the weights cannot be used.
    """
    kind, _, path = spec.partition(":")
    if spec == SHAPES:
        classifier = functools.partial(features.features, *features.load(FOLDER / CLASSIFIER))
        sha256 = hashlib.sha256((FOLDER / CLASSIFIER).read_bytes()).hexdigest()
        facts = {"features": "the embedded world's classifier", "weights SHA-256": sha256}
        return _frechet(classifier, features.NUM_FEATURES, "FD (shapes)", "", facts)
    if kind not in (*RESIZES, CLIP) or not path:
        raise UserError(
            f"unknown features {spec!r}; use {SHAPES} (of the embedded world), one of "
            f"{', '.join(f'{name}:PATH' for name in RESIZES)}, where PATH is Inception's weights as .safetensors, "
            f"or {CLIP}:PATH, where PATH is a CLIP's folder."
        )
    return _clip(clip.load(path)) if kind == CLIP else of_inception(inception.load(path), kind)


def of_shapes_world(base: Checkpoint) -> bool:
    """Tells whether a base draws the embedded world, whose classifier `shapes` is: it then reads its words alone."""
    shipped = Tokenizers.from_folders([FOLDER / BASE / "tokenizer"])
    return Tokenizers.from_folders(base.tokenizer_folders).digest == shipped.digest


def _frechet(compute, num_features: int, distance: str, kernel: str, facts: Mapping[str, str]) -> FeatureNetwork:
    empty = functools.partial(Statistics.empty, num_features)
    return FeatureNetwork(compute, distance, empty, frechet_distance, kernel, facts)


def of_inception(network: inception.Inception, kind: str) -> FeatureNetwork:
    """Returns Inception as a network of this `kind` of resizing; what is no published weights' is not called FID."""
    clean = kind == "clean-inception"
    names = [f"{'clean-' * clean}{name}" for name in ("FID", "KID")]
    if not network.published:
        names = [f"{name} ({kind}, unknown weights SHA-256 {network.sha256[:10]})" for name in ("FD", "KD")]
    facts = {"features": "Inception 2015-12-05, 2048", "weights SHA-256": network.sha256, "resize": RESIZES[kind]}
    compute = functools.partial(inception.features, network, clean=clean)
    return _frechet(compute, NUM_INCEPTION_FEATURES, *names, facts)


def _clip(network: clip.Clip) -> FeatureNetwork:
    compute = functools.partial(clip.image_embeddings, network)
    facts = network.facts | {"kernel": f"Gaussian of width {CMMD_SIGMA:g}, times {CMMD_SCALE:g}, biased"}
    name = "CMMD" if network.large_336 else "MMD"  # CMMD is a number of one network (arXiv:2401.09603, 3).
    return FeatureNetwork(compute, f"{name} ({network.weights})", Features, _cmmd, "", facts)


def _cmmd(a: Features, b: Features) -> float:
    return cmmd(a.rows, b.rows)
