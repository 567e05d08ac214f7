"""`dmm-jax export`: a training run's student as PyTorch safetensors, all formats or none."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence

from dmm_jax.checkpoints import licenses, model_card, provenance
from dmm_jax.checkpoints import parents as parents_lib
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.formats import style_lora
from dmm_jax.checkpoints.formats.fitted_style import with_fitted_styles
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile
from dmm_jax.checkpoints.modelspec import MERGED_FROM, RECIPE_KEY
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.styles import select
from dmm_jax.checkpoints.write import DTYPES, FORMATS, Recipe, write
from dmm_jax.config import options as config_lib
from dmm_jax.config.styles import parse_style, style_row
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.storage import check_output, locate, staged_folder

IN_FILES = ("single-file", "style-lora")  # Formats that are a file; the others are folders, each with its own card.
MAX_INHERITED_CHARS = 1_000_000  # Of the recipe of what is exported again.


def export(
    workdir: str | os.PathLike,
    out: pathlib.Path,
    formats: Sequence[str],
    style: str = "",
    dtype: str = "float16",
    recipe: bool = True,
    lora_base: str = "",
    lora_for: Sequence[str] = ("comfyui",),
    keep: Sequence[str] = (),
    extra_styles: Sequence[pathlib.Path] = (),
) -> list[pathlib.Path]:
    """Writes `out/dmm/`, `out/diffusers/`, `out/model.safetensors` and `out/style_lora.safetensors`, as `formats` says.

    A model card lies in each folder, and in `out` for the files. Of the parents nothing is opened but the base, whose
    VAE and text encoders the student has, where the run has kept their hashes.

    Args:
      style: the name or mix ("anime=0.7,photo=0.3") that is folded into the stock formats.
      lora_base: the name or mix whose stock export a style-lora is used on; "" for all styles in equal parts.
      extra_styles: files of `dmm-jax fit-style`, a style each, which join the student's own.
      lora_for: the tools that a style-lora is written for: comfyui, diffusers, a1111.
      keep: the styles that the export has, in this order, as "name" or "new name=name"; () for all.
      recipe: also write the whole recipe, with hashes of all parents, into the files' metadata.

    Raises:
      ValueError: a format, style or dtype that there is not, an output that is not empty; nothing is written then.
    """
    _check_options(formats, dtype)
    out = check_output(out)
    student = open_student(workdir, extra_styles, keep)
    weights = None
    if any(fmt != "dmm" for fmt in formats):
        if not style:
            raise UserError(
                f"diffusers, single-file and style-lora hold one style: give --style, of {', '.join(student.styles)}."
            )
        weights = _row(style, student.styles)
    base = _row(lora_base, student.styles) if lora_base else style_lora.equal_parts(student.styles)
    parents = parents_lib.of_workdir(locate(workdir), hashed=recipe) if student.kind == "workdir" else {}
    shown = _by_style(parents, student, keep) if recipe else {}
    license = licenses.together(parent["license"] for parent in parents.values()) or student.license
    said = describe(workdir, student, parents, style) | ({"kept": list(keep)} if keep else {}) if recipe else None
    merged_from = merged_from_names(parents, student) if recipe else list(student.styles)
    written = {}
    with staged_folder(out) as folder:
        for fmt in dict.fromkeys(formats):
            title = f"{student.name}: {style}" if fmt != "dmm" else student.name
            told = Recipe(title, merged_from, said, license)
            if fmt == "style-lora":
                path = folder / style_lora.NAME
                style_lora.write_style_lora(path, student, weights, base, dtype, lora_for, told)
            else:
                path = write(folder, fmt, student, None if fmt == "dmm" else weights, dtype, told)
            written[fmt] = out / path.relative_to(folder)
            if path.is_dir():
                _write_card(path, [fmt], told, student, locate(workdir), shown)
        files = [fmt for fmt in written if fmt in IN_FILES]
        if files:
            _write_card(folder, files, told, student, locate(workdir), shown)
    return list(written.values())


def _check_options(formats, dtype):
    unknown = [fmt for fmt in formats if fmt not in FORMATS]
    if unknown or not formats:
        raise UserError(f"there is no format {', '.join(unknown) or '(none given)'}; there are: {', '.join(FORMATS)}.")
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}.")


def open_student(
    workdir: str | os.PathLike, extra_styles: Sequence[pathlib.Path] = (), keep: Sequence[str] = ()
) -> Checkpoint:
    """Opens a merged checkpoint with fitted styles added, reduced to the styles in `keep`.

    Raises:
      ValueError: it is a stock checkpoint, or a style is unknown.
    """
    student = open_checkpoint(workdir)
    if student.styles is None:
        raise UserError(
            f"{workdir} holds a stock checkpoint; only a merged one is exported. Give the --workdir of a `train` run."
        )
    student = with_fitted_styles(student, extra_styles)
    return select(student, config_lib.as_kept(keep)) if keep else student


def _by_style(parents, student, keep) -> dict[str, dict]:
    """Returns the base and the parents of an export's own styles, by their names in it; a fitted style has none."""
    kept = config_lib.as_kept(keep) if keep else {name: name for name in student.styles}
    return {
        new: parents[old] for new, old in {parents_lib.BASE: parents_lib.BASE, **kept}.items() if old in parents
    }  # fmt: skip


def _write_card(folder, formats, told, student, workdir, parents):
    grid, measured = model_card.grid_of(workdir), model_card.measured_of(workdir, student.styles)
    if grid:
        (folder / model_card.GRID).write_bytes(grid.read_bytes())
    text = model_card.card(
        formats, told.title, student.styles, student.architecture, parents, told.license, measured, bool(grid),
        student.scheduler_config,
    )  # fmt: skip
    (folder / model_card.NAME).write_text(text, encoding="utf-8")


def _row(style, styles):
    return style_row(parse_style(style), styles)


def describe(workdir: str | os.PathLike, student: Checkpoint, parents: Mapping[str, Mapping], style: str) -> dict:
    """Returns the recipe: a run's parents, with the hashes of their files, and options; and the style folded in.

    Of a DMM folder it is the folder's own files and what they say of how they were made.
    """
    if student.kind == "workdir":
        return {"parents": dict(parents), "options": _options(config_lib.load(workdir)), "style": style}
    inherited = _metadata(student).get(RECIPE_KEY, "")
    if len(inherited) > MAX_INHERITED_CHARS:
        inherited = ""
    try:
        earlier = {"recipe": json.loads(inherited)} if inherited else {}
    except (ValueError, RecursionError):
        earlier = {}
    return {"from": provenance.record(student), **earlier, "style": style}


def merged_from_names(parents: Mapping[str, Mapping], student: Checkpoint) -> list[str]:
    """Returns the names of what a student was merged from; of a DMM folder those that it was given when it was made."""
    if parents:
        return parents_lib.names(parents)
    return (_metadata(student).get(MERGED_FROM) or student.name).split(", ")


def _metadata(student) -> dict[str, str]:
    (file, *_) = provenance.unet_files(student)
    return TensorFile(file).metadata


def _options(config) -> dict:
    told = json.loads(config_lib.to_json(config))
    return {name: value for name, value in told.items() if name not in ("base", "teachers", "data", "samples")}
