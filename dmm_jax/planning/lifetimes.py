"""What a traced program holds at its fullest moment, and moves: estimated on its jaxpr, so that no compiler is asked.

Inside a `shard_map` the shapes are one device's, so the bytes are too.
"""

import dataclasses
import functools
from collections.abc import Hashable

import numpy as np
from jax.extend import core

from dmm_jax.planning import flops

# Results that XLA computes inside the operation that reads them, and so never writes to memory.
FUSED = frozenset(
    "abs add add_any and bitcast_convert_type broadcast_in_dim ceil clamp convert_element_type copy copy_p cos div eq "
    "erf erfc erf_inv exp exp2 expm1 floor ge gt integer_pow iota is_finite le log log1p logistic lt max min mul ne "
    "neg not or pad pcast pow pvary random_bits random_wrap random_unwrap rem reshape rev round rsqrt select_n "
    "shift_left shift_right_arithmetic shift_right_logical sign sin slice split sqrt square squeeze stop_gradient sub "
    "tanh threefry2x32 transpose unstack xor".split()
)

RENAMED = frozenset(
    "copy copy_p optimization_barrier pcast pvary reshape squeeze stop_gradient transpose".split()
)  # Other views of values.
PRODUCTS = frozenset("conv_general_dilated dot_general pallas_call".split())  # Their operands are written before.
BODIES = frozenset("checkpoint cond pallas_call remat remat2 scan while".split())  # Run apart from what is around them.


def temporaries(jaxpr: core.Jaxpr) -> int:
    """Estimates the bytes that a program holds at its fullest moment, its arguments not counted.

    A value lives from where it is computed to where it is last read. Chains of elementwise operations are held as their
    inputs, as a compiler that fuses them would, until a product or a kernel reads them: then they are written. In what
    order a compiler works, and what it pads, is not known here. What a kernel's arguments are padded with, and what
    is cut from its results at once, as to the lanes of a TPU, is not held.
    """
    schedule = _Schedule.of(jaxpr)
    change = [0] * (len(schedule.operations) + 2)
    for value, (number, size) in schedule.born.items():
        change[number] += size
        change[schedule.last_read.get(value, number) + 1] -= size
    held, peak = 0, 0
    for operation, more in zip(schedule.operations, change, strict=False):
        held += more
        inner = max((temporaries(body) for body in operation.bodies), default=0)
        peak = max(peak, held + inner)
    return peak


def traffic(jaxpr: core.Jaxpr) -> float:
    """Estimates the bytes that a program reads from and writes to memory: what is written as in `temporaries`.

    Each is written once, and read by every operation, or fused chain of them, that needs it.
    """
    schedule = _Schedule.of(jaxpr)
    sizes = {value: size for value, (_, size) in schedule.born.items()} | schedule.arguments
    moved = float(sum(size for _, size in schedule.born.values()))
    for operation, read in zip(schedule.operations, schedule.reads, strict=True):
        if operation.bodies:
            moved += operation.times * max(traffic(body) for body in operation.bodies)
        else:
            moved += sum(sizes.get(value, 0) for value in read)
    return moved


@dataclasses.dataclass(frozen=True)
class _Operation:
    name: str
    inputs: list[Hashable]
    outputs: list[tuple[Hashable, int]]  # With their bytes.
    bodies: list[core.Jaxpr]  # That work beside what is held around them.
    times: int = 1  # How often they run.


@dataclasses.dataclass
class _Schedule:
    """A program's operations in order, and of the values that are written: when, how large, and until when read."""

    arguments: dict[Hashable, int]
    operations: list[_Operation] = dataclasses.field(default_factory=list)
    reads: list[frozenset] = dataclasses.field(default_factory=list)  # Of each operation.
    born: dict[Hashable, tuple[int, int]] = dataclasses.field(default_factory=dict)  # Number of the operation, bytes.
    last_read: dict[Hashable, int] = dataclasses.field(default_factory=dict)
    stand_for: dict[Hashable, frozenset] = dataclasses.field(default_factory=dict)  # A fused value: what it is held as.

    @classmethod
    def of(cls, jaxpr: core.Jaxpr) -> "_Schedule":
        """Goes through a program once, in its own order."""
        arguments, operations, results = _flattened(jaxpr)
        names, operations = _without_views(operations)
        more, operations = _without_views(_without_padding(operations))
        names = {name: more.get(value, value) for name, value in names.items()} | more
        number_of_readers: dict[Hashable, int] = {}
        for operation in operations:
            for value in set(operation.inputs):
                number_of_readers[value] = number_of_readers.get(value, 0) + 1
        sizes = dict(arguments) | {value: size for operation in operations for value, size in operation.outputs}
        schedule = cls(dict(arguments))
        for operation in operations:
            schedule._add(operation, sizes, number_of_readers)
        for value in results:
            value = names.get(value, value)
            schedule.last_read |= dict.fromkeys(schedule._held(value), len(schedule.operations))
        return schedule

    def _held(self, value) -> frozenset:
        return self.stand_for.get(value, frozenset([value]))

    def _add(self, operation, sizes, number_of_readers):
        if operation.name in PRODUCTS:
            for value in dict.fromkeys(operation.inputs):
                if value in self.stand_for:
                    read = self.stand_for.pop(value)
                    self._write(_Operation("write", [value], [(value, sizes[value])], []), read)
        read = frozenset().union(*map(self._held, operation.inputs))
        largest = max((size for _, size in operation.outputs), default=0)
        # A sum of several large values that is read more than once, such as a residual stream, is written down.
        large = sum(self.born.get(value, (0, 0))[1] >= largest / 2 for value in read)
        shared = any(number_of_readers.get(value, 0) > 1 for value, _ in operation.outputs)
        if operation.name in FUSED and not (large > 1 and shared):
            self.stand_for |= {value: read for value, _ in operation.outputs}
        else:
            self._write(operation, read)

    def _write(self, operation, read):
        number = len(self.operations)
        self.born |= {value: (number, size) for value, size in operation.outputs}
        self.last_read |= dict.fromkeys(read, number)
        self.operations.append(operation)
        self.reads.append(read)


def _without_views(operations) -> tuple[dict, list[_Operation]]:
    """Drops operations that write nothing, and names their results by what they are views of."""
    names: dict[Hashable, Hashable] = {}
    kept = []
    for operation in operations:
        inputs = [names.get(value, value) for value in operation.inputs]
        if operation.name in RENAMED and len(inputs) == len(operation.outputs):
            names |= {value: seen for (value, _), seen in zip(operation.outputs, inputs, strict=True)}
        else:
            kept.append(dataclasses.replace(operation, inputs=inputs))
    return names, kept


def _without_padding(operations) -> list[_Operation]:
    """Has kernels read what is not padded yet, and write what is cut from their results."""
    kernels = {value for operation in operations if operation.name == "pallas_call" for value, _ in operation.outputs}
    cut = {}
    for operation in operations:
        if operation.name == "slice" and operation.inputs[0] in kernels:
            value, size = operation.inputs[0], operation.outputs[0][1]
            cut[value] = max(cut.get(value, 0), size)

    def one(operation):
        if operation.name == "pad" or (operation.name == "slice" and operation.inputs[0] in cut):
            return dataclasses.replace(operation, name="reshape", inputs=operation.inputs[:1])
        outputs = [(value, cut.get(value, size)) for value, size in operation.outputs]
        return dataclasses.replace(operation, outputs=outputs)

    return list(map(one, operations))


@functools.lru_cache(maxsize=64)
def _flattened(jaxpr) -> tuple[list[tuple[Hashable, int]], list[_Operation], list[Hashable]]:
    """Returns a program's arguments, its operations, those of plain calls in place of the call, and its results."""
    operations: list[_Operation] = []

    def walk(jaxpr, names):
        def name(var):
            return names.setdefault(var, object())

        for equation in jaxpr.eqns:
            inputs = [name(var) for var in equation.invars if not isinstance(var, core.Literal)]
            bodies = list(flops.inner_jaxprs(equation))
            if len(bodies) == 1 and equation.primitive.name not in BODIES:
                given = [None if isinstance(var, core.Literal) else name(var) for var in equation.invars]
                inner = dict(zip(bodies[0].invars, given, strict=True)) if len(given) == len(bodies[0].invars) else {}
                results = walk(bodies[0], {var: value for var, value in inner.items() if value is not None})
                names |= {var: value for var, value in zip(equation.outvars, results, strict=True) if value is not None}
                continue
            outputs = [(name(var), _bytes(var)) for var in equation.outvars]
            if equation.primitive.name == "cond" and all(_shows_only(body) for body in bodies):
                operations.append(_Operation("optimization_barrier", inputs[-len(outputs) :], outputs, []))
                continue
            if equation.primitive.name == "pallas_call":
                bodies = []  # Works in the chip's own memory.
            times = equation.params.get("length", 1) if bodies else 1
            operations.append(_Operation(equation.primitive.name, inputs, outputs, bodies, times))
        return [None if isinstance(var, core.Literal) else name(var) for var in jaxpr.outvars]

    names: dict = {}
    arguments = [(names.setdefault(var, object()), _bytes(var)) for var in (*jaxpr.constvars, *jaxpr.invars)]
    return arguments, operations, [value for value in walk(jaxpr, names) if value is not None]


def _shows_only(jaxpr) -> bool:
    """Tells whether a branch returns what it is given, such as `recomputation.reread` on each kind of device."""
    return all(equation.primitive.name in RENAMED for equation in jaxpr.eqns)


def _bytes(var):
    if not hasattr(var.aval, "shape"):
        return 0
    dtype = var.aval.dtype
    return var.aval.size * (np.dtype(dtype).itemsize if not str(dtype).startswith("key") else 8)
