"""A folder of sampled pictures: one PNG per picture, all of them in `grid.png`, and a page that shows them."""

import math
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from dmm_jax.gallery import page
from dmm_jax.gallery.grid import labelled_grid
from dmm_jax.gallery.png import Parameters, sampler_name, save_png
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.storage import check_output, staged_folder

_STYLE = """
main { max-width: none; } td img { border-radius: 6px; min-width: 10rem; width: 100%; max-width: 32rem; }
th[scope=row] { min-width: 11rem; max-width: 18rem; font-weight: 400; overflow-wrap: anywhere; }
th[scope=col] { max-width: 11rem; overflow-wrap: anywhere; vertical-align: bottom; }
td { min-width: 11rem; max-width: 33rem; }
"""


def write_gallery(
    out: str | pathlib.Path,
    images: UInt8[np.ndarray, "n H W 3"],
    parameters: Sequence[Parameters],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
) -> pathlib.Path:
    """Writes one PNG per picture, `grid.png` and `index.html`, all or nothing; returns the path of the page.

    File names hold a picture's number and seed, never its prompt.

    Args:
      images: row after row.

    Raises:
      ValueError: `out` cannot be used, or the numbers of pictures, parameters and labels differ.
    """
    out, shape = check_output(out), (len(row_labels), len(column_labels))
    if not len(images) == len(parameters) == math.prod(shape):
        raise UserError(
            f"a gallery of {shape[0]} rows x {shape[1]} columns needs {math.prod(shape)} pictures and parameters; "
            f"got {len(images)} pictures and {len(parameters)} parameters."
        )
    files = [f"{index:05d}_seed{picture.seed}.png" for index, picture in enumerate(parameters)]
    with staged_folder(out) as folder:
        for file, image, picture in zip(files, images, parameters, strict=True):
            save_png(folder / file, image, picture)
        labelled_grid(images.reshape(shape + images.shape[1:]), row_labels, column_labels).save(folder / "grid.png")
        text = page.render("dmm_jax samples", _body(files, parameters, row_labels, column_labels), _STYLE)
        (folder / "index.html").write_text(text, encoding="utf-8")
    return out / "index.html"


def _body(files, parameters, row_labels, column_labels):
    first, width = parameters[0], len(column_labels)
    head = "".join(f'<th scope="col">{page.escape(label)}</th>' for label in column_labels)
    rows = []
    for row, label in enumerate(row_labels):
        part = slice(row * width, (row + 1) * width)
        cells = "".join(map(_cell, files[part], parameters[part]))
        rows.append(f'<tr><th scope="row">{page.escape(label)}</th>{cells}</tr>')
    return (
        f"<h1>{page.escape(first.model)}</h1>\n"
        f'<p class="soft">{first.steps} steps of {page.escape(sampler_name(first.solver))}, guidance '
        f"{first.guidance_scale:g}, {first.width}×{first.height}. Every PNG carries its own parameters; "
        '<a href="grid.png">grid.png</a> shows them all.</p>\n'
        f'<div class="scroll"><table>\n<tr><th></th>{head}</tr>\n' + "\n".join(rows) + "\n</table></div>"
    )


def _cell(file, parameters):
    text = page.escape(parameters.a1111_text())
    return (
        f'<td><a href="{file}"><img src="{file}" alt="{page.escape(parameters.prompt)}" loading="lazy"></a>'
        f"<details><summary>seed {parameters.seed}</summary><pre>{text}</pre></details></td>"
    )
