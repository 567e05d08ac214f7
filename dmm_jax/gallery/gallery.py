"""A folder of sampled pictures, written as they are drawn: one PNG each, then `grid.png` and a page that shows them."""

import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dmm_jax.config.styles import Style, style_text
from dmm_jax.gallery.gallery_page import gallery_page
from dmm_jax.gallery.grid import MAX_GRID_PIXELS, labelled_grid
from dmm_jax.gallery.png import read_parameters, save_png
from dmm_jax.gallery.sample import Sheet, draw_batches
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime.errors import UserError, refuse
from dmm_jax.runtime.storage import check_output, part_of, read_json, write_text

RECIPE = "gallery.json"  # What a folder's pictures were asked for; an interrupted call continues with the same.
NAME = "{number}_seed{seed}"  # The default pattern of file names.
FIELDS = ("number", "row", "column", "seed", "style", "prompt")
MAX_WORD_CHARS = 40  # Of a style or a prompt in a file name.


def write_gallery(
    pipeline: Pipeline,
    out: str | pathlib.Path,
    prompts: Sequence[str],
    styles: Sequence[Style] = (),
    *,
    name: str = NAME,
    progress: Callable[..., Iterable] = lambda batches, total: batches,
    **options,
) -> pathlib.Path:
    """Draws every prompt in every style into a folder, batch by batch; returns the path of its page.

    A folder that an interrupted call with the same arguments has left is continued: its batches are not drawn again.

    Args:
      out: a new or empty folder, or one to continue.
      name: the pattern of file names, with {number}, {row}, {column}, {seed}, {style} and {prompt}. Texts are reduced
        to letters, digits, "-" and "_".
      options: as `gallery.sample.Sheet` takes them.

    Raises:
      UserError: an option cannot be used, two files would have one name, or the folder holds something else. Nothing is
        written then.
    """
    sheet = Sheet(pipeline, list(prompts), list(styles), **options)
    out, files = pathlib.Path(out), file_names(name, sheet.jobs, len(sheet.styles))
    recipe = sheet.recipe() | {"name": name}
    if check_folder(out):
        _check_recipe(out, recipe)

    def is_done(numbers):
        return all((out / files[number]).is_file() for number in numbers)

    for numbers, images, parameters in progress(draw_batches(sheet, is_done), total=sheet.num_batches):
        if not (out / RECIPE).exists():  # The first pictures are drawn, so no option is wrong.
            out.mkdir(parents=True, exist_ok=True)
            write_text(out / RECIPE, json.dumps(recipe, indent=2))
        for number, image, picture in zip(numbers, images, parameters, strict=True):
            part = part_of(out / files[number])
            save_png(part, image, picture)
            part.replace(out / files[number])
    columns = [style_text(style) or pipeline.name for style in sheet.styles]
    shape = len(sheet.prompts), len(columns)
    _write_grid(out, files, shape, sheet.prompts, columns)
    saved = [read_parameters(out / file) for file in files]
    write_text(out / "index.html", gallery_page(files, saved, sheet.prompts, columns))
    return out / "index.html"


def check_folder(out: pathlib.Path) -> bool:
    """Tells whether a folder holds a gallery to continue; makes nothing.

    Raises:
      UserError: it holds something else, or cannot be written.
    """
    if (out / RECIPE).is_file():
        return True
    check_output(out)
    return False


def _check_recipe(out: pathlib.Path, recipe: Mapping) -> None:
    """Raises UserError naming what differs between a folder's recipe and this one."""
    before = read_json(out / RECIPE)
    before = before if isinstance(before, Mapping) else {}
    refuse(
        f"{out} holds pictures of other options. Give a new folder, or the same options to continue",
        [f"{key}: {before.get(key)!r} -> {value!r}" for key, value in recipe.items() if before.get(key) != value],
    )


def file_names(pattern: str, jobs: Sequence[tuple[str, Style, int]], num_columns: int) -> list[str]:
    """Returns the PNG's name of each picture. No prompt or style can lead out of the folder.

    Args:
      jobs: the prompt, style and seed of each picture, row after row.

    Raises:
      UserError: the pattern has an unknown field, holds a separator, or names two pictures alike.
    """
    unknown = [field for field in re.findall(r"\{(.*?)\}", pattern) if field not in FIELDS]
    if unknown or re.search(r"[/\\\0]|^\.", pattern):
        fields = ", ".join(f"{{{field}}}" for field in FIELDS)
        raise UserError(f"--name {pattern!r} must be a file name with the fields {fields}; it may hold no '/'.")
    names = []
    for number, (prompt, style, seed) in enumerate(jobs):
        row, column = divmod(number, num_columns)
        texts = {"style": style_text(style) or "none", "prompt": prompt}
        values = {"number": f"{number:05d}", "row": f"{row:04d}", "column": f"{column:03d}", "seed": str(seed)}
        values |= {field: word(text) for field, text in texts.items()}
        names.append(re.sub(r"\{(\w+)\}", lambda match, values=values: values[match[1]], pattern) + ".png")
    if len(set(names)) < len(names):
        raise UserError(f"--name {pattern!r} gives two pictures one name: add {{number}}, or {{row}} and {{column}}.")
    return names


def word(text: str) -> str:
    """Returns a text as part of a file name: ASCII letters, digits, "-" and "_", at most MAX_WORD_CHARS."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", text.replace("=", "_")).strip("-")[:MAX_WORD_CHARS] or "x"


def _write_grid(out, files, shape, row_labels, column_labels) -> None:
    """Writes grid.png from the PNGs, each scaled down as it is read if all of them are too large for one picture."""
    with Image.open(out / files[0]) as first:
        width, height = first.size
    scale = min(1.0, math.sqrt(MAX_GRID_PIXELS / (width * height * len(files))))
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    images: UInt8[np.ndarray, "n H W 3"] = np.empty((len(files), size[1], size[0], 3), np.uint8)
    for number, file in enumerate(files):
        with Image.open(out / file, formats=("PNG",)) as image:
            picture = image.convert("RGB")
            images[number] = np.asarray(picture if picture.size == size else picture.resize(size))
    grid = labelled_grid(images.reshape(*shape, *images.shape[1:]), row_labels, column_labels)
    part = part_of(out / "grid.png")
    grid.save(part, "PNG")
    part.replace(out / "grid.png")
