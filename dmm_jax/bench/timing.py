"""Times calls, reads the clock and power of GPUs while they run, and measures the matrix peak."""

import contextlib
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

WARMUP = 3  # Calls before the timed calls.
PEAK_SIZE = 8192  # Rows and columns of the square product that measures the matrix peak.
_POWER_CAP = 0x4  # NVML's bit for a clock that the power limit reduces.
_READINGS = ("clocks.sm", "clocks.max.sm", "power.draw", "enforced.power.limit", "clocks_throttle_reasons.active")


def median_s(call: Callable, repeats: int) -> float:
    """Returns the median seconds of a call until its result is ready, after warm-up."""
    times = []
    for number in range(WARMUP + repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        if number >= WARMUP:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def queued_s(call: Callable, repeats: int) -> float:
    """Returns the mean seconds of calls that are dispatched without waiting for each, as in `train`."""
    jax.block_until_ready(call())
    started = time.perf_counter()
    for _ in range(repeats):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / repeats


@contextlib.contextmanager
def watched_power(num_devices: int, every_ms: int = 100) -> Iterator[dict[str, float]]:
    """Yields a dictionary that has the clocks and power of the GPUs during the block, once the block ends.

    It has the medians of the readings (`sm_clock_mhz`, `power_w`), their limits (`max_sm_clock_mhz`, `power_limit_w`),
    and `power_capped`, the share of readings in which the power limit reduced the clock; then the energy of the work
    sets the speed. It stays empty without `nvidia-smi`.
    """
    readings: dict[str, float] = {}
    if jax.default_backend() != "gpu" or not shutil.which("nvidia-smi"):
        yield readings
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_devices)))
    command = ["nvidia-smi", f"--id={','.join(visible.split(',')[:num_devices])}", f"--query-gpu={','.join(_READINGS)}"]
    options = ["--format=csv,noheader,nounits", f"--loop-ms={every_ms}"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as smi:
        try:
            yield readings
        finally:
            smi.terminate()
            readings |= read_power(smi.communicate()[0])


def read_power(text: str) -> dict[str, float]:
    """Reads `nvidia-smi`'s lines of `_READINGS`, except incomplete lines and lines of a GPU that reports no power."""
    rows = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            *numbers, reasons = line.split(",")
            rows.append((*map(float, numbers), bool(int(reasons, 16) & _POWER_CAP)))
    rows = [row for row in rows if len(row) == len(_READINGS)]
    if not rows:
        return {}
    clock, max_clock, power, limit, capped = zip(*rows, strict=True)
    read = {"sm_clock_mhz": clock, "max_sm_clock_mhz": max_clock, "power_w": power, "power_limit_w": limit}
    return {name: statistics.median(values) for name, values in read.items()} | {
        "power_capped": statistics.mean(capped)
    }


def matmul_peak() -> float:
    """Measures the TFLOP/s of a large bfloat16 matrix product on random data; a CPU multiplies smaller matrices."""
    size = PEAK_SIZE if jax.default_backend() != "cpu" else 1024
    repeats = 8

    @jax.jit
    def product(a, b):
        return jax.lax.fori_loop(0, repeats, lambda _, c: ((c @ b) * (size**-0.5)).astype(c.dtype), a)

    a, b = (jax.random.normal(jax.random.key(seed), (size, size), jnp.bfloat16) for seed in range(2))
    return 2 * size**3 * repeats / median_s(lambda: product(a, b), 10) / 1e12
