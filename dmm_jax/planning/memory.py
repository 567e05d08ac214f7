"""Bytes of a run's arrays on each device: exact, from their shapes and shardings."""

import math

import jax
import numpy as np

from dmm_jax.data.batches import Batch
from dmm_jax.distill.state import TrainState
from dmm_jax.distill.teachers import Frozen, Teachers
from dmm_jax.models import block_loops

# Memory traffic of AdamW, in multiples of the parameters' bytes: it reads the gradients once for their norm, then again
# with the parameters and the two moments, and writes the parameters and the moments.
OPTIMIZER_PASSES = 8


def per_device(tree) -> int:
    """Returns the bytes on each device of a tree of arrays, or of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def total(tree) -> int:
    """Returns the bytes of a tree over all devices; copies count once."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def looped_kernels(params, dtype: str, fsdp: int = 1) -> float:
    """Returns the bytes of the casts of the kernels in loops over blocks, on each device; 0 if they need no cast.

    A compiler casts the kernels of all blocks before the loop, and keeps them for the backward pass.

    Args:
      params: of the student, as shapes; the blocks of a loop are stacked.
      dtype: of the arithmetic.
      fsdp: the axis that divides the casts; the loop gathers one block at a time.
    """
    leaves = jax.tree.leaves_with_path(params)
    kernels = [leaf for path, leaf in leaves if block_loops.is_stacked(path) and leaf.ndim > 2]
    return sum(leaf.size * np.dtype(dtype).itemsize for leaf in kernels if leaf.dtype != np.dtype(dtype)) / fsdp


def streamed_bytes(teachers: Teachers, num_rows: int) -> int:
    """Returns the bytes of all teachers' networks that travel to each device in a step; `teachers` is one of them."""
    return num_rows * per_device((teachers.unet, teachers.text))


def array_bytes(state: TrainState, teachers: Teachers, frozen: Frozen, batch: Batch) -> dict[str, int]:
    """Returns the bytes per device of a step's arguments and of its gradients, by kind; omits empty kinds.

    The arguments are arrays, or shapes with shardings; one teacher, if all are in the host's memory. Gradients are
    float32, placed like the parameters, and exist only within a step.
    """
    sizes = {
        "student": per_device(state.student.params),
        "frozen student": per_device(frozen.student),
        "moments": per_device(state.student.opt_state),
        "average": per_device(state.ema),
        "discriminator": per_device(state.discriminator),
        "gradients": per_device(state.trained),
        "teachers": per_device(teachers) - per_device(teachers.text),
        "text encoders": per_device(teachers.text) + per_device(frozen) - per_device(frozen.student),
        "batch": per_device(batch),
    }
    return {kind: size for kind, size in sizes.items() if size}
