"""A grid shows every picture in its place and keeps its labels in their boxes."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from dmm_jax.gallery import grid
from dmm_jax.gallery.grid import labelled_grid
from tests.gallery.pictures import pictures


def test_every_picture_is_in_its_place():
    # Flat colours survive the enlargement, so that each can be found.
    colours = pictures(6, 1, 1).reshape(2, 3, 1, 1, 3)
    sheet = np.asarray(labelled_grid(np.tile(colours, (1, 1, 8, 8, 1)), ["", ""], ["a", "b", "c"]))
    places = [[np.argwhere((sheet == colour.ravel()).all(-1)).mean(0) for colour in row] for row in colours]
    assert places[0][0][1] < places[0][1][1] < places[0][2][1]
    assert places[0][0][0] == places[0][2][0] < places[1][0][0]


def test_large_pictures_stay_equal_pixel_for_pixel():
    picture = pictures(1, 200, 170)
    sheet = np.asarray(labelled_grid(picture[None], ["row"], ["column"]))
    height, width = sheet.shape[:2]
    corners = [
        (y, x) for y in range(height - 199) for x in range(width - 169) if (sheet[y, x] == picture[0, 0, 0]).all()
    ]
    assert any((sheet[y : y + 200, x : x + 170] == picture[0]).all() for y, x in corners)


def test_a_large_grid_is_scaled_down_to_the_limit(monkeypatch):
    monkeypatch.setattr(grid, "MAX_GRID_PIXELS", 50_000)
    sheet = labelled_grid(pictures(12, 90, 60).reshape(3, 4, 90, 60, 3), ["r"] * 3, ["c"] * 4)
    assert 40_000 < sheet.width * sheet.height <= 50_000


def test_pillow_opens_a_grid_of_the_limit():
    assert grid.MAX_GRID_PIXELS <= min(200_000_000, 2 * Image.MAX_IMAGE_PIXELS)


@pytest.mark.parametrize("text", ["a " * 200, "x" * 500, "short", ""])
def test_labels_stay_in_their_box(text):
    lines = grid._wrap(text, 80, 3, lambda part: 7 * len(part))
    assert len(lines) <= 3 and all(7 * len(line) <= 80 for line in lines)
    assert "".join(lines).endswith("…") == (len(text) > 100)


def test_labels_break_at_marks_and_never_in_a_number():
    lines = grid._wrap("anime=0.333,photo=0.667 1,000 stars", 84, 9, lambda part: 7 * len(part))
    assert lines == ["anime=0.333,", "photo=0.667", "1,000 stars"]


def test_labels_that_the_font_cannot_draw_are_numbered():
    assert grid._drawable(["é Жук λ", "赤い star", "星"]) == ["é Жук λ", "2: … star", "3: …"]
    font = ImageFont.truetype(grid._font_file(), 20)
    shapes = {bytes(font.getmask(mark)) for mark in "éЖ…\uffff"}
    assert len(shapes) == 4  # None is the box of a missing character.


def test_labels_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="3 column labels"):
        labelled_grid(pictures(2).reshape(1, 2, 16, 16, 3), ["r"], ["a", "b", "c"])
