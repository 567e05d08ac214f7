"""Pictures that every model draws from the same prompts, measured batch by batch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from dmm_jax.evaluation import clip
from dmm_jax.evaluation.feature_networks import FeatureNetwork, Summary
from dmm_jax.evaluation.kernel_distances import SUBSET_SIZE, Features, kernel_inception_distance
from dmm_jax.evaluation.options import Options
from dmm_jax.gallery.sample import draw
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime.progress import Progress


class Pictures(NamedTuple):
    """Pictures of one model and their latents."""

    images: UInt8[np.ndarray, "k H W 3"]
    latents: Float[np.ndarray, "k h w C"]


class Sample(NamedTuple):
    """Measurements of one model's pictures.

    Attributes:
      summary: of the features, for the network's distance.
      features: all of them for KID; empty if KID is not measured.
      score: the mean CLIPScore; None without a CLIP.
      first: the first few pictures.
    """

    summary: Summary
    features: Features
    score: float | None
    first: Pictures


class Sampler:
    """Draws the same prompts with any model and measures the pictures."""

    def __init__(
        self,
        network: FeatureNetwork | None,
        scorer: clip.Scorer | None,
        prompts: Sequence[str],
        options: Options,
        sampling: Mapping,
        progress: Progress,
    ):
        """Takes the solver's options of `Pipeline.__call__` as `sampling`; counts every picture in `progress`."""
        self.progress = progress
        self.network, self.scorer, self.prompts = network, scorer, prompts
        self.num_images, self.num_pairs, self.batch_size = options.num_images, options.num_pairs, options.batch_size
        self.negative_prompt, self.sampling = options.negative_prompt, dict(sampling)

    @property
    def settings(self) -> dict:
        """What a reader of the report needs to repeat a number."""
        scorer = {} if self.scorer is None else self.scorer.settings
        prompt = {"negative prompt": self.negative_prompt or "none"}
        return self.sampling | prompt | dict(self.network.settings if self.network else {}) | scorer

    def draw(self, pipeline: Pipeline, jobs: Sequence) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields images and latents of (prompt, style, seed) jobs, batch by batch."""
        negative = self.negative_prompt or None
        options = {"num_chunks": pipeline.num_chunks([*self.prompts, negative])} | self.sampling
        for images, latents in draw(pipeline, jobs, self.batch_size, negative_prompts=negative, **options):
            self.progress.add(len(images))
            yield images, latents

    def sample(self, pipeline: Pipeline, style: str | None, seed: int, num_drawn: int = 0) -> Sample:
        """Measures the first `num_images` pictures.

        Args:
          seed: of the first picture's noise; picture k has seed + k.
          num_drawn: pictures that are drawn; 0 means `num_images`. `first` may hold more than are measured.
        """
        batches = self.draw(pipeline, self._jobs(style, seed, num_drawn or self.num_images))
        return measure(self.network, batches, self.num_images, self.scorer, self.num_pairs)

    def pictures(self, pipeline: Pipeline, style: str | None, seed: int) -> Pictures:
        """Draws the `num_pairs` pictures that are compared one by one."""
        return concatenate(self.draw(pipeline, self._jobs(style, seed, self.num_pairs)))

    def _jobs(self, style, seed, count):
        return [(prompt, style, seed + k) for k, prompt in enumerate(self.prompts[:count])]


def concatenate(batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> Pictures:
    """Returns the pictures of all batches."""
    return Pictures(*map(np.concatenate, zip(*batches, strict=True)))


def measure(
    network: FeatureNetwork,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    num_images: int,
    scorer: Callable[[np.ndarray, int], np.ndarray] | None = None,
    num_first: int = 1,
) -> Sample:
    """Measures the first `num_images` pictures of batches of images and latents.

    Args:
      scorer: maps images and the number of images before them to their CLIPScores.
      num_first: pictures in `first`, measured or not.
    """
    summary, all_features, scores, first = network.empty(), Features(), [], []
    for images, latents in batches:
        measured = images[: num_images - summary.count]
        if scorer is not None:
            scores.append(scorer(measured, summary.count))
        features = network.features(measured)
        summary = summary.update(features)
        if network.kernel_name:
            all_features = all_features.update(features)
        if sum(len(pictures) for pictures, _ in first) < num_first:
            first.append((images, latents))
    score = float(np.concatenate(scores).mean()) if scores else None
    return Sample(summary, all_features, score, Pictures(*(array[:num_first] for array in concatenate(first))))


def kernel_distance(a: Sample, b: Sample) -> dict[str, float]:
    """Returns KID's mean and standard deviation; subsets are as large as the samples if these are small."""
    rows = [sample.features.rows for sample in (a, b)]
    return kernel_inception_distance(*rows, subset_size=min(SUBSET_SIZE, len(rows[0])))._asdict()
