"""The embedded world's styles and the family that they belong to."""

from dataclasses import fields

import numpy as np
import pytest

from dmm_jax.world.styles import REGIONS, STYLES, Style, sample_styles


def _inside(style: Style, low: Style, high: Style) -> bool:
    corners = [[np.asarray(getattr(s, field.name)) for field in fields(Style)] for s in (low, style, high)]
    return all((a <= x).all() and (x <= b).all() for a, x, b in zip(*corners, strict=True))


@pytest.mark.parametrize("name", STYLES)
def test_named_styles_belong_to_the_family(name):
    assert any(_inside(STYLES[name], *box) for box in REGIONS.values())


@pytest.mark.parametrize("name", REGIONS)
def test_regions_are_boxes(name):
    low, high = REGIONS[name]
    assert _inside(low, low, high)


def test_random_styles_fill_the_family():
    styles = sample_styles(np.random.default_rng(0), 3000)
    assert all(leaf.dtype == np.float32 and len(leaf) == 3000 for leaf in styles)
    rows = [Style(*map(_plain, row)) for row in zip(*styles, strict=True)]
    widened = {name: (_moved(low, -1e-5), _moved(high, 1e-5)) for name, (low, high) in REGIONS.items()}
    assert all(any(_inside(row, *box) for box in widened.values()) for row in rows)
    for leaf, field in zip(styles, fields(Style), strict=True):
        low = np.min([getattr(box[0], field.name) for box in REGIONS.values()])
        high = np.max([getattr(box[1], field.name) for box in REGIONS.values()])
        assert leaf.min() - low < 0.06 * (high - low) and high - leaf.max() < 0.06 * (high - low)


def _plain(value: np.ndarray) -> float | tuple[float, ...]:
    return tuple(value.tolist()) if value.ndim else float(value)


def _moved(style: Style, by: float) -> Style:
    return Style(*(tuple(np.asarray(v) + by) if isinstance(v, tuple) else v + by for v in vars(style).values()))
