"""The TPU's compiler without a TPU: libtpu compiles a program for a slice that it is only told about."""

import importlib.util
import os
import re

import jax
from jax.sharding import Mesh

from dmm_jax.planning import devices
from dmm_jax.runtime import sharding
from dmm_jax.runtime.errors import UserError

# Compiles in a third of the time, to another code than `train`'s, which is of full effort; memory is near.
EFFORT = {"exec_time_optimization_effort": -1.0}
# Nothing on this machine is asked for, and two plans may run at once.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def is_here() -> bool:
    """Tells whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def tpu_mesh(topology: str, **axes: int) -> Mesh:
    """Returns a mesh over TPU slices that need not exist, as "v5e:4x4" or "v5e:4x4*2"; `axes` as in `make_mesh`.

    Raises:
      ValueError: libtpu is not installed, or does not know the slice.
    """
    if not is_here():
        raise UserError(
            "compiling for a TPU needs libtpu: pip install 'dmm-jax[plan]'. Without it (--no-compile) the memory of "
            "activations is an estimate."
        )
    if jax.default_backend() != "tpu":
        os.environ |= ENVIRONMENT
    from jax.experimental import topologies

    shape, num_slices = devices.slices(topology)
    several = {"num_slices": num_slices} if num_slices > 1 else {}
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=shape, **several)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"libtpu cannot describe {topology}: {error}") from error
    return sharding.make_mesh(**axes, devices=list(described.devices))


def told(full_effort: bool) -> str:
    """Says how a program was compiled."""
    if full_effort:
        return "compiled as `train` compiles"
    return (
        "compiled with the least effort for its speed, where `train` takes the full one (--full-effort): memory is near"
    )


def out_of_memory(error: Exception) -> tuple[float, float]:
    """Returns (needed, available) bytes of a program that was found too large; raises any other error again."""
    numbers = re.search(r"\(?([\d.]+)G\)?[^\d]*(?:exceeds available HBM|of) \(?([\d.]+)G\)?", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or not numbers:
        raise error
    return float(numbers[1]) * devices.GIB, float(numbers[2]) * devices.GIB
