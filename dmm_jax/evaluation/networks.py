"""The feature networks that `evaluate` can measure with, and what their distances may be called."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from dmm_jax.demo.layout import CLASSIFIER, FOLDER
from dmm_jax.evaluation import features, inception
from dmm_jax.models.inception_v3 import NUM_FEATURES as NUM_INCEPTION_FEATURES

SHAPES = "shapes"
RESIZES = {"inception": "TensorFlow 1 bilinear to 299", "clean-inception": "clean-fid bicubic to 299"}


class FeatureNetwork(NamedTuple):
    """A network as `evaluate` uses it.

    Attributes:
      features: pictures uint8 (n, H, W, 3) to features float32 (n, num_features).
      frechet, kernel: the names of its distances; `kernel` is empty where none is measured.
      facts: what has to be known to repeat a number, for the report.
    """

    features: Callable[[np.ndarray], np.ndarray]
    num_features: int
    frechet: str
    kernel: str
    facts: Mapping[str, str]


def open_network(spec: str) -> FeatureNetwork:
    """Opens `shapes`, `inception:PATH` or `clean-inception:PATH`.

    Raises:
      ValueError: there is no such network, or a path is missing.
      CheckpointError: the weights cannot be used.
    """
    kind, _, path = spec.partition(":")
    if spec == SHAPES:
        classifier = functools.partial(features.features, *features.load(FOLDER / CLASSIFIER))
        facts = {"features": "the embedded world's classifier"}
        return FeatureNetwork(classifier, features.NUM_FEATURES, "FD (shapes)", "", facts)
    if kind not in RESIZES or not path:
        raise ValueError(
            f"unknown features {spec!r}; use {SHAPES} (of the embedded world) or one of "
            f"{', '.join(f'{name}:PATH' for name in RESIZES)}, where PATH is Inception's weights as .safetensors."
        )
    return _inception(inception.load(path), kind)


def _inception(network: inception.Inception, kind: str) -> FeatureNetwork:
    clean = kind == "clean-inception"
    names = [f"{'clean-' * clean}{name}" for name in ("FID", "KID")]
    if not network.published:
        names = [f"{name} ({kind}, unknown weights SHA-256 {network.sha256[:10]})" for name in ("FD", "KD")]
    facts = {"features": "Inception 2015-12-05, 2048", "weights SHA-256": network.sha256, "resize": RESIZES[kind]}
    compute = functools.partial(inception.features, network, clean=clean)
    return FeatureNetwork(compute, NUM_INCEPTION_FEATURES, *names, facts)
