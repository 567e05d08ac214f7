"""The embedded world through its one door."""

import numpy as np

from dmm_jax.world import world


def test_sentence_to_picture_and_back():
    texts = ["a small red circle above a large blue square", "a large green star"]
    content = world.parse_all(texts)
    assert world.captions(content) == texts
    scenes = world.place(np.random.default_rng(0), content)
    images = world.render(scenes, world.STYLES["comic"].repeat(2))
    assert images.shape == (2, world.IMAGE_SIZE, world.IMAGE_SIZE, 3)
    red = np.argwhere(np.asarray(images[0, ..., 0] - images[0, ..., 2]) > 0.5)
    blue = np.argwhere(np.asarray(images[0, ..., 2] - images[0, ..., 0]) > 0.5)
    assert red[:, 0].max() < blue[:, 0].min()
    assert len(blue) > 2 * len(red)


def test_all_names_exist():
    assert all(hasattr(world, name) for name in world.__all__)
