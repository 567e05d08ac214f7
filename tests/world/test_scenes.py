"""The embedded world's scenes and captions."""

import jax
import numpy as np
import pytest

from dmm_jax.world import scenes as world

SCENES, CAPTIONS = world.sample_scenes(np.random.default_rng(0), 2000)
PAIR = SCENES.content.num_objects == 2


def test_captions_parse_back_to_their_content():
    parsed = world.parse_all(CAPTIONS)
    for ids, expected in zip(parsed, SCENES.content, strict=True):
        np.testing.assert_array_equal(ids, expected)
        assert ids.dtype == expected.dtype == np.int32


def test_captions_use_all_words_of_the_world():
    content = world.Content(np.int32(2), *(np.array(ids, np.int32) for ids in ([0, 1], [0, 4], [0, 1])), np.int32(0))
    assert world.caption(content) == "a small red circle above a large blue square"
    assert world.caption(world.parse("a large green star")) == "a large green star"
    assert {word for text in CAPTIONS for word in text.split()} == set(world.WORDS)


@pytest.mark.parametrize(
    "text", ["", "a red circle", "a small pink circle", "a small red circle above", "a small red circle above a large "
             "blue square above a small red star", "a small red circle left of a small red star above a star"]
)  # fmt: skip
def test_other_sentences_are_refused(text):
    with pytest.raises(ValueError, match="got"):
        world.parse(text)


def test_shapes_are_inside_the_picture():
    present = SCENES.content.shape_ids >= 0
    low = (SCENES.centres - SCENES.radii[..., None])[present]
    high = (SCENES.centres + SCENES.radii[..., None])[present]
    assert low.min() > world.MARGIN_PX - 1e-4 and high.max() < world.IMAGE_SIZE - world.MARGIN_PX + 1e-4


def test_relations_are_clear_and_boxes_never_touch():
    names = np.array(world.RELATIONS)[SCENES.content.relation_ids[PAIR]]
    dx, dy = (SCENES.centres[PAIR, 1] - SCENES.centres[PAIR, 0]).T
    along = np.select([names == "above", names == "below", names == "left of"], [dy, -dy, dx], -dx)
    across = np.where(np.isin(names, ["above", "below"]), dx, dy)
    gap = along - SCENES.radii[PAIR].sum(axis=1)
    assert gap.min() > world.GAP_PX[0] - 1e-3
    assert (np.abs(across) < 0.5 * along).all()


def test_sizes_are_clearly_different():
    present = SCENES.content.shape_ids >= 0
    sizes, radii = SCENES.content.size_ids[present], SCENES.radii[present]
    assert radii[sizes == 1].min() > 1.4 * radii[sizes == 0].max()


def test_two_shapes_of_a_scene_differ():
    content = SCENES.content
    same = (content.shape_ids[:, 0] == content.shape_ids[:, 1]) & (content.colour_ids[:, 0] == content.colour_ids[:, 1])
    assert not same.any()


def test_all_words_are_about_equally_common():
    content = SCENES.content
    assert abs(PAIR.mean() - world.PAIR_FRACTION) < 0.04
    for ids, count in [(content.shape_ids, 4), (content.colour_ids, 6), (content.size_ids, 2)]:
        shares = np.bincount(ids[ids >= 0], minlength=count) / (ids >= 0).sum()
        np.testing.assert_allclose(shares, 1.0 / count, rtol=0.15)


def test_a_seed_fixes_the_scenes():
    scenes, captions = world.sample_scenes(np.random.default_rng(0), 2000)
    assert captions == CAPTIONS
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(scenes), jax.tree.leaves(SCENES), strict=True))
