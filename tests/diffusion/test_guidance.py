"""Laws of classifier-free guidance."""

import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax.diffusion.guidance import guide, rescale

SHAPE = (3, 2, 2, 4)


@pytest.fixture
def pair():
    random = np.random.default_rng(0)
    return tuple(jnp.asarray(random.standard_normal(SHAPE), jnp.float32) for _ in range(2))


@pytest.mark.parametrize("scale", [1, 1.0, np.float32([1.0, 1.0, 1.0])])
def test_guidance_1_changes_nothing(pair, scale):
    np.testing.assert_array_equal(guide(*pair, scale), pair[1])


def test_guidance_0_is_unconditional(pair):
    np.testing.assert_allclose(guide(*pair, 0.0), pair[0], rtol=0, atol=1e-6)


def test_guidance_changes_no_equal_predictions(pair):
    np.testing.assert_array_equal(guide(pair[0], pair[0], 7.5), pair[0])


def test_each_image_has_its_own_scale(pair):
    scales = jnp.asarray([0.5, 1.0, 7.5])
    expected = np.asarray(pair[0]) + np.asarray(scales)[:, None, None, None] * np.asarray(pair[1] - pair[0])
    np.testing.assert_allclose(guide(*pair, scales), expected, rtol=0, atol=3e-6)
    np.testing.assert_array_equal(guide(*pair, scales)[2], guide(*pair, 7.5)[2])


def test_rescaled_guidance_is_that_of_diffusers(pair):
    torch = pytest.importorskip("torch")
    stable_diffusion = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    guided, shares = guide(*pair, 7.5), np.float32([0.0, 0.4, 1.0])
    result = np.asarray(rescale(guided, pair[1], shares))
    for row, share in enumerate(shares):
        tensors = [torch.tensor(np.asarray(x[row : row + 1])) for x in (guided, pair[1])]
        expected = stable_diffusion.rescale_noise_cfg(*tensors, guidance_rescale=float(share)).numpy()
        assert np.abs(result[row] - expected[0]).max() < 1e-5 * np.abs(expected).max()
    np.testing.assert_array_equal(result[0], guided[0])


def test_bfloat16_predictions_are_guided_in_float32(pair):
    assert guide(*(x.astype(jnp.bfloat16) for x in pair), 7.5).dtype == jnp.float32
