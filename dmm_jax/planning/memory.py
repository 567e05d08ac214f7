"""Bytes of a run's arrays on each device: exact, from their shapes and shardings."""

import math
from collections.abc import Mapping

import jax
import numpy as np

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


def array_bytes(state: Mapping, teachers, encoders, batch) -> dict[str, int]:
    """Returns the bytes per device of a step's arguments and of its gradients, by kind; omits empty kinds.

    Gradients are float32 and placed like the parameters. They exist only within a step.

    Args:
      state: the training state: "params", "opt_state", perhaps "ema" and "discriminator", and counters.
    """
    params = state["params"]
    sizes = {
        "student": per_device(params),
        "moments": per_device(state["opt_state"]),
        "average": per_device(state.get("ema", {})),
        "discriminator": per_device(state.get("discriminator", {})),
        "gradients": per_device(params) + per_device(state.get("discriminator", {"params": {}})["params"]),
        "teachers": per_device(teachers) - per_device(teachers["text"]),
        "text encoders": per_device(teachers["text"]) + per_device(encoders),
        "batch": per_device(batch),
    }
    return {kind: size for kind, size in sizes.items() if size}
