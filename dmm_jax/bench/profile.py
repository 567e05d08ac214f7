"""Where the device's time goes: the kernels of a few calls, summed by name, and what of them are collectives.

Read from JAX's own profiler: kernels on the streams of GPUs, operations of TPUs. CPUs tell neither.
"""

import collections
import dataclasses
import gzip
import json
import pathlib
import re
import statistics
from collections.abc import Callable, Iterable, Iterator

import jax

CALLS = 2
# Operations that exchange data between devices: NCCL's kernels, XLA's own, and a TPU's, by name.
COLLECTIVE = re.compile(
    r"nccl|all[-_]?(?:reduce|gather|to[-_]?all)|reduce[-_]?scatter|collective[-_]?(?:permute|broadcast)", re.IGNORECASE
)
_AROUND = re.compile(r"(?:while|conditional|call)(?:$|[.\d])")  # A TPU's line holds these over what runs inside.
_ASYNC = "Async XLA Ops"


@dataclasses.dataclass(frozen=True)
class Ran:
    """One kernel or operation, in microseconds of the trace."""

    device: str
    name: str
    start: float
    end: float
    background: bool  # On a TPU's line of transfers, which run beside its operations.


def profile(call: Callable, folder: str | pathlib.Path) -> list[Ran]:
    """Traces `CALLS` calls into `folder`, which TensorBoard and Perfetto open; returns what ran on the devices."""
    with jax.profiler.trace(str(folder), create_perfetto_trace=True):
        for _ in range(CALLS):
            jax.block_until_ready(call())
    traces = sorted(pathlib.Path(folder).rglob("perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
    with gzip.open(traces[-1], "rt") as file:
        return list(on_devices(json.load(file)["traceEvents"]))


def on_devices(events: list[dict]) -> Iterator[Ran]:
    """Yields what a trace says to have run on a GPU's streams or as a TPU's operations; nothing of a host's."""
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
            and not _AROUND.match(event["name"])
        ):
            start = float(event["ts"])
            yield Ran(device, event["name"], start, start + event["dur"], line == _ASYNC)


def plain(name: str) -> str:
    """Takes the numbers off a kernel's name that tell one instance from the next: `loop_fusion_12` -> `loop_fusion`."""
    return re.sub(r"([_.]\d+)+$", "", name)


def summed(ran: Iterable[Ran], called: Callable[[str], str] = plain) -> dict[str, tuple[float, int]]:
    """Sums kernels up by name.

    Args:
      called: what is made of a kernel's name; `str`: each by its own.

    Returns:
      {name: (milliseconds, launches)} of one device in one call, the mean over both; the longest first.
    """
    ran = [one for one in ran if not one.background]
    parts = CALLS * len({one.device for one in ran})
    sums = collections.defaultdict(lambda: [0.0, 0])
    for one in ran:
        sums[called(one.name)][0] += (one.end - one.start) / 1e3
        sums[called(one.name)][1] += 1
    ordered = sorted(sums.items(), key=lambda item: -item[1][0])
    return {name: (total / parts, round(count / parts)) for name, (total, count) in ordered}


def collective_shares(ran: Iterable[Ran]) -> dict[str, float]:
    """Returns which part of a device's time collectives run, and run alone: means over the devices, {} without any.

    "collective_share" is their time, waiting for the slowest device included, over the time from the first kernel's
    start to the last one's end; "exposed_collective_share" is the part of it in which nothing else runs there.
    """
    by_device = collections.defaultdict(list)
    for one in ran:
        by_device[one.device].append(one)
    shares = []
    for there in by_device.values():
        exchanging = [one for one in there if COLLECTIVE.search(one.name)]
        computing = [one for one in there if not (one.background or COLLECTIVE.search(one.name))]
        both, busy = _covered(exchanging + computing), _covered(computing)
        span = max(one.end for one in there) - min(one.start for one in there)
        shares.append((_covered(exchanging) / span, (both - busy) / span))
    names = ("collective_share", "exposed_collective_share")
    return {name: statistics.mean(column) for name, column in zip(names, zip(*shares, strict=True), strict=False)}


def _covered(ran: Iterable[Ran]) -> float:
    """Returns how long at least one of them runs."""
    total, until = 0.0, float("-inf")
    for one in sorted(ran, key=lambda one: one.start):
        total += max(one.end - max(one.start, until), 0.0)
        until = max(until, one.end)
    return total


def table(kernels: dict[str, tuple[float, int]], rows: int = 40) -> str:
    """Lays the longest kernels out for people."""
    total = sum(time for time, _ in kernels.values())
    launches = sum(count for _, count in kernels.values())
    lines = [f"{total:10.2f} ms of kernels a call and device, {launches} launches"]
    for name, (time, count) in list(kernels.items())[:rows]:
        lines.append(f"{time:10.2f} ms {100 * time / total:5.1f} % {count:6d} x {name[:110]}")
    return "\n".join(lines)
