"""Laws of the time embedding: diffusers' sinusoids and MLP, float32 for every dtype of timestep."""

import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax.models.embeddings import TimestepEmbedding, timestep_sinusoids
from tests.models.torch_parity import SCALES, TOLERANCE, abstract, load, normal, relative_error, scaled, to_torch

TIMESTEPS = {
    "integers": np.array([0, 1, 37, 500, 998, 999], np.int32),
    "floats": np.array([957.375, 41.625], np.float32),
}


def exact_sinusoids(timesteps, width, freq_shift):
    """Returns cosines, then sines, in float64."""
    exponents = np.arange(width // 2) / (width // 2 - freq_shift)
    angles = timesteps.astype(np.float64)[:, None] * 10_000.0**-exponents
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


@pytest.mark.parametrize("timesteps", TIMESTEPS.values(), ids=TIMESTEPS.keys())
@pytest.mark.parametrize("width", [32, 320])
@pytest.mark.parametrize("flip_sin_to_cos", [True, False])
@pytest.mark.parametrize("freq_shift", [0, 1])
def test_sinusoids_are_those_of_diffusers(timesteps, width, flip_sin_to_cos, freq_shift):
    pytest.importorskip("torch")
    from diffusers.models.embeddings import get_timestep_embedding

    # At width 320 PyTorch's own exp misses the last bit of some frequencies, which late timesteps make 6e-5.
    timesteps = timesteps if width == 32 else timesteps[timesteps < 50]
    expected = get_timestep_embedding(to_torch(timesteps), width, flip_sin_to_cos, freq_shift)
    options = {"flip_sin_to_cos": flip_sin_to_cos, "freq_shift": freq_shift}
    output = timestep_sinusoids(jnp.asarray(timesteps), width, **options)
    assert relative_error(output, expected) < TOLERANCE


def test_the_first_half_is_the_cosine():
    assert jnp.array_equal(timestep_sinusoids(jnp.zeros(1), 6)[0], jnp.array([1, 1, 1, 0, 0, 0]))


@pytest.mark.parametrize("freq_shift", [0, 1])
def test_sinusoids_of_all_timesteps_are_as_exact_as_pytorchs(freq_shift):
    # PyTorch reaches 5.8e-5 and 7.1e-5, frequencies by XLA's exp 9.3e-5: near 1000 an angle's last bit is 6.1e-5.
    timesteps = np.arange(1000)
    output = timestep_sinusoids(jnp.asarray(timesteps), 320, freq_shift=freq_shift)
    np.testing.assert_allclose(output, exact_sinusoids(timesteps, 320, freq_shift), rtol=0, atol=7.2e-5)


def test_all_thousand_timesteps_stay_distinct():
    sinusoids = timestep_sinusoids(jnp.arange(1000), 32)
    assert sinusoids.dtype == jnp.float32
    assert len(np.unique(np.asarray(sinusoids), axis=0)) == 1000


def test_an_integer_timestep_and_its_float_are_one():
    assert jnp.array_equal(timestep_sinusoids(jnp.arange(1000), 32), timestep_sinusoids(jnp.arange(1000.0), 32))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("std", [1.0, 0.1])
def test_the_mlp_is_that_of_diffusers(scale, std):
    torch = pytest.importorskip("torch")
    from diffusers.models.embeddings import TimestepEmbedding as TorchTimestepEmbedding

    torch.manual_seed(0)
    twin = scaled(TorchTimestepEmbedding(32, 128), scale)
    model = load(abstract(TimestepEmbedding, 32, 128, dtype=jnp.float32), twin)
    vectors = normal(4, 32, std=std)
    assert relative_error(model(vectors), twin(to_torch(vectors))) < TOLERANCE
