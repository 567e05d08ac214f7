"""Choosing, ordering and renaming the styles of a merged checkpoint: rows of its table, and their names."""

import dataclasses
import functools
from collections.abc import Mapping

from dmm_jax.checkpoints.checkpoint import Checkpoint, Component
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.safetensors_io import Computed, Tensors, dtype_of, shape_of
from dmm_jax.runtime.errors import nearest

TABLE = "model_embedding.weight"


def select(student: Checkpoint, kept: Mapping[str, str]) -> Checkpoint:
    """Returns a merged checkpoint that has some of a student's styles; all else is the same, and nothing is read.

    Args:
      kept: {name: its name in the student}, in row order.

    Raises:
      CheckpointError: the student is a stock checkpoint, or has no such style (the nearest is suggested).
    """
    if not student.styles:
        raise CheckpointError(f"{student.path} is a stock checkpoint: it has no styles to choose from.")
    names = list(student.styles)
    for name in kept.values():
        if name not in names:
            raise CheckpointError(
                f"{student.path} has no style {name!r}; did you mean {nearest(name, names)!r}? "
                f"It has: {', '.join(names)}."
            )
    if not kept:
        raise CheckpointError(f"no style of {student.path} is kept; name at least one of {', '.join(names)}.")
    rows = [names.index(name) for name in kept.values()]
    component = student.components["unet"]

    def load():
        tensors = component.tensors
        entries = {
            key: Computed(shape_of(tensors, key), dtype_of(tensors, key), functools.partial(tensors.__getitem__, key))
            for key in tensors
        }
        shape, read = (len(rows), *entries[TABLE].shape[1:]), entries[TABLE].read
        return Tensors(entries | {TABLE: Computed(shape, entries[TABLE].dtype, lambda: read()[rows])})

    unet = Component(component.config | {"num_models": len(rows)}, load)
    return dataclasses.replace(student, components={**student.components, "unet": unet}, styles=tuple(kept))
