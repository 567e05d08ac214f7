"""Laws of previews."""

import numpy as np

from dmm_jax.models import preview


def test_a_preview_has_the_colours_of_a_linear_decoder():
    matrix = np.random.default_rng(1).normal(0, 20, (4, 3))
    latents = preview.patches((2, 6, 10, 4))
    cells = (latents @ matrix + 128).clip(0, 255).astype(np.uint8)
    images = cells.repeat(8, 1).repeat(8, 2)
    drawn = np.asarray(preview.fit_preview(latents, images).draw(latents)).astype(int)
    assert drawn.shape == cells.shape and np.abs(drawn - cells).max() <= 6  # Where a colour is cut at 0 or 255.
    assert np.abs(drawn - cells).mean() < 1
