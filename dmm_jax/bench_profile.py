"""Where the device's time goes: the kernels of a few calls, summed by name, from JAX's own profiler."""

import collections
import gzip
import json
import pathlib
import re
from collections.abc import Callable

import jax

CALLS = 2


def profile(call: Callable, folder: str | pathlib.Path) -> dict[str, tuple[float, int]]:
    """Traces `CALLS` calls into `folder` (which TensorBoard and Perfetto open) and sums the kernels up.

    Returns:
      {kernel's name without its number: (milliseconds a call, launches a call)}, the longest first.
    """
    with jax.profiler.trace(str(folder), create_perfetto_trace=True):
        for _ in range(CALLS):
            jax.block_until_ready(call())
    traces = sorted(pathlib.Path(folder).rglob("perfetto_trace.json.gz"))
    with gzip.open(traces[-1], "rt") as file:
        return summed(json.load(file)["traceEvents"])


def summed(events: list[dict]) -> dict[str, tuple[float, int]]:
    """Sums a trace's kernels by name; only what ran on a device's streams counts."""
    processes = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
    threads = {
        (event["pid"], event["tid"]): event["args"]["name"] for event in events if event.get("name") == "thread_name"
    }
    sums = collections.defaultdict(lambda: [0.0, 0])
    for event in events:
        where = processes.get(event.get("pid"), ""), threads.get((event.get("pid"), event.get("tid")), "")
        if event.get("ph") == "X" and "device:" in where[0] and where[1].startswith("Stream"):
            one = sums[plain(event["name"])]
            one[0] += event["dur"] / 1e3 / CALLS
            one[1] += 1
    ordered = sorted(sums.items(), key=lambda item: -item[1][0])
    return {name: (total, count // CALLS) for name, (total, count) in ordered}


def plain(name: str) -> str:
    """Takes the numbers off a kernel's name that tell one instance from the next: `loop_fusion_12` -> `loop_fusion`."""
    return re.sub(r"(_\d+)+$", "", name)


def table(kernels: dict[str, tuple[float, int]], rows: int = 40) -> str:
    """Lays the longest kernels out for people."""
    total = sum(time for time, _ in kernels.values())
    lines = [f"{total:10.2f} ms of kernels a call"]
    for name, (time, count) in list(kernels.items())[:rows]:
        lines.append(f"{time:10.2f} ms {100 * time / total:5.1f} % {count:6d} x {name[:110]}")
    return "\n".join(lines)
