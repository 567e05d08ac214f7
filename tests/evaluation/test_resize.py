"""Both resizes equal their definitions, written out pixel by pixel."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dmm_jax.evaluation.resize import resize_clean, resize_tf1

RNG = np.random.default_rng(0)


def tensorflow1(image, size):
    """TensorFlow 1's `resize_bilinear_op.cc` as a loop, one float32 operation at a time."""
    height, width, _ = image.shape
    scale_y, scale_x = np.float32(height / size), np.float32(width / size)
    out = np.empty((size, size, 3), np.float32)
    for row in range(size):
        y = np.float32(row) * scale_y
        top, bottom = int(y), min(int(y) + 1, height - 1)
        for column in range(size):
            x = np.float32(column) * scale_x
            west, east = int(x), min(int(x) + 1, width - 1)
            across, down = x - np.float32(west), y - np.float32(top)
            above = image[top, west] + (image[top, east] - image[top, west]) * across
            below = image[bottom, west] + (image[bottom, east] - image[bottom, west]) * across
            out[row, column] = above + (below - above) * down
    return out


@pytest.mark.parametrize("shape", [(64, 64), (10, 37), (23, 23), (50, 7)])
def test_resize_is_tensorflow_1s_bit_for_bit(shape):
    image = RNG.integers(0, 256, (*shape, 3)).astype(np.float32)
    np.testing.assert_array_equal(resize_tf1(jnp.asarray(image[None]), 23)[0], tensorflow1(image, 23))


def bicubic(length, size):
    """Pillow's weights: Keys' cubic with a = -1/2, half-pixel centres, widened to an output pixel if that is larger."""
    scale = max(length / size, 1.0)
    places = (np.arange(size)[:, None] + 0.5) * length / size - 0.5 - np.arange(length)[None]
    x = np.abs(places) / scale
    inner, outer = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, inner, np.where(x < 2, outer, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("shape", [(64, 64), (10, 37), (23, 23), (50, 7)])
def test_clean_resize_is_the_antialiased_cubic_unrounded(shape):
    images = RNG.integers(0, 256, (2, *shape, 3)).astype(np.uint8)
    rows, columns = (bicubic(length, 23) for length in shape)
    expected = np.einsum("yh,bhwc,xw->byxc", rows, images.astype(np.float64), columns).clip(0, 255)
    np.testing.assert_allclose(resize_clean(images, 23), expected, atol=1e-3)


def test_clean_resize_differs_from_pillows_own_of_bytes():
    image = RNG.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    rounded = np.asarray(Image.fromarray(image).resize((23, 23), Image.Resampling.BICUBIC), np.float32)
    difference = np.abs(resize_clean(image[None], 23)[0] - rounded).max()
    assert 0.1 < difference < 2.0
