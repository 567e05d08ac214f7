"""Pictures on disk: PNGs that carry their parameters, labelled grids, and a gallery page."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from dmm_jax.config.styles import Style, style_text
from dmm_jax.gallery import page
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.storage import check_output, whole_folder

MAX_GRID_PIXELS = 178_000_000  # Pillow refuses to open a picture of more than 178 956 970 pixels.
SMALL_SIDE = 160  # Smaller pictures are enlarged by a whole number in grids, so that labels can be read beside them.

SAMPLER_NAMES = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
}


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Everything needed to draw one picture again. `guidance_scale` 1.0 is off; width and height are pixels."""

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    solver: str
    guidance_scale: float | int
    width: int
    height: int
    model: str
    model_hash: str
    styles: Style = None

    def a1111_text(self) -> str:
        """Returns the text that AUTOMATIC1111's web UI writes as `parameters`, and that its readers take apart.

        Raises:
          ValueError: the solver is unknown.
        """
        fields = {
            "Steps": self.steps,
            "Sampler": sampler_name(self.solver),
            "CFG scale": f"{self.guidance_scale:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model hash": self.model_hash,
            "Model": self.model,
            "Style": style_text(self.styles),
        }
        lines = [self.prompt]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        lines.append(", ".join(f"{name}: {_quote(value)}" for name, value in fields.items() if value not in (None, "")))
        return "\n".join(lines).strip()


def sampler_name(solver: str) -> str:
    """Returns what AUTOMATIC1111 calls `solver`.

    Raises:
      ValueError: the solver is unknown.
    """
    name = solver.removesuffix("_karras")
    if name not in SAMPLER_NAMES:
        raise UserError(f"unknown solver {solver!r}; use {', '.join(SAMPLER_NAMES)}, each also with _karras.")
    return SAMPLER_NAMES[name] + (" Karras" if solver.endswith("_karras") else "")


def _quote(value):
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def save_png(path: str | pathlib.Path, image: UInt8[np.ndarray, "H W 3"], parameters: Parameters) -> None:
    """Writes a PNG with two text chunks: `parameters` (AUTOMATIC1111's text) and `dmm_jax` (the same as exact JSON)."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", parameters.a1111_text())  # tEXt, or iTXt where the text is not Latin-1.
    values = dataclasses.asdict(dataclasses.replace(parameters, styles=None))
    styles = dict(parameters.styles) if isinstance(parameters.styles, Mapping) else parameters.styles
    chunks.add_text("dmm_jax", json.dumps(values | {"styles": styles}))
    Image.fromarray(image).save(path, format="PNG", pnginfo=chunks)


def labelled_grid(
    images: UInt8[np.ndarray, "rows columns H W 3"], row_labels: Sequence[str], column_labels: Sequence[str]
) -> Image.Image:
    """Draws pictures in a table, labels left and above; scales down what would pass MAX_GRID_PIXELS.

    Raises:
      ValueError: there is no picture, or the labels do not match the rows and columns.
    """
    rows, columns, height, width, _ = images.shape
    if not images.size or (len(row_labels), len(column_labels)) != (rows, columns):
        raise UserError(
            f"a grid needs at least one picture and one label per row and column; got {rows} x {columns} pictures of "
            f"{width}x{height}, {len(row_labels)} row labels, {len(column_labels)} column labels."
        )
    layout = _fit_layout(rows, columns, height, width, labelled=any(row_labels))
    sheet = Image.new("RGB", layout.size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, label in enumerate(column_labels):
        left, top = layout.corner(0, column)
        _write(pen, label, (left, 0, left + layout.width, top), layout, bottom=True)
    for row, label in enumerate(row_labels):
        top = layout.corner(row, 0)[1]
        _write(pen, label, (0, top, layout.left, top + layout.height), layout)
        for column in range(columns):
            sheet.paste(_resized(images[row, column], layout), layout.corner(row, column))
    return sheet


@dataclasses.dataclass(frozen=True)
class _Layout:
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
    def left(self):
        return min(max(self.width, 10 * self.font), 16 * self.font) + self.gap if self.labelled else 0

    @property
    def top(self):
        return 3 * self.font + self.gap

    @property
    def size(self):
        left, top = self.corner(self.rows, self.columns)
        return left, top

    def corner(self, row, column):
        return self.left + self.gap + column * (self.width + self.gap), self.top + row * (self.height + self.gap)


def _fit_layout(rows, columns, height, width, labelled):
    """Returns the largest layout within MAX_GRID_PIXELS; cells are never below one pixel."""
    scale = float(max(1, math.ceil(SMALL_SIDE / max(height, width))))
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
    left, top, right, floor = box
    font = ImageFont.load_default(layout.font)
    line = round(1.3 * layout.font)
    lines = _wrapped(label, right - left - layout.gap, max((floor - top - layout.gap) // line, 1), font.getlength)
    y = floor - layout.gap - line * len(lines) if bottom else top
    for number, text in enumerate(lines):
        pen.text((left + (0 if bottom else layout.gap), y + number * line), text, fill=(28, 27, 25), font=font)


def _wrapped(text, width, most, length):
    """Returns at most `most` lines no wider than `width`; words too long are cut, and what is left out becomes `…`."""
    lines, line = [], ""
    for word in text.split():
        while word:
            joined = f"{line} {word}".strip()
            if length(joined) <= width:
                line, word = joined, ""
            elif line:
                lines, line = lines + [line], ""
            else:
                fits = max((n for n in range(1, len(word) + 1) if length(word[:n]) <= width), default=1)
                lines, word = lines + [word[:fits]], word[fits:]
            if len(lines) > most:
                break
    lines = [one for one in [*lines, line] if one]
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and length(last + "…") > width:
        last = last[:-1]
    return lines[: most - 1] + [last.rstrip() + "…"]


def write_gallery(
    out: str | pathlib.Path,
    pictures: UInt8[np.ndarray, "n H W 3"],
    parameters: Sequence[Parameters],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
) -> pathlib.Path:
    """Writes one PNG a picture, `grid.png` and `index.html`, all or nothing; returns the path of the page.

    Args:
      pictures: row after row. Files are named by number and seed, never by the prompt.

    Raises:
      ValueError: `out` cannot be used, or the numbers of pictures, parameters and labels differ.
    """
    out, shape = check_output(out), (len(row_labels), len(column_labels))
    if not len(pictures) == len(parameters) == math.prod(shape):
        raise UserError(
            f"a gallery of {shape[0]} rows x {shape[1]} columns needs {math.prod(shape)} pictures and parameters; "
            f"got {len(pictures)} pictures and {len(parameters)} parameters."
        )
    names = [f"{index:05d}_seed{one.seed}.png" for index, one in enumerate(parameters)]
    with whole_folder(out) as folder:
        for name, picture, one in zip(names, pictures, parameters, strict=True):
            save_png(folder / name, picture, one)
        labelled_grid(pictures.reshape(shape + pictures.shape[1:]), row_labels, column_labels).save(folder / "grid.png")
        body = _gallery_body(names, parameters, row_labels, column_labels)
        text = page.render("dmm_jax samples", body, _GALLERY_STYLE)
        (folder / "index.html").write_text(text, encoding="utf-8")
    return out / "index.html"


_GALLERY_STYLE = """
main { max-width: none; } td img { border-radius: 6px; min-width: 10rem; width: 100%; max-width: 32rem; }
th[scope=row] { min-width: 11rem; max-width: 18rem; font-weight: 400; overflow-wrap: anywhere; }
th[scope=col] { max-width: 11rem; overflow-wrap: anywhere; vertical-align: bottom; }
td { min-width: 11rem; max-width: 33rem; }
"""


def _gallery_body(names, parameters, row_labels, column_labels):
    first, width = parameters[0], len(column_labels)
    head = "".join(f'<th scope="col">{page.escape(label)}</th>' for label in column_labels)
    rows = []
    for row, label in enumerate(row_labels):
        part = slice(row * width, (row + 1) * width)
        cells = "".join(_cell(*pair) for pair in zip(names[part], parameters[part], strict=True))
        rows.append(f'<tr><th scope="row">{page.escape(label)}</th>{cells}</tr>')
    return (
        f"<h1>{page.escape(first.model)}</h1>\n"
        f'<p class="soft">{first.steps} steps of {page.escape(sampler_name(first.solver))}, guidance '
        f"{first.guidance_scale:g}, {first.width}×{first.height}. Every PNG carries its own parameters; "
        '<a href="grid.png">grid.png</a> shows them all.</p>\n'
        f'<div class="scroll"><table>\n<tr><th></th>{head}</tr>\n' + "\n".join(rows) + "\n</table></div>"
    )


def _cell(name, parameters):
    shown = page.escape(parameters.a1111_text())
    return (
        f'<td><a href="{name}"><img src="{name}" alt="{page.escape(parameters.prompt)}" loading="lazy"></a>'
        f"<details><summary>seed {parameters.seed}</summary><pre>{shown}</pre></details></td>"
    )
