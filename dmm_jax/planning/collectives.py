"""What a step sends between devices: read from a compiled program, or predicted from where the parameters are."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from dmm_jax.planning import hlo
from dmm_jax.runtime import sharding

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_TRANSFER_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_LISTED_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}")
_COUNTED_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_SCOPE = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices."""

    name: str  # The instruction in the program, or the parameter.
    kind: str
    axes: tuple[str, ...]  # The mesh axes along which it runs.
    group: int  # Devices that exchange with each other.
    bytes: int  # The whole array: the result of an all-gather, the operand of a reduce-scatter.
    count: int = 1  # Runs per step.
    scope: str = ""  # The place in the source, if the compiler keeps it.

    @property
    def sent(self) -> float:
        """Returns the bytes per step that each device sends in a ring."""
        share = (self.group - 1) / max(self.group, 1)
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return factor * self.bytes * self.count


def read(program: str, mesh_shape: Mapping[str, int], slice_size: int = 0) -> list[Collective]:
    """Returns the collectives of a compiled program (`compiled.as_text()`).

    Args:
      mesh_shape: the sizes of the mesh's axes, in order; the program numbers its devices along them.
      slice_size: devices per TPU slice, if there are several slices.
    """
    computations = hlo.computations(program)
    counts = hlo.run_counts(computations)
    collectives = []
    for computation, instructions in computations.items():
        for instruction in instructions:
            if instruction.opcode.removesuffix("-start") in KINDS:
                collective = _within_slice(instruction, computation, mesh_shape)
            elif instruction.opcode == "send" and (match := _TRANSFER_BETWEEN_SLICES.search(instruction.text)):
                kind = match[1].lower().replace("_", "-")
                collective = _between_slices(instruction, kind, mesh_shape, slice_size)
            else:
                continue
            if collective.group > 1:
                collectives.append(dataclasses.replace(collective, count=counts[computation]))
    return collectives


def _within_slice(instruction: hlo.Instruction, computation: str, mesh_shape) -> Collective:
    kind = instruction.opcode.removesuffix("-start")
    groups = _groups(instruction.text, math.prod(mesh_shape.values()))
    size = len(groups[0]) if kind != "collective-permute" else 2
    num_bytes = instruction.num_bytes
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        num_bytes = int(max(hlo.array_bytes(instruction.shape)))  # The shape lists operands, results and contexts.
    if kind == "reduce-scatter":
        num_bytes *= size
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # The TPU compiler fuses an all-reduce with the slice that a device keeps.
    scope = _SCOPE.search(instruction.text)
    return Collective(
        instruction.name, kind, _axes(groups, mesh_shape), size, num_bytes, scope=scope[1] if scope else ""
    )


def _between_slices(instruction: hlo.Instruction, kind: str, mesh_shape, slice_size: int) -> Collective:
    num_devices = math.prod(mesh_shape.values())
    groups = [list(range(first, num_devices, slice_size)) for first in range(slice_size)]
    num_bytes = int(hlo.array_bytes(instruction.shape)[0])
    return Collective(instruction.name, kind, _axes(groups, mesh_shape), len(groups[0]), num_bytes)


def _groups(text: str, num_devices: int) -> list[list[int]]:
    """Reads the groups of devices, written as {{0,1},{2,3}} or [2,2]<=[2,2]T(1,0)."""
    listed, counted = _LISTED_GROUPS.search(text), _COUNTED_GROUPS.search(text)
    if listed:
        return [_integers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if counted:
        shape, dims, order = (_integers(part or "") for part in counted.groups())
        devices = np.arange(math.prod(dims)).reshape(dims)
        return (devices.transpose(order) if order else devices).reshape(shape).tolist()
    return [list(range(num_devices))]


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _axes(groups, mesh_shape) -> tuple[str, ...]:
    """Returns the axes along which the devices of a group differ."""
    places = [np.unravel_index(group, tuple(mesh_shape.values())) for group in groups]
    return tuple(axis for k, axis in enumerate(mesh_shape) if any(len(set(place[k])) > 1 for place in places))


def predict(params, mesh_shape: Mapping[str, int], dtype, gradient_accumulation: int = 1) -> list[Collective]:
    """Returns the collectives that a step requests: parameters gathered, gradients scattered, copies summed.

    Args:
      params: the trained parameters, as shapes with shardings.
      dtype: of the kernels while they travel.
    """
    collectives = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, dims = jax.tree_util.keystr(path, simple=True, separator="."), sharding.divided_dims(leaf.sharding.spec)
        gathered_dtype = np.dtype(dtype) if path[-1].key == "kernel" else np.dtype(np.float32)
        size = math.prod(leaf.sharding.shard_shape(leaf.shape))
        copied = tuple(axis for axis in sharding.AXES if axis not in dims and mesh_shape[axis] > 1)
        if copied:
            group = math.prod(mesh_shape[axis] for axis in copied)
            collectives.append(Collective(name, "all-reduce", copied, group, size * 4))
        for axis in (axis for axis in sharding.AXES if axis in dims):
            size *= mesh_shape[axis]
            count, summed_dtype = (
                (gradient_accumulation, gathered_dtype) if axis == "fsdp" else (1, np.dtype(np.float32))
            )
            for kind, travelling in (("all-gather", gathered_dtype), ("reduce-scatter", summed_dtype)):
                num_bytes = size * travelling.itemsize
                collectives.append(Collective(name, kind, (axis,), mesh_shape[axis], num_bytes, count))
    return collectives


def repeated(collectives: Sequence[Collective], times: int) -> list[Collective]:
    """Returns the collectives of a program that runs several times per step."""
    return [dataclasses.replace(collective, count=collective.count * times) for collective in collectives]


def summary(collectives: Sequence[Collective]) -> list[dict]:
    """Returns one row per kind and axes: {"kind", "axes", "count", "gb"}, the most bytes first."""
    rows: dict = {}
    for collective in collectives:
        row = rows.setdefault((collective.kind, collective.axes), {"count": 0, "bytes": 0})
        row["count"] += collective.count
        row["bytes"] += collective.bytes * collective.count
    ordered = sorted(rows.items(), key=lambda item: -item[1]["bytes"])
    return [
        {"kind": kind, "axes": "+".join(axes), "count": row["count"], "gb": row["bytes"] / 2**30}
        for (kind, axes), row in ordered
    ]


@functools.lru_cache(maxsize=256)
def widest_group(axes: tuple[str, ...], sizes: tuple[tuple[str, int], ...], domain_size: int) -> tuple[int, ...]:
    """Returns a group of devices along `axes`, by their numbers along the mesh: the one that spans most link domains.

    Args:
      sizes: (axis, devices along it), in the mesh's order.
      domain_size: consecutive devices that links join, as in `devices.Topology`.
    """
    shape = [size for _, size in sizes]
    along = [k for k, (axis, _) in enumerate(sizes) if axis in axes]
    numbers = np.moveaxis(np.arange(math.prod(shape)).reshape(shape), along, range(-len(along), 0))
    groups = numbers.reshape(-1, math.prod(shape[k] for k in along))
    spanned = [len(np.unique(group // domain_size)) for group in groups]
    return tuple(groups[int(np.argmax(spanned))].tolist())
