"""Files that `dmm-jax fit-style` writes: one more row for the style table of the model that it was fitted to."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, save
from dmm_jax.checkpoints.styles import TABLE

STYLE_KEY = "dmm_jax.fitted_style"  # Metadata, as JSON: name, unet_sha256, and how the style was fitted.


def write_fitted_style(path: pathlib.Path, row: Float[np.ndarray, " E"], facts: Mapping) -> pathlib.Path:
    """Writes a row of the style table (before the MLP) and returns the path.

    Args:
      facts: the style's "name", the model's "unet_sha256", and further facts about the fit.
    """
    save(path, {TABLE: np.asarray(row, np.float32)[None]}, {STYLE_KEY: json.dumps(dict(facts))})
    return path


def with_fitted_styles(student: Checkpoint, files: Sequence[str | os.PathLike]) -> Checkpoint:
    """Returns the student with one more style per file, after its own styles; its other tensors stay the same.

    Raises:
      CheckpointError: a file is damaged, is not a fitted style, was fitted to another model, or has a style's name.
    """
    if not files:
        return student
    if student.styles is None:
        raise CheckpointError(
            f"{student.path} is a stock checkpoint: it has no style table to which a style could be added."
        )
    width = student.shapes("unet")[TABLE][1]
    names, rows = list(student.styles), []
    for path in files:
        name, row = _read(pathlib.Path(path), student, width)
        if name in names:
            raise CheckpointError(
                f"{path} holds the style {name!r}, but this name is taken: fit it under another name."
            )
        names.append(name)
        rows.append(row)
    config = student.unet_config | {"num_models": len(names)}

    def load():
        tensors = student.tensors("unet")
        table = np.concatenate([np.asarray(tensors[TABLE], np.float32), *rows])
        return {key: tensors[key] for key in tensors} | {TABLE: table}

    components = {**student.components, "unet": Component(config, load)}
    return dataclasses.replace(student, components=components, styles=tuple(names))


def _read(path: pathlib.Path, student: Checkpoint, width: int) -> tuple[str, Float[np.ndarray, "1 E"]]:
    file = TensorFile(path)
    try:
        facts = json.loads(file.metadata[STYLE_KEY])
        name, model_hash = facts["name"], facts["unet_sha256"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise CheckpointError(f"{path} is not a fitted style. Give a file that `dmm-jax fit-style` wrote.") from None
    if not isinstance(name, str) or list(file) != [TABLE] or file.shape(TABLE) != (1, width):
        shapes = {key: file.shape(key) for key in list(file)[:5]}
        raise CheckpointError(f"{path} must hold one row, {TABLE} of shape {(1, width)}; it holds {shapes}.")
    if model_hash != student.digest("unet"):
        raise CheckpointError(
            f"{path} was fitted to another model: its UNet's SHA-256 is {naming.printable(str(model_hash))[:10]}, "
            f"that of {student.path} is {student.digest('unet')[:10]}. Fit it again: "
            f"`dmm-jax fit-style {student.path} ...`."
        )
    row = np.asarray(file[TABLE], np.float32)
    if not np.isfinite(row).all():
        raise CheckpointError(f"{path} holds NaN or infinity. Fit it again: `fit-style` with a lower --learning-rate.")
    return naming.printable(name), row
