"""What each device holds of a run's arrays: exact, from their shapes and where they live."""

import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from dmm_jax.planning.devices import GIB


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
        "teachers": per_device(teachers),
        "text encoders": per_device(encoders),
        "batch": per_device(batch),
    }
    return {kind: size for kind, size in kinds.items() if size}


def short_table(kinds: Mapping[str, int], mesh: Mesh) -> str:
    """Writes what `train` says before its first step: how the devices are laid out, and what each of them holds."""
    total = sum(kinds.values())
    unit, name = (GIB, "GiB") if total >= GIB else (2.0**20, "MiB")
    parts = ", ".join(f"{kind} {size / unit:.2f}" for kind, size in kinds.items())
    layout = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return (
        f"Mesh {layout}, {mesh.devices.flat[0].device_kind}. Each device holds {total / unit:.2f} {name} ({parts}) and "
        "activations, which `dmm-jax plan` counts."
    )
