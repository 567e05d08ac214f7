"""Pictures are measured in batches as if all at once, and prompts and seeds reach the pipeline."""

import functools

import numpy as np
import pytest

from dmm_jax.config.options import get_config
from dmm_jax.evaluation import samples
from dmm_jax.evaluation.feature_networks import FeatureNetwork
from dmm_jax.evaluation.frechet import Statistics, frechet_distance
from dmm_jax.evaluation.kernel_distances import kernel_inception_distance
from dmm_jax.evaluation.options import Options
from dmm_jax.evaluation.samples import measure
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime.progress import Progress

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (90, 4, 4, 3)).astype(np.uint8)
LATENTS = RNG.normal(size=(90, 1, 1, 4)).astype(np.float32)


def corners(images):
    return images[:, 0, 0].astype(np.float32)


def corner_network(kernel_name="KD (corners)"):
    """A feature network whose features are a picture's first pixel."""
    empty = functools.partial(Statistics.empty, 3)
    return FeatureNetwork(corners, "FD (corners)", empty, frechet_distance, kernel_name, {"weights SHA-256": "0123"})


def batches(size):
    return ((IMAGES[k : k + size], LATENTS[k : k + size]) for k in range(0, 90, size))


@pytest.mark.parametrize("batch_size", [7, 40, 90])
def test_batches_measure_the_first_pictures(batch_size):
    sample = measure(corner_network(), batches(batch_size), num_images=75, num_first=32)
    assert sample.summary.count == 75
    np.testing.assert_allclose(sample.summary.covariance, np.cov(corners(IMAGES[:75]).T), rtol=1e-10)
    np.testing.assert_array_equal(sample.features.rows, corners(IMAGES[:75]))
    np.testing.assert_array_equal(sample.first.images, IMAGES[:32])
    np.testing.assert_array_equal(sample.first.latents, LATENTS[:32])


def test_features_are_stored_only_for_a_kernel():
    assert measure(corner_network(kernel_name=""), batches(90), 90).features.count == 0


@pytest.mark.parametrize("batch_size", [7, 90])
def test_score_is_the_mean_over_pictures_with_their_own_prompts(batch_size):
    weights = RNG.uniform(size=90)

    def scorer(images, first):
        return images[:, 0, 0, 0] * weights[first : first + len(images)]

    sample = measure(corner_network(), batches(batch_size), 75, scorer)
    assert sample.score == pytest.approx((IMAGES[:75, 0, 0, 0] * weights[:75]).mean())
    assert measure(corner_network(), batches(90), 75).score is None


def test_prompts_seeds_and_negative_prompt_reach_the_pipeline(monkeypatch):
    options, calls = Options(negative_prompt="blurred", num_pairs=2), []
    sampling = options.solver_options(get_config())
    progress = Progress(90, "drawing")
    sampler = samples.Sampler(corner_network(), None, ["first", "second", "third"], options, sampling, progress)

    def draw(pipeline, jobs, batch_size, **arguments):
        calls.append((jobs, batch_size, arguments))
        return batches(90)

    monkeypatch.setattr(samples, "draw", draw)
    monkeypatch.setattr(Pipeline, "num_chunks", lambda self, prompts: len(prompts))
    sampler.pictures(object.__new__(Pipeline), "ink", 7)
    ((jobs, batch_size, arguments),) = calls
    assert (jobs, batch_size) == ([("first", "ink", 7), ("second", "ink", 8)], 50)
    assert arguments["negative_prompts"] == "blurred" and arguments["num_inference_steps"] == 25
    assert progress.done == 90
    assert arguments["num_chunks"] == 4  # Those of all prompts, so that every draw conditions alike.


def test_small_samples_have_kernel_subsets_of_their_size():
    a, b = (measure(corner_network(), iter([(part, LATENTS)]), 40) for part in (IMAGES[:40], IMAGES[40:80]))
    expected = kernel_inception_distance(corners(IMAGES[:40]), corners(IMAGES[40:80]), subset_size=40)
    assert samples.kernel_distance(a, b) == expected._asdict()
