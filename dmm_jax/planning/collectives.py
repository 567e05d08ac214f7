"""What a step sends between devices: read off a compiled program's text, or foretold from where its arrays live."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from dmm_jax.runtime import sharding

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*\) -> .*\{$")
_OPERATION = re.compile(rf"^\s*(?:ROOT )?%?(\S+) = (.+?) ({'|'.join(KINDS)})(-start)?\((.*)$")
_BETWEEN_SLICES = re.compile(r'^\s*%?(\S+) = \((\w+\[[\d,]*\]).* send\(.*_xla_megascale_transfer_type="(\w+)"')
_LOOP = re.compile(r" while\(.*body=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?[:=]\{"?n"?:"?(\d+)')
_CALLED = re.compile(r"(?:calls|body|to_apply|branch_computations)=\{?%?([\w.\-]+(?:, ?%[\w.\-]+)*)\}?")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}")
_COUNTED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_SCOPE = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices."""

    name: str  # Of the operation in the program.
    kind: str
    axes: tuple[str, ...]  # Of the mesh, along which it runs.
    group: int  # Devices that take part together.
    bytes: int  # Of the whole array: the result of an all-gather, the operand of a reduce-scatter.
    count: int = 1  # How often a step runs it.
    scope: str = ""  # Where in the source it comes from, if the compiler kept it.

    @property
    def sent(self) -> float:
        """Returns the bytes that each device sends in a ring, over all the times it runs."""
        share = (self.group - 1) / max(self.group, 1)
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return factor * self.bytes * self.count


def parse(program: str, mesh_shape: Mapping[str, int], linked: int = 0) -> list[Collective]:
    """Reads the collectives of a compiled program (`compiled.as_text()`).

    Args:
      mesh_shape: the sizes of the mesh's axes, in order; the program's devices are numbered along it.
      linked: devices of a TPU slice, where there are several: what goes between slices is told another way.
    """
    runs, found, computation = _runs(program), [], ""
    for line in program.splitlines():
        header = _COMPUTATION.match(line)
        computation = header[1] if header else computation
        match, between = _OPERATION.match(line), _BETWEEN_SLICES.match(line)
        if between:
            name, shape, kind = between.groups()
            across = [list(range(first, math.prod(mesh_shape.values()), linked)) for first in range(linked)]
            size, axes, kind = len(across[0]), _axes(across, mesh_shape), kind.lower().replace("_", "-")
            found.append(Collective(name, kind, axes, size, _bytes(shape, kind, False), runs.get(computation, 1)))
        if not match:
            continue
        name, shape, kind, start, rest = match.groups()
        groups = _groups(rest, math.prod(mesh_shape.values()))
        size, whole = len(groups[0]) if kind != "collective-permute" else 2, _bytes(shape, kind, bool(start))
        if kind == "reduce-scatter":
            whole *= size
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # The TPU compiler's fusion of an all-reduce with the slice that is kept.
        axes, scope = _axes(groups, mesh_shape), _SCOPE.search(rest)
        if size > 1:
            count = runs.get(computation, 1)
            found.append(Collective(name, kind, axes, size, whole, count, scope[1] if scope else ""))
    return found


def _runs(program: str) -> dict[str, int]:
    """Returns how often each computation runs: bodies of loops whose length is known, and what they call."""
    callers: dict[str, tuple[str, int]] = {}
    computation = ""
    for line in program.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            computation = header[1]
            continue
        loop, trips = _LOOP.search(line), _TRIPS.search(line)
        for called in _CALLED.findall(line):
            for name in called.replace("%", "").replace(" ", "").split(","):
                times = int(trips[1]) if loop and trips and name == loop[1] else 1
                callers[name] = (computation, times)
    runs = {}
    for name in callers:
        count, at = 1, name
        while at in callers:
            at, times = callers[at]
            count *= times
        runs[name] = count
    return runs


def _bytes(shape: str, kind: str, started: bool) -> int:
    sizes = [
        _itemsize(dtype) * math.prod(int(dim) for dim in dims.split(",") if dim)
        for dtype, dims in _SHAPE.findall(shape)
    ]
    if started and kind in ("all-gather", "collective-permute"):  # (operands, results, and what the hardware keeps)
        return int(max(sizes))
    return int(sum(sizes))


def _itemsize(dtype: str) -> float:
    bits = re.search(r"\d+", dtype)
    return {"pred": 1, "token": 0}.get(dtype, int(bits[0]) / 8 if bits else 0)


def _groups(text: str, num_devices: int) -> list[list[int]]:
    """Reads the groups of devices: {{0,1},{2,3}}, or [2,2]<=[2,2]T(1,0)."""
    listed, counted = _LISTED.search(text), _COUNTED.search(text)
    if listed:
        return [[int(one) for one in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if counted:
        shape, dims, order = ([int(one) for one in (part or "").split(",") if one] for part in counted.groups())
        devices = np.arange(math.prod(dims)).reshape(dims)
        return (devices.transpose(order) if order else devices).reshape(shape).tolist()
    return [list(range(num_devices))]


def _axes(groups, mesh_shape) -> tuple[str, ...]:
    """Returns the axes along which the devices of a group differ."""
    places = [np.unravel_index(group, tuple(mesh_shape.values())) for group in groups]
    return tuple(axis for k, axis in enumerate(mesh_shape) if any(len(set(place[k])) > 1 for place in places))


def foretell(params, mesh_shape: Mapping[str, int], dtype, gradient_accumulation: int = 1) -> list[Collective]:
    """Returns what the step asks for: kernels gathered and their gradients scattered, shards summed over the rest.

    Args:
      params: the student's, as shapes with shardings.
      dtype: in which kernels travel.
    """
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, dims = jax.tree_util.keystr(path, simple=True, separator="."), sharding.divided_dims(leaf.sharding.spec)
        travels = np.dtype(dtype) if path[-1].key == "kernel" else np.dtype(np.float32)
        size = math.prod(leaf.sharding.shard_shape(leaf.shape))
        rest = tuple(axis for axis in sharding.AXES if axis not in dims and mesh_shape[axis] > 1)
        if rest:
            found.append(Collective(name, "all-reduce", rest, math.prod(mesh_shape[axis] for axis in rest), size * 4))
        for axis in (axis for axis in sharding.AXES if axis in dims):
            size *= mesh_shape[axis]
            often, summed = (gradient_accumulation, travels) if axis == "fsdp" else (1, np.dtype(np.float32))
            for kind, one in (("all-gather", travels), ("reduce-scatter", summed)):
                found.append(Collective(name, kind, (axis,), mesh_shape[axis], size * one.itemsize, often))
    return found


def summary(collectives: Sequence[Collective]) -> list[dict]:
    """Returns one row per kind and axes: {"kind", "axes", "count", "gb"}, the most bytes first."""
    rows: dict = {}
    for one in collectives:
        row = rows.setdefault((one.kind, one.axes), {"count": 0, "bytes": 0})
        row["count"] += one.count
        row["bytes"] += one.bytes * one.count
    ordered = sorted(rows.items(), key=lambda item: -item[1]["bytes"])
    return [
        {"kind": kind, "axes": "+".join(axes), "count": row["count"], "gb": row["bytes"] / 2**30}
        for (kind, axes), row in ordered
    ]


@functools.lru_cache(maxsize=256)
def widest_group(axes: tuple[str, ...], sizes: tuple[tuple[str, int], ...], linked: int) -> tuple[int, ...]:
    """Returns the devices, numbered along the mesh, of a group that runs along `axes`: one that lies at most places.

    Args:
      sizes: (axis, devices along it), in the mesh's order.
      linked: how many devices, one after the other, lie at one place.
    """
    shape = [size for _, size in sizes]
    along = [k for k, (axis, _) in enumerate(sizes) if axis in axes]
    numbers = np.moveaxis(np.arange(math.prod(shape)).reshape(shape), along, range(-len(along), 0))
    groups = numbers.reshape(-1, math.prod(shape[k] for k in along))
    places = [len(np.unique(group // linked)) for group in groups]
    return tuple(groups[int(np.argmax(places))].tolist())
