"""The device's time by kernel, and the share of collectives in it, from a trace of a few calls.

JAX's own profiler records kernels on the streams of GPUs and operations of TPUs; it records neither on a CPU.
"""

import collections
import dataclasses
import gzip
import json
import pathlib
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator

import jax

from dmm_jax.bench import traffic

CALLS = 2
# Operations that exchange data between devices: NCCL's kernels, XLA's own, and a TPU's, by name.
COLLECTIVE = re.compile(
    r"nccl|all[-_]?(?:reduce|gather|to[-_]?all)|reduce[-_]?scatter|collective[-_]?(?:permute|broadcast)", re.IGNORECASE
)
_ENCLOSING = re.compile(r"(?:while|conditional|call)(?:$|[.\d])")  # A TPU records these around the operations inside.
_ASYNC = "Async XLA Ops"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One run of a kernel or operation, in microseconds of the trace."""

    device: str
    name: str
    start: float
    end: float
    background: bool  # A TPU's transfer, which runs at the same time as operations.

    @property
    def is_collective(self) -> bool:
        """Returns whether the kernel exchanges data between devices."""
        return bool(COLLECTIVE.search(self.name))


def report(call: Callable, folder: str | pathlib.Path, program: str = "") -> list[Kernel]:
    """Traces calls into `folder` and prints their kernels on stderr; does nothing if `folder` is "".

    Args:
      program: the compiled program's text, if nothing else runs: the traffic of its fusions is printed as well.
    """
    if not folder:
        return []
    kernels = trace(call, folder)
    if kernels:
        print(table(time_by_name(kernels)), file=sys.stderr)
        if program:
            print(traffic.table(time_by_name(kernels, str), program), file=sys.stderr)
    else:
        print(f"{folder} holds the trace, which has no kernels of a device: a CPU records none.", file=sys.stderr)
    return kernels


def trace(call: Callable, folder: str | pathlib.Path) -> list[Kernel]:
    """Traces `CALLS` calls into `folder`, which TensorBoard and Perfetto open; returns the devices' kernels."""
    with jax.profiler.trace(str(folder), create_perfetto_trace=True):
        for _ in range(CALLS):
            jax.block_until_ready(call())
    traces = sorted(pathlib.Path(folder).rglob("perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
    with gzip.open(traces[-1], "rt") as file:
        return list(device_kernels(json.load(file)["traceEvents"]))


def device_kernels(events: list[dict]) -> Iterator[Kernel]:
    """Yields the kernels on a GPU's streams and the operations of a TPU in a trace; nothing of a host."""
    processes = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
    threads = {
        (event["pid"], event["tid"]): event["args"]["name"] for event in events if event.get("name") == "thread_name"
    }
    for event in events:
        device, line = processes.get(event.get("pid"), ""), threads.get((event.get("pid"), event.get("tid")), "")
        lines = ("XLA Ops", _ASYNC) if "device:TPU" in device else ("Stream",)
        if (
            event.get("ph") == "X"
            and "device:" in device
            and line.startswith(lines)
            and not _ENCLOSING.match(event["name"])
        ):
            start = float(event["ts"])
            yield Kernel(device, event["name"], start, start + event["dur"], line == _ASYNC)


def without_number(name: str) -> str:
    """Removes the numbers that tell instances of a kernel apart: `loop_fusion_12` -> `loop_fusion`."""
    return re.sub(r"([_.]\d+)+$", "", name)


def time_by_name(
    kernels: Iterable[Kernel], rename: Callable[[str], str] = without_number
) -> dict[str, tuple[float, int]]:
    """Returns {name: (milliseconds, launches)} per call and device, the longest first.

    Args:
      rename: maps a kernel's name to the name under which it is summed; `str` keeps every kernel apart.
    """
    kernels = [kernel for kernel in kernels if not kernel.background]
    parts = CALLS * len({kernel.device for kernel in kernels})
    sums = collections.defaultdict(lambda: [0.0, 0])
    for kernel in kernels:
        sums[rename(kernel.name)][0] += (kernel.end - kernel.start) / 1e3
        sums[rename(kernel.name)][1] += 1
    ordered = sorted(sums.items(), key=lambda item: -item[1][0])
    return {name: (total / parts, round(count / parts)) for name, (total, count) in ordered}


def collective_shares(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Returns the shares of a device's time in which collectives run, and run alone; {} without kernels.

    "collective_share" is their time, waiting for the slowest device included, over the time from the first kernel's
    start to the last one's end. "exposed_collective_share" counts only the time in which nothing else runs on the
    device. Both are means over the devices.
    """
    by_device = collections.defaultdict(list)
    for kernel in kernels:
        by_device[kernel.device].append(kernel)
    shares = []
    for on_device in by_device.values():
        exchanging = [kernel for kernel in on_device if kernel.is_collective]
        computing = [kernel for kernel in on_device if not (kernel.background or kernel.is_collective)]
        both, busy = _covered(exchanging + computing), _covered(computing)
        span = max(kernel.end for kernel in on_device) - min(kernel.start for kernel in on_device)
        shares.append((_covered(exchanging) / span, (both - busy) / span))
    names = ("collective_share", "exposed_collective_share")
    return {name: statistics.mean(column) for name, column in zip(names, zip(*shares, strict=True), strict=False)}


def _covered(kernels: Iterable[Kernel]) -> float:
    """Returns the time in which at least one kernel runs."""
    total, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        total += max(kernel.end - max(kernel.start, until), 0.0)
        until = max(until, kernel.end)
    return total


def table(times: dict[str, tuple[float, int]], num_rows: int = 40) -> str:
    """Returns a table of the longest kernels."""
    total = sum(time for time, _ in times.values())
    launches = sum(count for _, count in times.values())
    lines = [f"{total:10.2f} ms of kernels per call and device, {launches} launches"]
    for name, (time, count) in list(times.items())[:num_rows]:
        lines.append(f"{time:10.2f} ms {100 * time / total:5.1f} % {count:6d} x {name[:110]}")
    return "\n".join(lines)
