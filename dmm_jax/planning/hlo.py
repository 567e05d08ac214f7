"""Reads a compiled program's text (`compiled.as_text()`): its computations, their instructions, shapes and bytes."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

_HEADER = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?(\S+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|body|to_apply|branch_computations)=\{?%?([\w.\-]+(?:, ?%[\w.\-]+)*)\}?")
_LOOP_BODY = re.compile(r"body=%?([\w.\-]+)")
_TRIP_COUNT = re.compile(r'known_trip_count"?[:=]\{"?n"?:"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str  # "f32[2,3]{1,0}", or "(f32[2], s32[])" for several results.
    opcode: str
    text: str  # Everything after the parenthesis that opens the operands.
    is_root: bool

    @property
    def num_bytes(self) -> int:
        """Returns the bytes of all results."""
        return int(sum(array_bytes(self.shape)))

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Returns the names of the operands."""
        depth, end = 1, len(self.text)
        for place, character in enumerate(self.text):
            depth += (character == "(") - (character == ")")
            if not depth:
                end = place
                break
        return tuple(_OPERAND.findall(self.text[:end]))

    @property
    def called(self) -> list[str]:
        """Returns the names of the computations that the instruction calls."""
        return [name for names in _CALLED.findall(self.text) for name in re.split(r", ?", names.replace("%", ""))]


def array_bytes(shape: str) -> list[float]:
    """Returns the bytes of each array in a shape; "(f32[2]{0}, s4[3])" gives [8, 1.5]."""
    return [
        _itemsize(dtype) * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims in _ARRAY.findall(shape)
    ]


def _itemsize(dtype: str) -> float:
    bits = re.search(r"\d+", dtype)
    return {"pred": 1.0, "token": 0.0}.get(dtype, int(bits[0]) / 8 if bits else 0.0)


def computations(program: str) -> dict[str, list[Instruction]]:
    """Returns the instructions of each computation, by its name."""
    instructions: list[Instruction] = []
    by_computation = {}
    for line in program.splitlines():
        header, match = _HEADER.match(line), _INSTRUCTION.match(line)
        if header:
            by_computation[header[1]] = instructions = []
        elif match:
            root, name, shape, opcode, text = match.groups()
            instructions.append(Instruction(name, shape, opcode, text, bool(root)))
    return by_computation


def run_counts(computations: Mapping[str, Sequence[Instruction]]) -> dict[str, int]:
    """Returns how often one run of a program runs each computation; a loop of unknown length counts once."""
    callers: dict[str, tuple[str, int]] = {}
    for computation, instructions in computations.items():
        for instruction in instructions:
            trips = _TRIP_COUNT.search(instruction.text)
            body = _LOOP_BODY.search(instruction.text) if instruction.opcode == "while" else None
            for name in instruction.called:
                callers[name] = (computation, int(trips[1]) if trips and body and name == body[1] else 1)

    def count(name):
        if name not in callers:
            return 1
        caller, times = callers[name]
        return times * count(caller)

    return {name: count(name) for name in computations}
