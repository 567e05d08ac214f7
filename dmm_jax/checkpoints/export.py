"""Exports a training run's student as PyTorch safetensors, in one or several formats, with model cards."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

from dmm_jax.checkpoints import export_lora, licenses, model_card, provenance, shipped
from dmm_jax.checkpoints.architecture import published_name
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.formats import extract_lora, style_lora
from dmm_jax.checkpoints.formats.fitted_style import with_fitted_styles
from dmm_jax.checkpoints.modelspec import MERGED_FROM, Recipe
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.recorded_sampling import metadata_of, recipe_of, recorded_sampling
from dmm_jax.checkpoints.styles import select_styles
from dmm_jax.checkpoints.vae import with_vae
from dmm_jax.checkpoints.write import DTYPES, FLOAT8, FORMATS, write_format
from dmm_jax.config.options import as_kept, opening_options
from dmm_jax.config.serialization import load_config, to_json
from dmm_jax.config.styles import parse_style, style_row
from dmm_jax.runtime.errors import UserError, meant
from dmm_jax.runtime.storage import check_output, locate, staged_folder

PLACES = {  # Where each format is written, below the folder; LoRAs have files per style and spelling.
    "dmm": "dmm",
    "diffusers": "diffusers",
    "single-file": "model.safetensors",
}
OPTION_FORMATS = {  # {option: the formats that it changes}; other options belong to all.
    "style": ("diffusers", "single-file", "style-lora", "lora"),
    "vae": ("dmm", "diffusers", "single-file"),
    "name": ("single-file",),
    "all_styles": ("diffusers", "single-file", "style-lora"),
    "lora_base": ("style-lora",),
    "lora_for": ("style-lora", "lora"),
    "rank": ("lora",),
    "exact": ("lora",),
    "base": ("lora",),
    "verify": ("dmm", "diffusers", "single-file"),
}


def export(
    workdir: str | os.PathLike,
    out: str | os.PathLike,
    formats: Sequence[str],
    style: str = "",
    dtype: str = "float16",
    recipe: bool = True,
    lora_base: str = "",
    lora_for: Sequence[str] = (),
    keep: Sequence[str] = (),
    extra_styles: Sequence[str | os.PathLike] = (),
    stated_licenses: Sequence[str] = (),
    dry_run: bool = False,
    vae: str | os.PathLike = "",
    rank: str = "",
    exact: bool = False,
    base: str | os.PathLike = "",
    progress: Callable = lambda keys: keys,
) -> list[pathlib.Path]:
    """Writes a student in each of `formats` below the folder `out`; returns the paths, in the order of the formats.

    | format      | path                       | contents                                                       |
    |-------------|----------------------------|----------------------------------------------------------------|
    | dmm         | out/dmm/                   | all styles, in the layout of DMM's own code                    |
    | diffusers   | out/diffusers/             | one style or mix, as a stock diffusers pipeline                |
    | single-file | out/model.safetensors      | one style or mix, as a checkpoint for ComfyUI, A1111 and Forge |
    | style-lora  | out/style_lora*.safetensors| the difference between two mixes, a few kilobytes              |
    | lora        | out/lora*.safetensors      | a style minus the base, of low rank; without `style`, each one |

    Each folder holds a model card; `out` holds one for the files. If the run has recorded its parents' hashes, no
    teacher is opened; the base is, for its VAE and text encoders. All formats are written, or none.

    Args:
      workdir: the workdir of a training run, or a DMM folder; for the format lora alone, also a stock checkpoint.
      out: a new or empty folder.
      formats: names from the table.
      style: the name or mix ("anime=0.7,photo=0.3") that is folded into every format except dmm, which has all styles;
        "" for lora makes one file per style.
      dtype: the dtype of the written tensors: float32, float16, bfloat16, or for single-file alone float8_e4m3fn.
      recipe: whether the files' metadata and the cards name the parents and their hashes.
      lora_base: the name or mix whose stock export a style-lora is used on; "" for all styles in equal parts.
      lora_for: the tools that can read the style-lora or lora: comfyui, diffusers, a1111; () for comfyui.
      keep: the styles to export, in this order, as "name" or "new name=name"; () for all.
      extra_styles: files of `dmm-jax fit-style`, one style each, which are added to the student's own.
      stated_licenses: "NAME=LICENCE" for "base" or a teacher whose files state no licence, or a wrong one.
      dry_run: opens and checks everything, and writes nothing.
      vae: a file, folder or checkpoint whose VAE replaces the base's; "" keeps it.
      rank: of a lora's layers, as "64", or "auto:0.98" for the rank at which each layer keeps this share of its squared
        difference; "" for 64, or for the ranks of a student that trained as a LoRA of this base.
      exact: whether a lora is decomposed exactly and not by the randomised algorithm, which is faster.
      base: the checkpoint that a lora changes; "" for the run's base.
      progress: wraps the sequence of a lora's tensors, for a progress bar.

    Raises:
      UserError: a format, style or dtype is unknown, formats do not belong together, no format uses an option, or `out`
        is not empty. Nothing is written then.
      CheckpointError: the student or a parent is damaged or missing. Nothing is written then.
    """
    options = {"lora_base": lora_base, "lora_for": lora_for, "vae": vae, "rank": rank, "exact": exact, "base": base}
    check_options(formats, dtype, options | {"style": style})
    lora_for = lora_for or ("comfyui",)
    lora_rank = extract_lora.parse_rank(rank or "64")
    out, run, is_lora = check_output(out), locate(workdir), set(formats) == {"lora"}
    student = with_vae(open_student(workdir, extra_styles, keep, allow_stock=is_lora and bool(base)), vae)
    if student.styles is None and style:
        raise UserError(f"{workdir} is a stock checkpoint without styles: leave --style {style} out.")
    if base:  # The student's own factors are its difference from another checkpoint.
        student = dataclasses.replace(student, factors=None)
    if is_lora and student.factors and not rank:
        lora_rank = extract_lora.Rank(rank=max(len(down) for _, down in student.factors().values()))
    weights = _weights_to_fold(formats, style, student)
    lora_parent = base_of(workdir, student, base) if "lora" in formats else None
    if lora_parent:
        export_lora.refuse_equal(student, lora_parent, export_lora.mixes_of(student, style))
    parents = provenance.parents_of_workdir(run, hashed=recipe) if student.kind == "workdir" else {}
    parents = provenance.with_licenses(parents, stated_licenses)
    license = licenses.together(parent["license"] for parent in parents.values()) or student.license
    merged_from, details, card_parents = list(student.styles or [student.name]), None, {}
    if recipe:
        merged_from = merged_from_names(parents, student)
        details = describe(workdir, student, parents, style) | ({"kept": list(keep)} if keep else {})
        card_parents = _parents_by_new_name(parents, student, keep)

    replaced = {"vae": pathlib.Path(vae).name} if vae else {}

    def about(fmt, mix=style):
        title = student.name if fmt == "dmm" or not mix else f"{student.name}: {mix}"
        own = details if details is None or fmt not in OPTION_FORMATS["vae"] else {**details, **replaced}
        return Recipe(title, merged_from, own, license)

    if dry_run:
        return planned_paths(out, formats, student, style, lora_for)
    loras = {"rank": lora_rank, "dtype": dtype, "tools": lora_for, "exact": exact, "progress": progress}
    paths = {}
    with staged_folder(out) as folder:
        for fmt in dict.fromkeys(formats):
            if fmt == "style-lora":
                base_weights = _row(lora_base, student.styles) if lora_base else style_lora.equal_parts(student.styles)
                options = dtype, lora_for, about(fmt)
                paths[fmt] = style_lora.write_style_loras(folder, student, weights, base_weights, *options)
            elif fmt == "lora":
                place = folder, student, lora_parent, export_lora.mixes_of(student, style)
                record = card_parents.get(provenance.BASE, {})
                paths[fmt] = export_lora.write_loras(
                    *place, about=functools.partial(about, fmt), base_record=record, **loras
                )
            else:
                paths[fmt] = [write_format(folder, fmt, student, weights, dtype, about(fmt))]
        cards = {written[0]: [fmt] for fmt, written in paths.items() if written[0].is_dir()}
        cards[folder] = [fmt for fmt, written in paths.items() if not written[0].is_dir()]
        for card_folder, card_formats in cards.items():
            if card_formats:
                mix = () if card_formats == ["dmm"] else _names_of(style)
                facts = card_formats, about(card_formats[0]), student, run, card_parents, lora_for, mix
                _write_card(card_folder, *facts)
        return [out / path.relative_to(folder) for written in paths.values() for path in written]


def planned_paths(
    out: pathlib.Path, formats: Sequence[str], student: Checkpoint, style: str, lora_for: Sequence[str]
) -> list[pathlib.Path]:
    """Returns the paths that an export writes, in the order of the formats."""
    paths = []
    for fmt in dict.fromkeys(formats):
        if fmt == "lora":
            paths += export_lora.places(out, student, style, lora_for)
        elif fmt == "style-lora":
            paths += style_lora.places(out, lora_for).values()
        else:
            paths.append(out / PLACES[fmt])
    return paths


def base_of(workdir: str | os.PathLike, student: Checkpoint, base: str | os.PathLike = "") -> Checkpoint:
    """Returns the checkpoint whose difference to a student is a LoRA: `base`, or a run's or shipped student's own.

    Raises:
      UserError: no base is given, and the student's own is not known.
    """
    if base := base or shipped.base_of(workdir):
        return open_checkpoint(base)
    if student.kind != "workdir":
        raise UserError(
            f"{workdir} does not say which base a LoRA of it changes: give it by --base, or export another format."
        )
    config = load_config(locate(workdir))
    return open_checkpoint(config.base, **opening_options(config, provenance.BASE))


def check_options(formats: Sequence[str], dtype: str, options: Mapping[str, object]) -> None:
    """Refuses what cannot be exported together; reads nothing.

    Args:
      options: values of the options in `OPTION_FORMATS`, by name; an option that is not used is empty.

    Raises:
      UserError: a format or dtype is unknown, formats do not belong together, or no format uses an option.
    """
    unknown = [fmt for fmt in formats if fmt not in FORMATS]
    if unknown or not formats:
        names, end = ", ".join(unknown) or "(none given)", meant(next(iter(unknown), ""), FORMATS)
        raise UserError(f"there is no format {names}{end} There are: {', '.join(FORMATS)}.")
    if dtype not in DTYPES and (dtype != FLOAT8 or set(formats) != {"single-file"}):
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, or {FLOAT8} for single-file alone; got {dtype!r}.")
    for name, value in options.items():
        if value and not set(formats) & set(OPTION_FORMATS[name]):
            option, uses = "--" + name.replace("_", "-"), ", ".join(OPTION_FORMATS[name])
            raise UserError(f"{option} has no effect on {', '.join(formats)}: it belongs to {uses}. Leave it out.")
    stock = [fmt for fmt in formats if fmt in ("diffusers", "single-file")]
    if stock and "style-lora" in formats:
        raise UserError(
            f"{' and '.join(stock)} would hold the style already, and style-lora changes another mix's export into it: "
            "export the mix of --lora-base as --style into one folder, and style-lora alone into another."
        )


def _weights_to_fold(formats, style, student):
    """Returns the mix (N,) that is folded into the stock formats; None if all formats keep all styles."""
    if student.styles is None or all(fmt in ("dmm", "lora") for fmt in formats) and not style:
        return None
    if not style:
        raise UserError(
            f"diffusers, single-file and style-lora hold one style: give --style, of {', '.join(student.styles)}."
        )
    return _row(style, student.styles)


def open_student(
    workdir: str | os.PathLike,
    extra_styles: Sequence[str | os.PathLike] = (),
    keep: Sequence[str] = (),
    allow_stock: bool = False,
) -> Checkpoint:
    """Opens a merged checkpoint, adds fitted styles, and reduces it to the styles in `keep`.

    Args:
      allow_stock: whether a checkpoint without styles is returned as it is.

    Raises:
      UserError: it is a stock checkpoint, or a style is unknown.
    """
    student = open_checkpoint(workdir)
    if student.styles is None and allow_stock:
        if keep or extra_styles:
            raise UserError(f"{workdir} is a stock checkpoint without styles: leave --keep and --extra-style out.")
        return student
    if student.styles is None:
        raise UserError(
            f"{workdir} holds a stock checkpoint; only a merged one is exported, or any one with --base as lora alone. "
            "Give the workdir of a `train` run."
        )
    student = with_fitted_styles(student, extra_styles)
    return select_styles(student, as_kept(keep)) if keep else student


def _row(style, styles):
    return style_row(parse_style(style), styles)


def _parents_by_new_name(parents, student, keep) -> dict[str, dict]:
    """Returns the parents of the exported styles and the base, by their new names; a fitted style has no parent."""
    names = as_kept(keep) if keep else {name: name for name in student.styles or ()}
    names = {provenance.BASE: provenance.BASE, **names}
    return {new: parents[old] for new, old in names.items() if old in parents}


def _names_of(style: str) -> tuple[str, ...]:
    """Returns the names in a mix; () for ""."""
    mix = parse_style(style)
    return (mix,) if isinstance(mix, str) and mix else tuple(mix)


def _write_card(folder, formats, about, student, workdir, parents, tools, mix):
    grid, metrics = model_card.grid_of(workdir), model_card.metrics_of(workdir, student.styles or ())
    if grid:
        (folder / model_card.GRID).write_bytes(grid.read_bytes())
    text = model_card.card(
        formats, about.title, student.styles or (), student.architecture, parents, about.license, metrics, bool(grid),
        student.scheduler_config, recorded_sampling(student), student.clip_skip, tools, mix,
        bool(published_name(student.unet_config)),
    )  # fmt: skip
    (folder / model_card.NAME).write_text(text, encoding="utf-8")


def describe(workdir: str | os.PathLike, student: Checkpoint, parents: Mapping[str, Mapping], style: str) -> dict:
    """Returns the recipe of an export: the run's parents with their files' hashes, its options, and the folded style.

    For a DMM folder, it holds the folder's own files and the recipe in their metadata instead.
    """
    if student.kind == "workdir":
        options = json.loads(to_json(load_config(workdir)))
        options = {name: v for name, v in options.items() if name not in ("base", "teachers", "data", "samples")}
        return {"parents": dict(parents), "options": options, "style": style}
    inherited = recipe_of(student)
    earlier = {"recipe": inherited} if inherited else {}
    return {"from": provenance.record(student), **earlier, "style": style}


def merged_from_names(parents: Mapping[str, Mapping], student: Checkpoint) -> list[str]:
    """Returns the names of a student's parents; for a DMM folder, those in its files' metadata."""
    if parents:
        return provenance.parent_names(parents)
    return (metadata_of(student).get(MERGED_FROM) or student.name).split(", ")
