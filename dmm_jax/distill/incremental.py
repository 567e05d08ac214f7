"""Incremental merging: a finished student learns further styles and keeps its own (DMM, arXiv:2504.12364, 3.5).

The old student, frozen, is one more teacher: on its share of the images it teaches its own styles, drawn at random.
Without that share the old styles are forgotten (Tab. 2). A grown student can grow again.
"""

import hashlib
from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np

from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.compare import teacher_problems
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import hub
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.parents import open_teachers
from dmm_jax.checkpoints.styles import fold_style, select_styles
from dmm_jax.config.options import kept_styles
from dmm_jax.config.serialization import load_config
from dmm_jax.distill.teachers import BatchRow
from dmm_jax.models.unet_config import style_mlp_name
from dmm_jax.runtime.errors import naming_option, refuse
from dmm_jax.runtime.storage import locate

REPLAY = "replay"  # The name of a row of the batch in which the old student teaches.
MAX_COSINE = 0.7  # Between rows of a style table: styles whose rows are nearly parallel stay one in training.


def resolved(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns the config with grow.styles filled in: all styles of the old student, if the config names none.

    Raises:
      CheckpointError: the old student cannot be opened, or has no styles.
    """
    if not config.grow.student or config.grow.styles:
        return config
    student = _open_old(config)
    if not student.styles:
        raise CheckpointError(
            f"grow.student {student.path} is a stock checkpoint: only a merged one has styles to keep. "
            "Give the workdir or DMM folder of a finished student."
        )
    config = config.copy_and_resolve_references()
    config.grow.styles = tuple(student.styles)
    return config


def old_student(config, base: Checkpoint) -> Checkpoint | None:
    """Opens the student that grows, reduced to the kept styles; returns None if no student grows.

    Raises:
      CheckpointError: it has no such style, or does not come from the same base.
    """
    if not config.grow.student:
        return None
    student = select_styles(_open_old(config), kept_styles(config))
    problems = teacher_problems(base, f"grow.student ({student.path})", fold_style(student, one_hot(student, 0)))
    for component in ("vae", *base.text_encoders):
        if student.has(component) and student.digest(component) != base.digest(component):
            problems.append(f"grow.student ({student.path}) was trained with another {component} than the base's.")
    refuse("This student cannot grow", problems, CheckpointError)
    return student


def _open_old(config) -> Checkpoint:
    with naming_option("config.grow.student"):
        return open_checkpoint(config.grow.student)


def one_hot(student: Checkpoint, row: int) -> np.ndarray:
    """Returns the weights (N,) of one style of a merged checkpoint."""
    return np.eye(len(student.styles), dtype=np.float32)[row]


def batch_rows(teachers: Mapping[str, Checkpoint], old: Checkpoint | None = None, replay: int = 0) -> list[BatchRow]:
    """Returns the rows of the batch: each new style by its teacher, then the old student's own styles by itself."""
    num_old = len(old.styles) if old else 0
    rows = [BatchRow(name, teacher, num_old + row) for row, (name, teacher) in enumerate(teachers.items())]
    names = [REPLAY, *(f"{REPLAY} {number}" for number in range(2, replay + 1))][: replay if old else 0]
    return rows + [BatchRow(name, old, 0, num_old) for name in names]


def grown_style(old: Checkpoint, names: Sequence[str], seed: int) -> dict:
    """Returns the style parameters of a grown student: the old rows and MLP, and a fresh row for each new style.

    A new row is drawn from the seed, the old table and the style's name. From the seed alone it could equal the row of
    a kept style, which was drawn from that seed too and may now be at another place.

    Args:
      names: of the new styles, in row order.
    """
    params, mlp = old.params("unet"), style_mlp_name(old.unet_config)
    table = np.asarray(params["model_embedding"]["embedding"], np.float32)
    for name in names:
        table = np.concatenate([table, _fresh_row(table, name, seed)[None]])
    return {"model_embedding": {"embedding": table}, mlp: params[mlp]}


def _fresh_row(table: np.ndarray, name: str, seed: int) -> np.ndarray:
    """Draws a row, N(0, 1), that is not nearly parallel to any row of the table."""
    digest = hashlib.sha256(table.tobytes() + name.encode()).digest()
    rng = np.random.default_rng([seed, *digest])
    lengths = np.linalg.norm(table, axis=1)
    while True:
        row = rng.standard_normal(table.shape[1], np.float32)
        cosines = table @ row / np.maximum(lengths * np.linalg.norm(row), 1e-12)
        if np.abs(cosines).max() < MAX_COSINE:
            return row


def origins(config) -> dict[str, Checkpoint]:
    """Returns the checkpoint that each style of a run comes from, in row order; growing may have had several rounds.

    A kept style comes from the teacher of the round that learned it. A DMM folder does not name its teachers: a style
    kept from one comes from the old student itself, with that style folded in.
    """
    teachers = {}
    if config.grow.student:
        path = locate(config.grow.student)
        if (path / "config.json").is_file():
            with hub.cache_only():
                older = origins(load_config(path))
        else:
            student = open_checkpoint(path)
            older = {name: fold_style(student, one_hot(student, row)) for row, name in enumerate(student.styles)}
        teachers = {name: older[old] for name, old in kept_styles(config).items()}
    return teachers | open_teachers(config)
