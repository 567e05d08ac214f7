"""What each device holds of a run's arrays: exact, from their shapes and where they live."""

import math
from collections.abc import Mapping

import jax
import numpy as np

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


def held(state: Mapping, teachers, encoders, batch) -> dict[str, int]:
    """Returns the bytes per device of what lives from step to step, by kind; gradients live within one.

    Gradients are float32, placed like the parameters.

    Args:
      state: the training state: "params", "opt_state", perhaps "ema" and "discriminator", and counters.
    """
    params = state["params"]
    kinds = {
        "student": per_device(params),
        "moments": per_device(state["opt_state"]),
        "average": per_device(state.get("ema", {})),
        "discriminator": per_device(state.get("discriminator", {})),
        "gradients": per_device(params) + per_device(state.get("discriminator", {"params": {}})["params"]),
        "teachers": per_device(teachers) - per_device(teachers["text"]),
        "text encoders": per_device(teachers["text"]) + per_device(encoders),
        "batch": per_device(batch),
    }
    return {kind: size for kind, size in kinds.items() if size}
