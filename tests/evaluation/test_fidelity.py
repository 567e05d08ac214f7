"""Latent MSE and PSNR have their closed forms; each measure of a pair comes with its floor and other noise."""

import numpy as np
import pytest

from dmm_jax.evaluation import fidelity
from dmm_jax.evaluation.fidelity import latent_mse, paired_fidelity, psnr
from dmm_jax.evaluation.published_weights import Weights
from dmm_jax.evaluation.samples import Pictures

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (80, 4, 4, 3)).astype(np.uint8)
LATENTS = RNG.normal(size=(80, 1, 1, 4)).astype(np.float32)
STARTS = {"": 20, ", floor": 40, ", other noise": 60}  # Where the pictures start that the first 20 are compared with.
PICTURES = [Pictures(IMAGES[start : start + 20], LATENTS[start : start + 20]) for start in (0, *STARTS.values())]


def test_latent_mse_is_a_mean_per_pair():
    a = RNG.normal(size=(3, 4, 4, 2)).astype(np.float32)
    b = a + np.array([0.0, 0.5, 2.0], np.float32)[:, None, None, None]
    np.testing.assert_allclose(latent_mse(a, b), [0.0, 0.25, 4.0], rtol=1e-6)


@pytest.mark.parametrize("difference, decibels", [(255, 0.0), (1, 48.1308), (10, 28.1308)])
def test_psnr_of_a_constant_difference_has_its_closed_form(difference, decibels):
    a = np.zeros((2, 4, 4, 3), np.uint8)
    np.testing.assert_allclose(psnr(a, a + np.uint8(difference)), decibels, atol=1e-4)


def test_psnr_is_symmetric_though_bytes_wrap_around():
    a, b = RNG.integers(0, 256, (2, 5, 4, 4, 3)).astype(np.uint8)
    np.testing.assert_array_equal(psnr(a, b), psnr(b, a))


def test_psnr_of_equal_pictures_is_infinite_without_a_warning(recwarn):
    a = RNG.integers(0, 256, (2, 4, 4, 3)).astype(np.uint8)
    b = a.copy()
    b[1] ^= 1
    assert np.isinf(psnr(a, b)).tolist() == [True, False]
    assert not recwarn.list


def test_psnr_falls_as_the_noise_grows():
    clean = np.full((1, 32, 32, 3), 128.0)
    noise = RNG.normal(size=clean.shape)
    first, second = ((clean + size * noise).round().astype(np.uint8) for size in (8.0, 16.0))
    halves = psnr(clean.astype(np.uint8), first) - psnr(clean.astype(np.uint8), second)
    np.testing.assert_allclose(halves, 20.0 * np.log10(2.0), atol=0.1)


def test_each_measure_comes_with_its_floor_and_other_noise():
    values = paired_fidelity(*PICTURES)
    for suffix, start in STARTS.items():
        squares = np.mean((LATENTS[:20] - LATENTS[start : start + 20]) ** 2)
        assert values[f"latent MSE{suffix}"] == pytest.approx(squares, rel=1e-5)
        ratios = psnr(IMAGES[:20], IMAGES[start : start + 20])
        assert values[f"PSNR (dB){suffix}"] == pytest.approx(np.median(ratios))


def test_lpips_compares_the_pairs_of_pictures(monkeypatch):
    monkeypatch.setattr(fidelity.lpips, "distances", lambda network, a, b: a[:, 0, 0, 0].astype(float) - b[:, 0, 0, 0])
    values = paired_fidelity(*PICTURES, Weights(None, {}, "", True))
    for suffix, start in STARTS.items():
        difference = IMAGES[:20, 0, 0, 0].astype(float) - IMAGES[start : start + 20, 0, 0, 0]
        assert values[f"LPIPS (alex){suffix}"] == pytest.approx(difference.mean())


def test_pairs_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        latent_mse(np.zeros((2, 4, 4, 2)), np.zeros((1, 4, 4, 2)))
