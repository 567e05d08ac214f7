"""The embedded world's drawing styles: eight named ones, and a continuous family that contains them."""

from dataclasses import astuple, dataclass, fields
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

Colour = tuple[float, float, float]  # RGB in [0, 1]


class StyleArrays(NamedTuple):
    """A batch of styles; `Style` explains the fields."""

    background: Shaped[np.ndarray, "*B 3"]
    grid: Shaped[np.ndarray, "*B"]
    paper: Shaped[np.ndarray, "*B"]
    outline_width: Shaped[np.ndarray, "*B"]
    outline_colour: Shaped[np.ndarray, "*B 3"]
    outline_mix: Shaped[np.ndarray, "*B"]
    fill_opacity: Shaped[np.ndarray, "*B"]
    shading: Shaped[np.ndarray, "*B"]
    hatch: Shaped[np.ndarray, "*B"]
    glow: Shaped[np.ndarray, "*B"]
    saturation: Shaped[np.ndarray, "*B"]
    lightness: Shaped[np.ndarray, "*B"]


@dataclass(frozen=True)
class Style:
    """One style. Strengths run from 0 (none) to 1 (full)."""

    background: Colour
    grid: float = 0.0  # Lines every 16 pixels, away from the background's lightness.
    paper: float = 0.0  # A gentle, fixed unevenness of the background.
    outline_width: float = 0.0  # Pixels; two fifths are outside the shape's edge.
    outline_colour: Colour = (0.0, 0.0, 0.0)
    outline_mix: float = 0.0  # 0: outline in outline_colour. 1: in the object's colour.
    fill_opacity: float = 1.0
    shading: float = 0.0  # Light from above left.
    hatch: float = 0.0  # 1: the fill has slanted lines only.
    glow: float = 0.0  # Light around the shape, in its colour.
    saturation: float = 1.0  # Saturation of the six colours; 0 is grey.
    lightness: float = 0.0  # Change of the six colours: -1 makes them black, 1 white.

    def repeat(self, n: int) -> StyleArrays:
        """Returns this style n times, as float32 arrays with a leading batch axis."""
        return StyleArrays(*(np.repeat(np.array(value, np.float32)[None], n, axis=0) for value in astuple(self)))


_SKY = (0.75, 0.89, 0.98)
_BLACK = (0.05, 0.05, 0.07)

STYLES: dict[str, Style] = {
    "comic": Style(background=_SKY, outline_width=2.8, outline_colour=_BLACK),
    "cartoon": Style(background=_SKY, outline_width=1.6, outline_colour=(0.15, 0.15, 0.3), shading=0.9),
    "ink": Style(background=(0.96, 0.92, 0.82), paper=0.7, outline_width=2.0, outline_colour=_BLACK, hatch=1.0),
    "neon": Style(
        background=(0.05, 0.04, 0.12), outline_width=2.4, outline_colour=(1.0, 1.0, 1.0), outline_mix=0.9,
        fill_opacity=0.18, glow=0.75, lightness=0.08),
    "blueprint": Style(
        background=(0.12, 0.28, 0.55), grid=0.8, outline_width=2.2, outline_colour=(0.95, 0.97, 1.0),
        outline_mix=0.65, fill_opacity=0.35, lightness=0.1),
    # For the study: near relatives of cartoon, ink and neon.
    "pastel": Style(
        background=(0.85, 0.93, 0.97), outline_width=1.6, outline_colour=(0.2, 0.2, 0.3), shading=0.7, saturation=0.85,
        lightness=0.08),
    "sepia": Style(
        background=(0.92, 0.86, 0.76), paper=1.0, outline_width=2.0, outline_colour=(0.2, 0.12, 0.08), hatch=0.8,
        saturation=0.9),
    "night": Style(
        background=(0.08, 0.07, 0.18), grid=0.4, outline_width=2.0, outline_colour=(0.9, 0.9, 1.0), outline_mix=0.75,
        fill_opacity=0.3, glow=0.6, lightness=0.1),
}  # fmt: skip

# Each region is a box (lowest, highest corner). Their union is the family; its styles keep the six colours distinct.
REGIONS: dict[str, tuple[Style, Style]] = {
    "painted": (
        Style(background=(0.7, 0.7, 0.7), saturation=0.8, fill_opacity=0.75, lightness=-0.1),
        Style(
            background=(1.0, 1.0, 1.0), grid=0.6, paper=1.0, outline_width=3.0, outline_colour=(0.3, 0.3, 0.35),
            outline_mix=0.6, shading=1.0, hatch=0.2, saturation=1.1, lightness=0.1),
    ),
    "hatched": (
        Style(background=(0.75, 0.75, 0.7), outline_width=1.5, fill_opacity=0.9, hatch=0.4, saturation=0.9,
              lightness=-0.1),
        Style(
            background=(1.0, 1.0, 1.0), grid=0.5, paper=1.0, outline_width=3.0, outline_colour=(0.25, 0.25, 0.35),
            outline_mix=0.6, shading=0.5, hatch=1.0, saturation=1.1, lightness=0.05),
    ),
    "night": (
        Style(background=(0.0, 0.0, 0.0), outline_width=1.5, outline_colour=(0.7, 0.7, 0.7), outline_mix=0.5,
              fill_opacity=0.1, saturation=0.85),
        Style(
            background=(0.2, 0.15, 0.25), grid=0.6, paper=0.6, outline_width=3.0, outline_colour=(1.0, 1.0, 1.0),
            outline_mix=1.0, shading=0.8, hatch=0.5, glow=0.9, saturation=1.1, lightness=0.2),
    ),
    "plan": (
        Style(background=(0.03, 0.15, 0.35), outline_width=1.7, outline_colour=(0.85, 0.85, 0.85), outline_mix=0.5,
              fill_opacity=0.3, saturation=0.9, lightness=0.05),
        Style(
            background=(0.2, 0.35, 0.6), grid=1.0, paper=0.5, outline_width=3.0, outline_colour=(1.0, 1.0, 1.0),
            outline_mix=0.85, fill_opacity=0.9, shading=0.8, hatch=0.5, glow=0.3, saturation=1.1, lightness=0.2),
    ),
}  # fmt: skip
_SHARES = {"painted": 0.4, "hatched": 0.2, "night": 0.25, "plan": 0.15}


def sample_styles(rng: np.random.Generator, n: int) -> StyleArrays:
    """Draws n random styles: a region by its share, then uniformly within its box."""
    region = rng.choice(len(REGIONS), size=n, p=[_SHARES[name] for name in REGIONS])
    leaves = []
    for field in fields(Style):
        boxes = [[getattr(corner, field.name) for corner in box] for box in REGIONS.values()]
        low, high = np.array(boxes, np.float32)[region].swapaxes(0, 1)
        leaves.append(rng.uniform(low, high).astype(np.float32))
    return StyleArrays(*leaves)
