"""A labelled grid of pictures as one image."""

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from dmm_jax.runtime.errors import UserError

MAX_GRID_PIXELS = 178_000_000  # Pillow refuses to open a picture of more than 178 956 970 pixels.
# A label breaks at a blank or after one of these marks; a comma in a number is no such mark.
_PIECE = re.compile(r"\s*(?:(?:[^\s,=:/+_]|,(?=\d))*(?:[=:/+_]|,(?!\d))|(?:[^\s,=:/+_]|,(?=\d))+)")
MIN_CELL_SIDE = 160  # A whole factor enlarges smaller pictures to this many pixels, so that the labels stay legible.


def labelled_grid(
    images: UInt8[np.ndarray, "rows columns H W 3"], row_labels: Sequence[str], column_labels: Sequence[str]
) -> Image.Image:
    """Draws a table of pictures with labels to the left and above, scaled down to at most MAX_GRID_PIXELS.

    The font has Latin, Greek, Cyrillic and more, but no Chinese, Japanese or Korean: a label with characters that it
    lacks begins with its number, and has "…" in their place.

    Raises:
      ValueError: the table is empty, or the labels do not match the rows and columns.
    """
    rows, columns, height, width, _ = images.shape
    if not images.size or (len(row_labels), len(column_labels)) != (rows, columns):
        raise UserError(
            f"a grid needs at least one picture and one label per row and column; got {rows} x {columns} pictures of "
            f"{width}x{height}, {len(row_labels)} row labels, {len(column_labels)} column labels."
        )
    row_labels, column_labels = map(_drawable, (row_labels, column_labels))
    layout = _fit_layout(rows, columns, height, width, labelled=any(row_labels))
    sheet = Image.new("RGB", layout.size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, label in enumerate(column_labels):
        x, y = layout.corner(0, column)
        _write(pen, label, (x, 0, x + layout.width, y), layout, bottom=True)
    for row, label in enumerate(row_labels):
        _, y = layout.corner(row, 0)
        _write(pen, label, (0, y, layout.label_width, y + layout.height), layout)
        for column in range(columns):
            sheet.paste(_resized(images[row, column], layout), layout.corner(row, column))
    return sheet


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Sizes of a grid in pixels; `height` and `width` are those of one cell."""

    rows: int
    columns: int
    height: int
    width: int
    font: int
    labelled: bool

    @property
    def gap(self):
        return max(self.font // 2, 1)

    @property
    def label_width(self):
        return min(max(self.width, 10 * self.font), 16 * self.font) + self.gap if self.labelled else 0

    @property
    def label_height(self):
        return 3 * self.font + self.gap

    @property
    def size(self):
        return self.corner(self.rows, self.columns)

    def corner(self, row, column):
        """Returns x and y of a cell's upper left corner."""
        x = self.label_width + self.gap + column * (self.width + self.gap)
        return x, self.label_height + row * (self.height + self.gap)


def _fit_layout(rows, columns, height, width, labelled):
    """Returns the largest layout within MAX_GRID_PIXELS; cells keep at least one pixel."""
    scale = float(max(1, math.ceil(MIN_CELL_SIDE / max(height, width))))
    while True:
        cell = max(round(height * scale), 1), max(round(width * scale), 1)
        layout = _Layout(rows, columns, *cell, font=max(round(max(cell) / 16), 1), labelled=labelled)
        pixels = math.prod(layout.size)
        if pixels <= MAX_GRID_PIXELS or cell == (1, 1):
            return layout
        scale *= min(0.99, math.sqrt(MAX_GRID_PIXELS / pixels))


def _resized(image, layout):
    picture, size = Image.fromarray(image), (layout.width, layout.height)
    if picture.size == size:
        return picture
    return picture.resize(size, Image.Resampling.NEAREST if size[0] > picture.width else Image.Resampling.LANCZOS)


def _write(pen, label, box, layout, bottom=False):
    """Writes a label into a box (x, y, right, floor), at its top or at its bottom."""
    x, y, right, floor = box
    font = ImageFont.truetype(_font_file(), layout.font)
    line_height = round(1.3 * layout.font)
    lines = _wrap(label, right - x - layout.gap, max((floor - y - layout.gap) // line_height, 1), font.getlength)
    if bottom:
        y = floor - layout.gap - line_height * len(lines)
    for number, text in enumerate(lines):
        position = (x + (0 if bottom else layout.gap), y + number * line_height)
        pen.text(position, text, fill=(28, 27, 25), font=font)


@functools.cache
def _font_file() -> pathlib.Path:
    """Returns DejaVu Sans, which matplotlib contains; Pillow's own font has ASCII alone."""
    import matplotlib

    return pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@functools.cache
def _characters() -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(_font_file())).get_charmap())


def _drawable(labels: Sequence[str]) -> list[str]:
    drawable = []
    for number, label in enumerate(labels, start=1):
        marked = "".join(mark if mark.isspace() or ord(mark) in _characters() else "\0" for mark in label)
        drawable.append(f"{number}: " + re.sub("\0+", "…", marked) if "\0" in marked else label)
    return drawable


def _wrap(text, width, max_lines, length):
    """Breaks a text into at most `max_lines` lines no wider than `width`; long words are cut, `…` marks an omission.

    Args:
      length: returns the width of a text.
    """
    lines, line = [], ""
    for piece in _PIECE.findall(text):
        word, blank = piece.strip(), " " if piece[0].isspace() else ""
        while word:
            joined = line + blank + word if line else word
            if length(joined) <= width:
                line, word = joined, ""
            elif line:
                lines, line = lines + [line], ""
            else:
                fits = max((n for n in range(1, len(word) + 1) if length(word[:n]) <= width), default=1)
                lines, word = lines + [word[:fits]], word[fits:]
            if len(lines) > max_lines:
                break
    lines = list(filter(None, [*lines, line]))
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and length(last + "…") > width:
        last = last[:-1]
    return lines[: max_lines - 1] + [last.rstrip() + "…"]
