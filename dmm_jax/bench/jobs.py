"""The jobs of `dmm-jax bench`: medians of timed steps on random data, and shares of this device's own matrix peak.

The networks have the published sizes and random weights, made on the device: speed does not depend on their values.
"""

from collections.abc import Iterable

import jax
import ml_collections

from dmm_jax.bench import data, fid, host, numerics, sample, timing, train
from dmm_jax.config import options
from dmm_jax.runtime.errors import UserError


def get_config() -> ml_collections.ConfigDict:
    """Returns the default config of `bench`: the paper's batch, eight teachers."""
    config = options.get_config()
    config.base = "random"
    config.teachers = tuple((f"style_{k}", "random") for k in range(8))
    return config


def with_teachers(config, number: int) -> ml_collections.ConfigDict:
    """Returns the config with its first teachers alone.

    Raises:
      UserError: it has fewer.
    """
    if not 1 <= number <= len(config.teachers):
        raise UserError(f"--teachers must be 1 to {len(config.teachers)}, the config's teachers; got {number}.")
    config = config.copy_and_resolve_references()
    config.teachers = config.teachers[:number]
    return config


def bench(
    job: str,
    config,
    size: str = "sd15",
    num_steps: int = 10,
    batch_size: int = 16,
    profile: str = "",
    num_devices: int = 0,
) -> Iterable[dict]:
    """Runs one job and returns its rows; the rows of `numerics` come one by one.

    Args:
      size: of the networks: a name in `SIZES`.
      num_steps: timed steps.
      batch_size: images at once, for sampling; training uses the config's.
      profile: a folder for a trace of two more calls, whose kernels, summed by name, are printed on stderr.
      num_devices: for training, uses the first so many devices; 0: all.
    """
    if num_devices and job != "train":
        raise UserError(f"a number of devices is for `bench train` and `bench scaling`; `{job}` takes all there are.")
    if job == "host":
        return host.measure(config, size, num_steps)
    if job == "fid":
        return [fid.measure()]
    if job == "data":
        return data.measure_data(config, size, num_steps)
    if job == "prepare":
        return data.measure_prepare(config, size, num_steps, batch_size)
    num_devices = num_devices or jax.device_count()
    about = {
        "device": jax.devices()[0].device_kind,
        "num_devices": num_devices,
        "jax": jax.__version__,
        "size": size,
    }
    if job == "numerics":
        return (row | about for row in numerics.measure(config, size))
    peak = timing.matmul_peak()
    if job == "train":
        rows = train.measure(config, size, num_steps, profile, num_devices)
    else:
        rows = sample.measure(config, size, num_steps, batch_size, profile)
    per_device = {"matmul_peak_tflop_per_s": peak}
    return [row | per_device | {"share_of_peak": row["tflop_per_s"] / peak / num_devices} | about for row in rows]
