"""Counts the bytes that each fusion of a compiled program reads and writes, and its speed."""

import collections
import re
from collections.abc import Iterator, Mapping, Sequence

from dmm_jax.planning import hlo
from dmm_jax.planning.hlo import Instruction

_TUPLE_INDEX = re.compile(r"index=(\d+)")
_PARTIAL_READS = {"slice": 1, "dynamic-slice": 1, "dynamic-update-slice": 0}  # {opcode: reads of its result's bytes}.


def fusion_bytes(program: str) -> dict[str, int]:
    """Returns the bytes that each fusion of a program (`compiled.as_text()`) reads and writes, by its name.

    A sliced operand counts as its slices, an operand that is updated in place as the update. An array under two names,
    for example after a barrier, counts once.
    """
    computations, moved = hlo.computations(program), {}
    for instructions in computations.values():
        by_name = {instruction.name: instruction for instruction in instructions}
        for fusion in (instruction for instruction in instructions if instruction.opcode == "fusion"):
            body = computations[fusion.called[0]]
            read: dict[str, int] = {}
            for operand, size in zip(fusion.operands, _read_bytes(body), strict=True):
                source = _source(operand, by_name)
                read[source] = max(read.get(source, 0), size)
            moved[fusion.name] = sum(read.values()) + _written_bytes(body)
    return moved


def _source(name: str, by_name: Mapping[str, Instruction]) -> str:
    """Follows a name through tuples to the computed array."""
    while (element := by_name.get(name)) and element.opcode == "get-tuple-element":
        source = by_name[element.operands[0]]
        if source.opcode != "tuple":
            break
        name = source.operands[int(_TUPLE_INDEX.search(element.text)[1])]
    return name


def _read_bytes(body: Sequence[Instruction]) -> Iterator[int]:
    """Yields the bytes read of each parameter, in their order."""
    users = collections.defaultdict(list)
    for instruction in body:
        for operand in dict.fromkeys(instruction.operands):
            users[operand].append(instruction)

    def uses(value):
        """Yields (user, used value), and follows values through bitcasts."""
        for user in users[value.name]:
            yield from uses(user) if user.opcode == "bitcast" else [(user, value)]

    parameters = [instruction for instruction in body if instruction.opcode == "parameter"]
    for parameter in sorted(parameters, key=lambda parameter: int(parameter.text.split(")")[0])):
        all_uses = list(uses(parameter))
        if all(user.opcode in _PARTIAL_READS and user.operands[0] == value.name for user, value in all_uses):
            yield sum(_PARTIAL_READS[user.opcode] * user.num_bytes for user, _ in all_uses)
        else:
            yield parameter.num_bytes


def _written_bytes(body: Sequence[Instruction]) -> int:
    by_name = {instruction.name: instruction for instruction in body}

    def written(value):
        if value.opcode == "tuple":
            return sum(written(by_name[name]) for name in value.operands)
        if value.opcode == "bitcast":
            return written(by_name[value.operands[0]])
        return by_name[value.operands[1]].num_bytes if value.opcode == "dynamic-update-slice" else value.num_bytes

    return written(next(instruction for instruction in body if instruction.is_root))


def table(kernels: Mapping[str, tuple[float, int]], program: str, num_rows: int = 30) -> str:
    """Returns a table of the fusions that take longest, with the bytes that they move and their speed.

    Args:
      kernels: {name with its number: (milliseconds, launches)} per call, from `profile.time_by_name`.
    """
    moved = {name.replace(".", "_"): size for name, size in fusion_bytes(program).items()}  # A kernel's form of a name.
    rows = [(name, time, count, count * moved[name]) for name, (time, count) in kernels.items() if name in moved]
    total_time, total_size = sum(time for _, time, *_ in rows), sum(size for *_, size in rows)
    speed = _speed(total_size, total_time)
    lines = [f"{total_time:10.2f} ms {total_size / 1e9:8.2f} GB {speed} in fusions, and in the longest of them"]
    for name, time, count, size in rows[:num_rows]:
        lines.append(f"{time:10.3f} ms {size / 1e9:8.3f} GB {_speed(size, time)} {count:5d} x {name}")
    return "\n".join(lines)


def _speed(size, milliseconds):
    return f"{size / milliseconds / 1e9:6.2f} TB/s" if milliseconds else f"{'':11}"
