"""What each device holds of a run's arrays: exact, from their shapes and where they live."""

import math

import jax
import numpy as np

from dmm_jax.data.batches import Batch
from dmm_jax.distill.state import TrainState
from dmm_jax.distill.teachers import Frozen, Teachers

# Of the parameters' bytes: AdamW reads the gradients once for their norm, then again with the parameters and the two
# moments, and writes those three.
OPTIMIZER_PASSES = 8


def per_device(tree) -> int:
    """Returns the bytes that one device holds of a tree of arrays, or of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def whole(tree) -> int:
    """Returns the bytes of a tree over all devices, copies counted once."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def held(state: TrainState, teachers: Teachers, frozen: Frozen, batch: Batch) -> dict[str, int]:
    """Returns the bytes per device of what lives from step to step, by kind; gradients live within one.

    Gradients are float32, placed like the parameters. The arguments may be arrays or shapes with shardings.
    """
    kinds = {
        "student": per_device(state.student.params),
        "moments": per_device(state.student.opt_state),
        "average": per_device(state.ema),
        "discriminator": per_device(state.discriminator),
        "gradients": per_device(state.trained),
        "teachers": per_device(teachers) - per_device(teachers.text),
        "text encoders": per_device(teachers.text) + per_device(frozen),
        "batch": per_device(batch),
    }
    return {kind: size for kind, size in kinds.items() if size}
