"""Incremental merging: a finished student learns further styles and keeps its own (DMM, arXiv:2504.12364, 3.5).

The old student, frozen, is one more teacher: of all its styles, one drawn at random for every image. Its share of the
batch regularises; without it the old styles are forgotten (Tab. 2). What has grown can grow again.
"""

from collections.abc import Mapping

import ml_collections
import numpy as np

from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.compare import teacher_problems
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.open import open_checkpoint, open_teacher
from dmm_jax.checkpoints.styles import fold_style, select_styles
from dmm_jax.config import options as config_lib
from dmm_jax.distill.teachers import BatchRow
from dmm_jax.models.unet_config import style_mlp_name
from dmm_jax.runtime.errors import refuse
from dmm_jax.runtime.storage import locate

REPLAY = "replay"  # The name of a row in which the old student teaches.


def resolved(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns the config with the names of all styles in it: those of the old student where it says none.

    Raises:
      CheckpointError: the old student cannot be opened, or has no styles.
    """
    if not config.grow.student or config.grow.styles:
        return config
    student = open_checkpoint(config.grow.student)
    if not student.styles:
        raise CheckpointError(
            f"grow.student {student.path} is a stock checkpoint: only a merged one has styles to keep. "
            "Give the workdir or DMM folder of a finished student."
        )
    config = config.copy_and_resolve_references()
    config.grow.styles = tuple(student.styles)
    return config


def old_student(config, base: Checkpoint) -> Checkpoint | None:
    """Opens the student that grows, with the styles that are kept; None where a run starts anew.

    Raises:
      CheckpointError: it has no such style, or does not come from the same base.
    """
    if not config.grow.student:
        return None
    student = select_styles(open_checkpoint(config.grow.student), config_lib.kept_styles(config))
    problems = teacher_problems(base, f"grow.student ({student.path})", fold_style(student, one_hot(student, 0)))
    for component in ("vae", *base.text_encoders):
        if student.has(component) and student.digest(component) != base.digest(component):
            problems.append(f"grow.student ({student.path}) was trained with another {component} than the base's.")
    refuse("This student cannot grow", problems, CheckpointError)
    return student


def one_hot(student: Checkpoint, row: int) -> np.ndarray:
    """Returns the weights (N,) of one style of a merged checkpoint."""
    return np.eye(len(student.styles), dtype=np.float32)[row]


def batch_rows(teachers: Mapping[str, Checkpoint], old: Checkpoint | None = None, replay: int = 0) -> list[BatchRow]:
    """Returns the rows of the batch: each new style by its teacher, then the old student's own styles by itself."""
    kept = len(old.styles) if old else 0
    new = [BatchRow(name, teacher, kept + row) for row, (name, teacher) in enumerate(teachers.items())]
    names = [REPLAY, *(f"{REPLAY} {number}" for number in range(2, replay + 1))][: replay if old else 0]
    return new + [BatchRow(name, old, 0, kept) for name in names]


def grown(style: Mapping, old: Checkpoint) -> dict:
    """Returns fresh style parameters (of `student.style_params`) with the old student's rows and MLP in their place."""
    params, mlp = old.params("unet"), style_mlp_name(old.unet_config)
    rows = np.asarray(params["model_embedding"]["embedding"], np.float32)
    table = np.concatenate([rows, style["model_embedding"]["embedding"][len(rows) :]])
    return {"model_embedding": {"embedding": table}, mlp: params[mlp]}


def origins(config) -> dict[str, Checkpoint]:
    """Returns the checkpoint that each style of a run comes from, in row order: its teacher, over all rounds.

    Of a grown student's older styles it is the teacher of the round in which they were learned; where that is not
    known, since a DMM folder does not hold its teachers, the old student with the style folded in.
    """
    found = {}
    if config.grow.student:
        path, kept = locate(config.grow.student), config_lib.kept_styles(config)
        older = origins(config_lib.load(path)) if (path / "config.json").is_file() else _folded(open_checkpoint(path))
        found = {name: older[old] for name, old in kept.items()}
    told = {"prediction_type": config.prediction_type}
    return found | {name: open_teacher(path, config.base, **told) for name, path in config.teachers}


def _folded(student: Checkpoint) -> dict[str, Checkpoint]:
    return {name: fold_style(student, one_hot(student, row)) for row, name in enumerate(student.styles)}
