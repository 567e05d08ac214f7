"""Compiles for TPUs on a machine without one: libtpu accepts the description of a slice."""

import importlib.util
import os
import re

import jax
from jax.sharding import Mesh

from dmm_jax.planning import devices
from dmm_jax.runtime import sharding
from dmm_jax.runtime.errors import UserError

# Compiles in a third of the time. The code differs from that of `train`, which compiles with full effort; its memory
# is close.
LEAST_EFFORT = {"exec_time_optimization_effort": -1.0}
# libtpu must not ask this machine for a TPU, and two plans may run at once.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def is_installed() -> bool:
    """Returns whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def tpu_mesh(topology: str, **axes: int) -> Mesh:
    """Returns a mesh over TPU slices that need not exist, such as "v5e:4x4" or "v5e:4x4*2"; `axes` as in `make_mesh`.

    Raises:
      UserError: libtpu is not installed, or does not know the slice.
    """
    if not is_installed():
        raise UserError(
            "compiling for a TPU needs libtpu: pip install 'dmm-jax[plan]'. Without it (--no-compile) the memory of "
            "activations is an estimate."
        )
    if jax.default_backend() != "tpu":
        os.environ |= ENVIRONMENT
    from jax.experimental import topologies

    shape, num_slices = devices.slices(topology)
    slices = {"num_slices": num_slices} if num_slices > 1 else {}
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=shape, **slices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"libtpu cannot describe {topology}: {error}") from error
    return sharding.make_mesh(**axes, devices=list(description.devices))


def out_of_memory(error: Exception) -> tuple[float, float]:
    """Returns the (needed, available) bytes of a program that is too large for its device; raises any other error."""
    numbers = re.search(r"\(?([\d.]+)G\)?[^\d]*(?:exceeds available HBM|of) \(?([\d.]+)G\)?", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or not numbers:
        raise error
    return float(numbers[1]) * devices.GIB, float(numbers[2]) * devices.GIB
