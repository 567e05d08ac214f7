"""The embedded world's renderer: pictures show what their scenes state, in every style."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax.world import renderer
from dmm_jax.world.scenes import COLOURS, SHAPES, Content, SceneArrays, parse_all, place, sample_scenes
from dmm_jax.world.styles import STYLES, Style, StyleArrays, sample_styles

N = 48
SCENES, _ = sample_scenes(np.random.default_rng(1), N)
BARE = Style(background=(0.0, 0.0, 0.0))


def _render(scenes: SceneArrays, style: Style) -> np.ndarray:
    return np.asarray(renderer.render(scenes, style.repeat(len(scenes.radii))))


def _only(shape_id: int, radius: float = 12.0, colour_id: int = 0) -> SceneArrays:
    ids = [np.array([[i, -1]], np.int32) for i in (shape_id, colour_id, 0)]
    content = Content(np.array([1], np.int32), *ids, np.array([-1], np.int32))
    return SceneArrays(content, np.full((1, 2, 2), 32.0, np.float32), np.full((1, 2), radius, np.float32))


def test_pictures_are_finite_colours_in_unit_range():
    styles = sample_styles(np.random.default_rng(2), N)
    images = np.asarray(renderer.render(SCENES, styles))
    assert images.shape == (N, 64, 64, 3) and images.dtype == np.float32
    assert images.min() >= 0.0 and images.max() <= 1.0


def test_a_picture_does_not_depend_on_its_batch():
    styles = sample_styles(np.random.default_rng(2), N)
    alone = jax.tree.map(lambda leaf: leaf[7:8], (SCENES, styles))
    np.testing.assert_allclose(renderer.render(*alone)[0], renderer.render(SCENES, styles)[7], atol=2e-6)


@pytest.mark.parametrize(
    "shape, area",
    [("circle", np.pi), ("square", 4 * 0.88**2), ("triangle", 1.85), ("star", 5 * np.sin(np.pi / 5) * 1.05**2 * 0.54)],
)
def test_shapes_cover_their_area(shape, area):
    image = _render(_only(SHAPES.index(shape)), BARE)[0]
    coverage = image[..., 0] / renderer.PALETTE[COLOURS.index("red"), 0]
    assert coverage.sum() == pytest.approx(area * 12.0**2, rel=0.01)


@pytest.mark.parametrize("width", [1.5, 3.0])
def test_two_fifths_of_an_outline_are_outside_the_shape(width):
    style = Style(background=(0.0, 0.0, 0.0), fill_opacity=0.0, outline_width=width, outline_colour=(1.0, 1.0, 1.0))
    line = _render(_only(SHAPES.index("circle")), style)[0, ..., 0]
    outer, inner = 12.0 + 0.4 * width, 12.0 - 0.6 * width
    assert line.sum() == pytest.approx(np.pi * (outer**2 - inner**2), rel=0.02)
    distance = np.hypot(*(np.indices((64, 64)) + 0.5 - 32.0))
    mean = 2.0 / 3.0 * (outer**3 - inner**3) / (outer**2 - inner**2)
    assert (line * distance).sum() / line.sum() == pytest.approx(mean, abs=0.03)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_stay_in_their_box(shape):
    covered = np.argwhere(_render(_only(SHAPES.index(shape)), BARE)[0].max(-1) > 0.02) + 0.5
    assert np.abs(covered - 32.0).max() < 12.0 + 1.0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_distance_has_slope_one(shape):
    points = jnp.asarray(np.random.default_rng(3).uniform(-20, 20, (40, 40, 2)), jnp.float32)
    shape_id = jnp.int32(SHAPES.index(shape))
    gradient = jax.grad(lambda p: renderer.signed_distance(p, jnp.float32(11.0), shape_id).sum())(points)
    np.testing.assert_allclose(np.linalg.norm(gradient, axis=-1), 1.0, atol=1e-3)


def test_shapes_touch_neither_the_border_nor_each_other():
    style = STYLES["comic"]
    covered = np.abs(_render(SCENES, style) - np.array(style.background, np.float32)).max(-1) > 0.02
    border = np.concatenate([covered[:, 0], covered[:, -1], covered[:, :, 0], covered[:, :, -1]])
    assert not border.any()
    first = SceneArrays(SCENES.content._replace(num_objects=np.ones(N, np.int32)), SCENES.centres, SCENES.radii)
    second = jax.tree.map(lambda leaf: leaf[:, ::-1] if leaf.ndim > 1 else leaf, first)
    apart = [np.abs(_render(s, style) - np.array(style.background, np.float32)).max(-1) > 0.02 for s in (first, second)]
    assert not (apart[0] & apart[1])[SCENES.content.num_objects == 2].any()


@pytest.mark.parametrize("name", STYLES)
def test_hues_are_recognisable(name):
    """A shape's mean colour minus the mean over all colours points in the direction of its own palette colour."""
    means = []
    for colour_id in range(len(COLOURS)):
        image = _render(_only(SHAPES.index("circle"), 13.0, colour_id), STYLES[name])[0]
        inside = np.hypot(*(np.indices((64, 64)) + 0.5 - 32.0)) < 13.5
        means.append(image[inside].mean(axis=0))
    centred = np.array(means) - np.mean(means, axis=0)
    palette = renderer.PALETTE - renderer.PALETTE.mean(axis=0)
    centred, palette = (rows / np.linalg.norm(rows, axis=1)[:, None] for rows in (centred, palette))
    assert ((centred @ palette.T).argmax(axis=1) == np.arange(len(COLOURS))).all()


def test_named_styles_differ_and_relatives_are_nearest():
    images = {name: _render(SCENES, style) for name, style in STYLES.items()}
    distances = {
        style: {other: np.abs(images[style] - images[other]).mean() for other in STYLES if other != style}
        for style in STYLES
    }
    assert min(min(row.values()) for row in distances.values()) > 0.01
    for style, relative in [("comic", "cartoon"), ("pastel", "cartoon"), ("sepia", "ink"), ("night", "neon")]:
        assert min(distances[style], key=distances[style].get) == relative
        assert distances[style]["blueprint"] > 2 * distances[style][relative]


def test_each_field_of_a_style_changes_the_picture():
    base = STYLES["blueprint"].repeat(4)
    scenes = jax.tree.map(lambda leaf: leaf[:4], SCENES)
    plain = np.asarray(renderer.render(scenes, base))
    for name in StyleArrays._fields:
        moved = base._replace(**{name: getattr(base, name) * 0.7 + 0.2})
        assert np.abs(np.asarray(renderer.render(scenes, moved)) - plain).mean() > 1e-4, name


def test_a_relation_in_words_is_true_in_the_picture():
    scenes = place(np.random.default_rng(0), parse_all(["a small red circle above a large blue square"]))
    image = _render(scenes, STYLES["comic"])[0]
    red, blue = (np.argwhere(sign * (image[..., 0] - image[..., 2]) > 0.5) for sign in (1, -1))
    assert red[:, 0].max() < blue[:, 0].min()
    assert len(blue) > 2 * len(red)
