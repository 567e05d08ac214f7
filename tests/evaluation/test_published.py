"""Features, distances and resizes equal those of torch-fidelity and clean-fid (make_fixture.py)."""

import numpy as np
import pytest

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.formats import safetensors_io
from dmm_jax.evaluation import inception
from dmm_jax.evaluation.frechet import Statistics, frechet_distance
from dmm_jax.evaluation.kernel_distances import kernel_inception_distance
from dmm_jax.evaluation.resize import resize_clean
from dmm_jax.models.inception_v3 import IMAGE_SIZE
from tests.evaluation import make_fixture as published

ANSWERS = dict(np.load(published.FILE))


@pytest.mark.parametrize("height, width", published.SIZES)
def test_the_resize_is_torch_fidelitys_bit_for_bit(height, width):
    resized = inception._resize_tf1(published.pictures(1, height, width))
    assert published.digest(np.asarray(resized)) == ANSWERS[f"tf1 {height} {width}"].item()


@pytest.mark.parametrize("height, width", published.SIZES)
def test_the_clean_resize_is_clean_fids(height, width):
    resized = resize_clean(published.pictures(1, height, width), IMAGE_SIZE)[0]
    expected = ANSWERS[f"clean {height} {width}"]
    np.testing.assert_allclose(resized[published.SHOWN, published.SHOWN], expected, rtol=0, atol=1e-4)


def test_the_features_are_torch_fidelitys(tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "CHUNK_SIZE", 2)
    tensors = published.weights()
    safetensors_io.save(tmp_path / "weights.safetensors", tensors)
    network = inception.load(tmp_path / "weights.safetensors")
    features, expected = inception.features(network, published.pictures(2, 64, 80), clean=False), ANSWERS["features"]
    assert (expected > 0).mean() > 0.5
    assert all(np.array_equal(array, tensors[key]) for key, array in naming.to_torch(network.params).items())
    assert np.abs(features - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["many", "few"])
def test_the_distance_is_torch_fidelitys(name):
    pair = [Statistics.empty(256).update(features) for features in published.sets()[name]]
    assert frechet_distance(*pair) == pytest.approx(ANSWERS[f"fid {name}"].item(), rel=1e-6)


@pytest.mark.parametrize("name", ["many", "few"])
def test_the_kernels_distance_is_torch_fidelitys(name):
    kid = kernel_inception_distance(*published.sets()[name], *published.KID.values())
    np.testing.assert_allclose(kid, ANSWERS[f"kid {name}"], rtol=1e-5)  # torch-fidelity sums in float32.
