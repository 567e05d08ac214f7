"""The bytes that each fusion of a compiled program reads and writes, read off its text: what its time is held against.

A kernel that computes little can be no quicker than the memory that it reads and writes.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
SIZES |= {"s64": 8, "u64": 8, "f64": 8}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?(\S+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")
_INDEX = re.compile(r"index=(\d+)")
_CALLED = re.compile(r"calls=%?([\w.\-]+)")
_PIECES = {"slice": 1, "dynamic-slice": 1, "dynamic-update-slice": 0}  # How often their result's bytes are read.


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    bytes: int  # Of its result, or results.
    opcode: str
    operands: tuple[str, ...]
    rest: str  # Of the line, from the first operand on.
    is_root: bool


def of_fusions(program: str) -> dict[str, int]:
    """Returns the bytes read and written by each fusion of a program (`compiled.as_text()`), by its name.

    Of what a fusion only takes slices of, the slices count; of what it updates in place, the update; an array that
    comes under two names, such as behind barriers, once.
    """
    computations, found = _computations(program), {}
    for lines in computations.values():
        by_name = {one.name: one for one in lines}
        for one in (one for one in lines if one.opcode == "fusion"):
            inside = computations[_CALLED.search(one.rest)[1]]
            read: dict[str, int] = {}
            for operand, size in zip(one.operands, _read(inside), strict=True):
                source = _source(operand, by_name)
                read[source] = max(read.get(source, 0), size)
            found[one.name] = sum(read.values()) + _written(inside)
    return found


def _source(name: str, by_name: Mapping[str, Instruction]) -> str:
    """Follows a name through tuples to what was computed."""
    one = by_name.get(name)
    while one and one.opcode == "get-tuple-element" and by_name[one.operands[0]].opcode == "tuple":
        name = by_name[one.operands[0]].operands[int(_INDEX.search(one.rest)[1])]
        one = by_name.get(name)
    return name


def table(kernels: Mapping[str, tuple[float, int]], program: str, rows: int = 30) -> str:
    """Lays out the fusions that take longest, with the bytes that they move and how fast.

    Args:
      kernels: {name with its number: (milliseconds, launches)} in one call, as `bench_profile.summed` gives them.
    """
    moved = {name.replace(".", "_"): size for name, size in of_fusions(program).items()}  # As kernels are named.
    known = [(name, time, count, count * moved[name]) for name, (time, count) in kernels.items() if name in moved]
    times, sizes = sum(time for _, time, *_ in known), sum(size for *_, size in known)
    lines = [f"{times:10.2f} ms {sizes / 1e9:8.2f} GB {_speed(sizes, times)} in fusions, and in the longest of them"]
    for name, time, count, size in known[:rows]:
        lines.append(f"{time:10.3f} ms {size / 1e9:8.3f} GB {_speed(size, time)} {count:5d} x {name}")
    return "\n".join(lines)


def _speed(size, milliseconds):
    return f"{size / milliseconds / 1e9:6.2f} TB/s" if milliseconds else f"{'':11}"


def _computations(program: str) -> dict[str, list[Instruction]]:
    found, here = {}, []
    for line in program.splitlines():
        header, match = _COMPUTATION.match(line), _INSTRUCTION.match(line)
        if header:
            here = found[header[1]] = []
        elif match:
            root, name, shape, opcode, rest = match.groups()
            operands = tuple(_OPERAND.findall(rest[: _closing(rest)]))
            here.append(Instruction(name, _bytes(shape), opcode, operands, rest, bool(root)))
    return found


def _closing(text: str) -> int:
    """Returns where the parenthesis is closed that was opened before `text`."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return place
    return len(text)


def _bytes(shape: str) -> int:
    return sum(
        SIZES.get(kind, 4) * math.prod(map(int, filter(None, dims.split(",")))) for kind, dims in _SHAPE.findall(shape)
    )


def _read(inside: Sequence[Instruction]) -> Iterator[int]:
    """Yields the bytes read of each parameter, in their order."""
    users = collections.defaultdict(list)
    for one in inside:
        for operand in dict.fromkeys(one.operands):
            users[operand].append(one)

    def seen(value):
        for user in users[value.name]:
            yield from seen(user) if user.opcode == "bitcast" else [(user, value)]

    parameters = [one for one in inside if one.opcode == "parameter"]
    for parameter in sorted(parameters, key=lambda one: int(one.rest.split(")")[0])):
        uses = list(seen(parameter))
        if all(user.opcode in _PIECES and user.operands[0] == value.name for user, value in uses):
            yield sum(_PIECES[user.opcode] * user.bytes for user, _ in uses)
        else:
            yield parameter.bytes


def _written(inside: Sequence[Instruction]) -> int:
    by_name = {one.name: one for one in inside}

    def of(one):
        if one.opcode == "tuple":
            return sum(of(by_name[name]) for name in one.operands)
        if one.opcode == "bitcast":
            return of(by_name[one.operands[0]])
        return by_name[one.operands[1]].bytes if one.opcode == "dynamic-update-slice" else one.bytes

    return of(next(one for one in inside if one.is_root))
