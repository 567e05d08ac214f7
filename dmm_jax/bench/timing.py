"""How `bench` times what it runs, and what a GPU's clock and power were meanwhile."""

import contextlib
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

WARMUP = 3  # Calls before the timed ones.
PEAK_SIZE = 8192  # Rows and columns of the square product that measures the matrix peak.
_POWER_CAP = 0x4  # NVML's bit of a clock that is held back to stay within the power limit.
_READINGS = ("clocks.sm", "clocks.max.sm", "power.draw", "enforced.power.limit", "clocks_throttle_reasons.active")


def median_s(call: Callable, repeats: int) -> float:
    """Returns the median seconds of a call whose result is waited for, after warm-up."""
    times = []
    for number in range(WARMUP + repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        if number >= WARMUP:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def queued_s(call: Callable, repeats: int) -> float:
    """Returns the seconds of a call among several that are dispatched without waiting for each, as `train` does."""
    jax.block_until_ready(call())
    started = time.perf_counter()
    for _ in range(repeats):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / repeats


@contextlib.contextmanager
def watched_power(num_devices: int, every_ms: int = 100) -> Iterator[dict[str, float]]:
    """Reads clocks and power of the GPUs that run the block, and fills the dict that it yields as the block ends.

    Medians of the readings (`sm_clock_mhz`, `power_w`), what they could be (`max_sm_clock_mhz`, `power_limit_w`), and
    `power_capped`, the share of the readings in which the power limit held the clock back: there the energy of the work
    sets the speed. Empty where `nvidia-smi` is not found.
    """
    found: dict[str, float] = {}
    if jax.default_backend() != "gpu" or not shutil.which("nvidia-smi"):
        yield found
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_devices)))
    command = ["nvidia-smi", f"--id={','.join(visible.split(',')[:num_devices])}", f"--query-gpu={','.join(_READINGS)}"]
    options = ["--format=csv,noheader,nounits", f"--loop-ms={every_ms}"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as smi:
        try:
            yield found
        finally:
            smi.terminate()
            found |= read_power(smi.communicate()[0])


def read_power(text: str) -> dict[str, float]:
    """Reads `nvidia-smi`'s lines of `_READINGS`; leaves out one cut off, and those of a GPU that tells no power."""
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
    """Measures the TFLOP/s of a large bfloat16 matrix product on random data (on a CPU, of a small one)."""
    size = PEAK_SIZE if jax.default_backend() != "cpu" else 1024
    repeats = 8

    @jax.jit
    def product(a, b):
        return jax.lax.fori_loop(0, repeats, lambda _, c: ((c @ b) * (size**-0.5)).astype(c.dtype), a)

    a, b = (jax.random.normal(jax.random.key(seed), (size, size), jnp.bfloat16) for seed in range(2))
    return 2 * size**3 * repeats / median_s(lambda: product(a, b), 10) / 1e12
