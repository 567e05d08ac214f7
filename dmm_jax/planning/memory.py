"""What each device holds of a run's arrays: exact, from their shapes and where they live."""

import math
from collections.abc import Mapping

import jax
import numpy as np

GIB = 2.0**30


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

    Args:
      state: the training state: "params", "opt_state", perhaps "ema", and counters.
    """
    params = state["params"]
    kinds = {
        "student": per_device(params),
        "moments": per_device(state["opt_state"]),
        "average": per_device(state.get("ema", {})),
        "gradients": per_device(params),  # float32, placed like the parameters.
        "teachers": per_device(teachers),
        "text encoders": per_device(encoders),
        "batch": per_device(batch),
    }
    return {kind: size for kind, size in kinds.items() if size}


def short_table(kinds: Mapping[str, int], mesh_shape: Mapping[str, int], device_kind: str) -> str:
    """Writes two lines: what each device holds, and how the devices are laid out."""
    parts = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in kinds.items())
    layout = " x ".join(f"{axis} {size}" for axis, size in mesh_shape.items())
    return (
        f"Each of {math.prod(mesh_shape.values())} devices ({device_kind}; {layout}) holds "
        f"{sum(kinds.values()) / GIB:.2f} GiB: {parts}.\n"
        "Activations come on top: `dmm-jax plan` counts them."
    )
