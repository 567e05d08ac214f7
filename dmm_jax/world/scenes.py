"""The embedded world's scenes: one or two shapes, random placement, captions, and a parser of captions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from dmm_jax.runtime.errors import UserError

IMAGE_SIZE = 64
SHAPES = ("circle", "square", "triangle", "star")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
SIZES = ("small", "large")
RELATIONS = ("above", "below", "left of", "right of")
WORDS = ("a", *SIZES, *COLOURS, *SHAPES, *dict.fromkeys(" ".join(RELATIONS).split()))

RADIUS_PX = np.array([[8.0, 9.0], [12.8, 14.0]], np.float32)  # Half the side of a shape's box; one range per size.
MARGIN_PX = 2.5  # Between any shape's box and the border.
GAP_PX = (3.0, 9.0)  # Between the boxes of two shapes, along the relation's axis.
SLANT = 0.45  # Largest offset across the relation's axis, as a share of the distance along it.
PAIR_FRACTION = 0.6  # Share of the scenes that show two shapes.


class Content(NamedTuple):
    """The content of a caption; -1 marks the missing second shape and relation of a scene with one shape."""

    num_objects: Shaped[np.ndarray, "*B"]  # 1 or 2
    shape_ids: Shaped[np.ndarray, "*B 2"]  # into SHAPES
    colour_ids: Shaped[np.ndarray, "*B 2"]  # into COLOURS
    size_ids: Shaped[np.ndarray, "*B 2"]  # into SIZES
    relation_ids: Shaped[np.ndarray, "*B"]  # into RELATIONS: the first shape is RELATIONS[i] the second


class SceneArrays(NamedTuple):
    """A batch of scenes: the content, and the shapes' positions in pixels (x right, y down)."""

    content: Content
    centres: Shaped[np.ndarray, "*B 2 2"]  # object, (x, y)
    radii: Shaped[np.ndarray, "*B 2"]


def sample_content(rng: np.random.Generator, n: int) -> Content:
    """Draws n contents; two shapes of one scene never agree in both shape and colour."""
    num_objects = 1 + (rng.random(n) < PAIR_FRACTION).astype(np.int32)
    shape_ids = rng.integers(len(SHAPES), size=(n, 2), dtype=np.int32)
    colour_ids = rng.integers(len(COLOURS), size=(n, 2), dtype=np.int32)
    twins = (shape_ids[:, 0] == shape_ids[:, 1]) & (colour_ids[:, 0] == colour_ids[:, 1])
    other_colour = (colour_ids[:, 0] + rng.integers(1, len(COLOURS), size=n, dtype=np.int32)) % len(COLOURS)
    colour_ids[:, 1] = np.where(twins, other_colour, colour_ids[:, 1])
    size_ids = rng.integers(len(SIZES), size=(n, 2), dtype=np.int32)
    relation_ids = rng.integers(len(RELATIONS), size=n, dtype=np.int32)
    single = num_objects == 1
    for ids in (shape_ids, colour_ids, size_ids):
        ids[single, 1] = -1
    return Content(num_objects, shape_ids, colour_ids, size_ids, np.where(single, np.int32(-1), relation_ids))


def place(rng: np.random.Generator, content: Content) -> SceneArrays:
    """Draws positions and sizes for a batch: shapes are inside the picture and apart, and the relation is clear."""
    low, high = np.moveaxis(RADIUS_PX[content.size_ids], -1, 0)  # (B, 2) each
    radii = rng.uniform(low, high).astype(np.float32)
    pair = content.num_objects == 2
    single_centre = _between(rng, MARGIN_PX + radii[:, :1], IMAGE_SIZE - MARGIN_PX - radii[:, :1], (len(radii), 2))
    centres = np.where(pair[:, None, None], _place_pairs(rng, content.relation_ids, radii), single_centre[:, None, :])
    return SceneArrays(content, centres.astype(np.float32), radii)


def sample_scenes(rng: np.random.Generator, n: int) -> tuple[SceneArrays, list[str]]:
    """Draws n random scenes and writes their captions."""
    scenes = place(rng, sample_content(rng, n))
    return scenes, captions(scenes.content)


def _between(rng: np.random.Generator, low, high, shape: tuple[int, ...]) -> np.ndarray:
    return low + (high - low) * rng.random(shape)


def _place_pairs(
    rng: np.random.Generator, relation_ids: Int[np.ndarray, " B"], radii: Float[np.ndarray, "B 2"]
) -> Float[np.ndarray, "B 2 2"]:
    """Draws the centres of two shapes: boxes GAP_PX apart along the relation's axis, offset by SLANT across it."""
    n = len(radii)
    length = 2.0 * radii.sum(axis=1)  # of both boxes
    room = IMAGE_SIZE - 2.0 * MARGIN_PX - length
    gap = _between(rng, GAP_PX[0], np.minimum(GAP_PX[1], room), (n,))
    first_is_near = (relation_ids == RELATIONS.index("above")) | (relation_ids == RELATIONS.index("left of"))
    near, far = np.where(first_is_near, radii.T, radii.T[::-1])  # smaller coordinate first
    near_along = MARGIN_PX + near + (room - gap) * rng.random(n)
    distance = near + gap + far
    far_along = near_along + distance
    along = np.where(first_is_near, (near_along, far_along), (far_along, near_along))  # (2, B)
    low, high = MARGIN_PX + radii.T, IMAGE_SIZE - MARGIN_PX - radii.T
    first_across = _between(rng, low[0], high[0], (n,))
    second_across = np.clip(first_across + distance * _between(rng, -SLANT, SLANT, (n,)), low[1], high[1])
    across = np.stack([first_across, second_across])
    horizontal = relation_ids >= RELATIONS.index("left of")
    return np.stack([np.where(horizontal, along, across), np.where(horizontal, across, along)], axis=-1).swapaxes(0, 1)


def caption(content: Content) -> str:
    """Returns the caption of one scene (no batch axis)."""
    objects = [
        f"a {SIZES[size]} {COLOURS[colour]} {SHAPES[shape]}"
        for size, colour, shape in zip(content.size_ids, content.colour_ids, content.shape_ids, strict=True)
    ]
    if content.num_objects == 1:
        return objects[0]
    return f"{objects[0]} {RELATIONS[content.relation_ids]} {objects[1]}"


def captions(contents: Content) -> list[str]:
    """Returns the captions of a batch of scenes."""
    columns = [np.asarray(ids).tolist() for ids in contents]
    return [caption(Content(*row)) for row in zip(*columns, strict=True)]


def parse(text: str) -> Content:
    """Returns the content of a caption (no batch axis): `parse(caption(content)) == content`.

    Raises:
      ValueError: the text is not a caption of this world.
    """
    relations = [i for i, relation in enumerate(RELATIONS) if f" {relation} " in text]
    if len(relations) > 1:
        raise UserError(f"expected at most one relation of {RELATIONS}; got {text!r}.")
    pieces = text.split(f" {RELATIONS[relations[0]]} ") if relations else [text]
    objects = [_parse_object(piece) for piece in pieces]
    if len(objects) > 2:
        raise UserError(f"expected at most two shapes; got {text!r}.")
    objects += [(-1, -1, -1)] * (2 - len(objects))
    size_ids, colour_ids, shape_ids = np.array(objects, np.int32).T
    relation_id = np.int32(relations[0] if relations else -1)
    return Content(np.int32(len(pieces)), shape_ids, colour_ids, size_ids, relation_id)


def parse_all(texts: Sequence[str]) -> Content:
    """Returns the contents of many captions as arrays with a leading batch axis."""
    return Content(*(np.stack(ids) for ids in zip(*map(parse, texts), strict=True)))


def _parse_object(text: str) -> tuple[int, int, int]:
    words = text.split(" ")
    choices = (("a",), SIZES, COLOURS, SHAPES)
    if len(words) != len(choices) or any(word not in allowed for word, allowed in zip(words, choices, strict=True)):
        raise UserError(f"expected 'a SIZE COLOUR SHAPE' with {SIZES}, {COLOURS}, {SHAPES}; got {text!r}.")
    return SIZES.index(words[1]), COLOURS.index(words[2]), SHAPES.index(words[3])
