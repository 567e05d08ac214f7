"""`dmm-jax export`: a training run's student as PyTorch safetensors, all formats or none."""

import json
import os
import pathlib
from collections.abc import Sequence

from dmm_jax import config as config_lib
from dmm_jax import model_card
from dmm_jax.checkpoints import licenses, style_lora
from dmm_jax.checkpoints.export import DTYPES, FORMATS, Recipe, write
from dmm_jax.checkpoints.fitted_style import with_fitted_styles
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.styles import select
from dmm_jax.distill.incremental import origins
from dmm_jax.folders import check_output, locate
from dmm_jax.page import whole_folder
from dmm_jax.styles import parse_style, style_row

STOCK = ("diffusers", "single-file")  # What stock diffusers opens by itself.


def export_workdir(
    workdir: str | os.PathLike,
    out: pathlib.Path,
    formats: Sequence[str],
    style: str = "",
    dtype: str = "float16",
    recipe: bool = True,
    verify: bool = False,
    lora_base: str = "",
    lora_for: Sequence[str] = ("comfyui",),
    keep: Sequence[str] = (),
    extra_styles: Sequence[pathlib.Path] = (),
) -> list[pathlib.Path]:
    """Writes `out/dmm/`, `out/diffusers/`, `out/model.safetensors` and `out/style_lora.safetensors`, as `formats` says.

    Args:
      style: the name or mix ("anime=0.7,photo=0.3") that is folded into the stock formats.
      lora_base: the name or mix whose stock export a style-lora is used on; "" for all styles in equal parts.
      extra_styles: files of `dmm-jax fit-style`, a style each, which join the student's own.
      lora_for: the tools that a style-lora is written for: comfyui, diffusers, a1111.
      keep: the styles that the export has, in this order, as "name" or "new name=name"; () for all.
      recipe: also write the whole recipe, with hashes of all parents, into the files' metadata.
      verify: open what was written in stock diffusers, and compare; prints the errors. Needs the `[torch]` extra.

    Raises:
      ValueError: a format, style or dtype that there is not, an output that is not empty; nothing is written then.
        Or what was written does not agree with diffusers; it is left for a look.
    """
    unknown = [fmt for fmt in formats if fmt not in FORMATS]
    if unknown or not formats:
        raise ValueError(f"there is no format {', '.join(unknown) or '(none given)'}; there are: {', '.join(FORMATS)}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}.")
    if verify and "single-file" in formats and "diffusers" not in formats:
        raise ValueError("--verify reads a single file beside a diffusers folder: add diffusers to --format.")
    out = check_output(out)
    student = open_checkpoint(workdir)
    if student.styles is None:
        raise ValueError(
            f"{workdir} holds a stock checkpoint; only a merged one is exported. Give the --workdir of a `train` run."
        )
    student = with_fitted_styles(student, extra_styles)
    if keep:
        student = select(student, config_lib.as_kept(keep))
    weights = None
    if any(fmt != "dmm" for fmt in formats):
        if not style:
            raise ValueError(
                f"diffusers, single-file and style-lora hold one style: give --style, of {', '.join(student.styles)}."
            )
        weights = _row(style, student.styles)
    base = _row(lora_base, student.styles) if lora_base else style_lora.equal_parts(student.styles)
    said = describe(workdir, student, style) | ({"kept": list(keep)} if keep else {})
    parents = said.get("parents", {})
    license = licenses.together(parent["license"] for parent in parents.values()) or student.license
    title = f"{student.name}: {style}" if style else student.name
    written = {}
    with whole_folder(out) as folder:
        for fmt in dict.fromkeys(formats):
            told = Recipe(
                title if fmt != "dmm" else student.name, list(student.styles), said if recipe else None, license
            )
            if fmt == "style-lora":
                path = folder / style_lora.NAME
                style_lora.write_style_lora(path, student, weights, base, dtype, lora_for, told)
            else:
                path = write(folder, fmt, student, None if fmt == "dmm" else weights, dtype, told)
            if path.is_dir():
                _write_card(path, fmt, told, student, locate(workdir), parents if recipe else {})
            written[fmt] = out / path.relative_to(folder)
    if verify:
        _verify(student, written, dtype)
    return list(written.values())


def _write_card(folder, fmt, told, student, workdir, parents):
    grid, measured = model_card.grid_of(workdir), model_card.measured_of(workdir, student.styles)
    if grid:
        (folder / model_card.GRID).write_bytes(grid.read_bytes())
    text = model_card.card(
        fmt, told.title, student.styles, student.architecture, parents, told.license, measured, bool(grid)
    )
    (folder / model_card.NAME).write_text(text, encoding="utf-8")


def _row(style, styles):
    return style_row(parse_style(style), styles)


def _verify(student, written, dtype):
    from dmm_jax import verify as verify_lib

    if "dmm" in written:
        verify_lib.reads_back(student, written["dmm"], dtype)
        print(f"{written['dmm']}: reads back bit for bit")
    for agreement in verify_lib.verify({fmt: path for fmt, path in written.items() if fmt in STOCK}):
        print(agreement)


def describe(workdir: str | os.PathLike, student, style: str) -> dict:
    """Returns the recipe of a run: its config, the SHA-256 of every parent's UNet, and the style that was folded in."""
    if student.kind != "workdir":
        return {"from": student.name, "unet_sha256": student.digest("unet"), "style": style}
    config = config_lib.load(workdir)
    parents = {"base": open_checkpoint(config.base)} | origins(config)
    told = config_lib.licenses(config)
    return {
        "parents": {
            name: {
                "file": parent.name,
                "unet_sha256": parent.digest("unet"),
                "license": told.get(name) or parent.license or licenses.UNKNOWN,
            }
            for name, parent in parents.items()
        },
        "options": _options(config),
        "style": style,
    }


def _options(config) -> dict:
    told = json.loads(config_lib.to_json(config))
    return {name: value for name, value in told.items() if name not in ("base", "teachers", "data", "samples")}
