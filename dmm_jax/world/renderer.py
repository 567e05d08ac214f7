"""Renders scenes of the embedded world as 64x64 pictures from signed distances; pure functions for jit and vmap."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dmm_jax.world.scenes import COLOURS, IMAGE_SIZE, SHAPES, SceneArrays
from dmm_jax.world.styles import StyleArrays

# Patterns repeat every latent cell (8 pixels) or every second one, so that an 8x8x4 latent can carry them.
HATCH_PERIOD_PX = 8.0
GRID_PERIOD_PX = 16.0
GLOW_REACH_PX = 3.5
_LIGHT = (-0.6, -0.8)  # Direction from a shape's centre towards the light, (x, y).

_RGB = {
    "red": (0.90, 0.13, 0.16), "orange": (0.98, 0.52, 0.08), "yellow": (0.99, 0.88, 0.16),
    "green": (0.16, 0.68, 0.26), "blue": (0.14, 0.38, 0.95), "purple": (0.60, 0.22, 0.80),
}  # fmt: skip
PALETTE = np.array([_RGB[name] for name in COLOURS], np.float32)


def _star_vertices() -> Float[np.ndarray, "10 2"]:
    angles = np.pi * np.arange(10) / 5.0
    lengths = 1.05 * np.where(np.arange(10) % 2 == 0, 1.0, 0.54)
    return np.stack([lengths * np.sin(angles), 0.1 - lengths * np.cos(angles)], axis=-1)


# Vertices in units of the radius; each polygon fits the box [-1, 1] x [-1, 1].
POLYGONS = {
    "square": np.array([[-0.88, -0.88], [0.88, -0.88], [0.88, 0.88], [-0.88, 0.88]]),
    "triangle": np.array([[0.0, -0.95], [1.0, 0.9], [-1.0, 0.9]]),
    "star": _star_vertices(),
}


@jax.jit
def render(scene: SceneArrays, style: StyleArrays) -> Float[Array, "B 64 64 3"]:
    """Renders a batch of scenes, one style per scene, with values in [0, 1]."""
    return jax.vmap(_render_one)(scene, style)


def _render_one(scene: SceneArrays, style: StyleArrays) -> Float[Array, "64 64 3"]:
    coordinates = jnp.arange(IMAGE_SIZE, dtype=jnp.float32) + 0.5
    pixels = jnp.stack(jnp.meshgrid(coordinates, coordinates), axis=-1)  # (64, 64, 2) as x, y
    image = _background(pixels, style)
    colours = _palette(style)[scene.content.colour_ids]  # (2, 3)
    distances = [
        signed_distance(pixels - centre[None, None], radius, shape_id)
        for centre, radius, shape_id in zip(scene.centres, scene.radii, scene.content.shape_ids, strict=True)
    ]
    presence = [jnp.float32(1.0), (scene.content.num_objects == 2).astype(jnp.float32)]
    for i in range(2):  # Both glows are drawn before any shape.
        image = _add_glow(image, distances[i], colours[i], presence[i] * style.glow)
    for i in range(2):
        offsets = (pixels - scene.centres[i][None, None]) / scene.radii[i]
        image = _add_fill(image, distances[i], offsets, pixels, colours[i], presence[i], style)
        image = _add_outline(image, distances[i], colours[i], presence[i], style)
    return jnp.clip(image, 0.0, 1.0)


def signed_distance(
    offsets: Float[Array, "H W 2"], radius: Float[Array, ""], shape_id: Int[Array, ""]
) -> Float[Array, "H W"]:
    """Returns the distance in pixels from each offset to the edge of the shape around 0, negative inside."""
    circle = jnp.linalg.norm(offsets, axis=-1) - radius
    polygons = {name: _polygon_distance(offsets, vertices * radius) for name, vertices in POLYGONS.items()}
    return jnp.stack([polygons.get(name, circle) for name in SHAPES])[shape_id]


def _polygon_distance(points: Float[Array, "H W 2"], vertices: Float[Array, "V 2"]) -> Float[Array, "H W"]:
    """Returns the signed distance to a polygon: distance to the nearest edge, sign by the even-odd rule."""
    ends = jnp.roll(vertices, -1, axis=0)
    edges = (ends - vertices)[None, None]  # (1, 1, V, 2)
    to_points = points[:, :, None] - vertices[None, None]  # (H, W, V, 2)
    along = jnp.clip((to_points * edges).sum(-1) / (edges * edges).sum(-1), 0.0, 1.0)
    nearest = to_points - edges * along[..., None]
    distance = jnp.sqrt((nearest * nearest).sum(-1).min(-1))
    y = points[:, :, None, 1]
    starts_above, ends_above = vertices[None, None, :, 1] <= y, ends[None, None, :, 1] <= y
    is_left = edges[..., 0] * to_points[..., 1] > edges[..., 1] * to_points[..., 0]
    crossed = (starts_above & ~ends_above & is_left) | (~starts_above & ends_above & ~is_left)
    return jnp.where(crossed.sum(-1) % 2 == 1, -distance, distance)


def _palette(style: StyleArrays) -> Float[Array, "6 3"]:
    """Returns the six colours at the style's saturation and lightness."""
    grey = PALETTE @ np.array([[0.3], [0.59], [0.11]], np.float32)  # (6, 1)
    colours = grey + style.saturation * (PALETTE - grey)
    towards = (style.lightness > 0.0).astype(jnp.float32)
    return jnp.clip(colours + jnp.abs(style.lightness) * (towards - colours), 0.0, 1.0)


def _background(pixels: Float[Array, "H W 2"], style: StyleArrays) -> Float[Array, "H W 3"]:
    x, y = pixels[..., 0], pixels[..., 1]
    turn = 2.0 * jnp.pi / 32.0
    paper = jnp.sin(turn * (x + 2.0 * y)) + jnp.sin(turn * (2.0 * x - y)) + jnp.sin(turn * (2.0 * x + 2.0 * y) + 1.0)
    to_line = jnp.abs(jnp.stack([x, y]) % GRID_PERIOD_PX - 0.5 * GRID_PERIOD_PX).min(axis=0)
    grid = jnp.clip(1.25 - to_line, 0.0, 1.0)  # 1.5 pixels wide, softly
    brighter = 1.0 - 2.0 * jax.nn.sigmoid(20.0 * (style.background.mean() - 0.55))  # A dark background has light lines.
    change = 0.013 * style.paper * paper + 0.22 * style.grid * brighter * grid
    return style.background[None, None] + change[..., None]


def _over(image, colour, alpha):
    return image + alpha[..., None] * (colour - image)


def _add_glow(image, distance, colour, strength) -> Float[Array, "H W 3"]:
    light = strength * jnp.exp(-jnp.abs(distance) / GLOW_REACH_PX)
    return 1.0 - (1.0 - image) * (1.0 - light[..., None] * colour[None, None])


def _add_fill(image, distance, offsets, pixels, colour, presence, style: StyleArrays) -> Float[Array, "H W 3"]:
    light = style.shading * (offsets @ jnp.array(_LIGHT))  # about -1 to 1
    shaded = colour[None, None] * (1.0 + 0.45 * jnp.minimum(light, 0.0))[..., None]
    shaded = shaded + 0.55 * jnp.maximum(light, 0.0)[..., None] * (1.0 - shaded)
    phase = 2.0 * jnp.pi / HATCH_PERIOD_PX * (pixels[..., 0] + 0.5 * pixels[..., 1])
    stripes = jnp.clip(0.5 + 1.6 * jnp.cos(phase), 0.0, 1.0)
    alpha = presence * style.fill_opacity * (1.0 - style.hatch * (1.0 - stripes))
    return _over(image, shaded, alpha * jnp.clip(0.5 - distance, 0.0, 1.0))


def _add_outline(image, distance, colour, presence, style: StyleArrays) -> Float[Array, "H W 3"]:
    outside, inside = 0.4 * style.outline_width, 0.6 * style.outline_width
    band = jnp.clip(0.5 + jnp.minimum(outside - distance, distance + inside), 0.0, 1.0)
    alpha = presence * jnp.clip(style.outline_width, 0.0, 1.0) * band
    line = style.outline_colour + style.outline_mix * (colour - style.outline_colour)
    return _over(image, line[None, None], alpha)
