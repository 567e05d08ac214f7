"""Conversions between what networks predict: round trips through the diffusion equation, and its two ends."""

import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax.diffusion.prediction import to_x0, velocity
from dmm_jax.diffusion.schedule import PREDICTION_TYPES, NoiseSchedule, add_noise

SHAPE = (4, 2, 2, 4)
SCHEDULE = NoiseSchedule()
TIMESTEPS = jnp.asarray([0, 1, 500, 999])
ALPHA_BAR = jnp.asarray(SCHEDULE.alphas_cumprod)[TIMESTEPS]


@pytest.fixture
def clean_noise_noisy():
    random = np.random.default_rng(0)
    clean, noise = (jnp.asarray(random.standard_normal(SHAPE), jnp.float32) for _ in range(2))
    return clean, noise, add_noise(clean, noise, TIMESTEPS, jnp.asarray(SCHEDULE.alphas_cumprod))


def predicted(prediction_type, clean, noise):
    return noise if prediction_type == "epsilon" else velocity(clean, noise, ALPHA_BAR)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_true_prediction_gives_back_the_image(prediction_type, clean_noise_noisy):
    clean, noise, noisy = clean_noise_noisy
    prediction = predicted(prediction_type, clean, noise)
    # At timestep 999 the image is a small difference, times 14.6.
    np.testing.assert_allclose(to_x0(prediction, noisy, ALPHA_BAR, prediction_type), clean, rtol=0, atol=5e-6)


def test_a_scalar_alpha_bar_serves_every_image(clean_noise_noisy):
    clean, noise, _ = clean_noise_noisy
    scalar = velocity(clean, noise, ALPHA_BAR[2])
    np.testing.assert_array_equal(scalar, velocity(clean, noise, jnp.full(4, ALPHA_BAR[2])))


def test_velocity_is_noise_at_first_and_minus_the_image_at_zero_snr(clean_noise_noisy):
    clean, noise, _ = clean_noise_noisy
    np.testing.assert_array_equal(velocity(clean, noise, jnp.float32(1.0)), noise)
    np.testing.assert_array_equal(velocity(clean, noise, jnp.float32(0.0)), -clean)


def test_velocity_determines_the_image_at_zero_snr(clean_noise_noisy):
    clean, noise, _ = clean_noise_noisy
    no_signal = jnp.zeros(4)
    prediction = velocity(clean, noise, no_signal)
    np.testing.assert_array_equal(to_x0(prediction, noise, no_signal, "v_prediction"), clean)
    assert not np.isfinite(to_x0(noise, noise, no_signal, "epsilon")).any()


def test_velocity_is_that_of_diffusers(clean_noise_noisy):
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    clean, noise, _ = clean_noise_noisy
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    expected = scheduler.get_velocity(*(torch.tensor(np.asarray(x)) for x in (clean, noise, TIMESTEPS)))
    # float32 tables: sqrt(1 - alphas_cumprod[0]) has lost three digits.
    np.testing.assert_allclose(velocity(clean, noise, ALPHA_BAR), expected.numpy(), rtol=0, atol=5e-6)


def test_bfloat16_predictions_are_converted_in_float32(clean_noise_noisy):
    _, noise, noisy = clean_noise_noisy
    for prediction_type in PREDICTION_TYPES:
        assert to_x0(noise.astype(jnp.bfloat16), noisy, ALPHA_BAR, prediction_type).dtype == jnp.float32


def test_unknown_prediction_types_are_refused(clean_noise_noisy):
    _, noise, noisy = clean_noise_noisy
    with pytest.raises(ValueError, match="epsilon, v_prediction; got 'sample'"):
        to_x0(noise, noisy, ALPHA_BAR, "sample")
