"""Estimates temporary memory and memory traffic of a traced program from the lifetimes of its values.

Inside a `shard_map` shapes are those of one device, so the bytes are too.
"""

import dataclasses
import functools
from collections.abc import Hashable

import numpy as np
from jax.extend import core

from dmm_jax.planning import flops

# XLA computes these inside the operation that reads their results, so the results never reach memory.
FUSED = frozenset(
    "abs add add_any and bitcast_convert_type broadcast_in_dim ceil clamp convert_element_type copy copy_p cos div eq "
    "erf erfc erf_inv exp exp2 expm1 floor ge gt integer_pow iota is_finite le log log1p logistic lt max min mul ne "
    "neg not or pad pcast pow pvary random_bits random_wrap random_unwrap rem reshape rev round rsqrt select_n "
    "shift_left shift_right_arithmetic shift_right_logical sign sin slice split sqrt square squeeze stop_gradient sub "
    "tanh threefry2x32 transpose unstack xor".split()
)
# The results of these are other views of their operands.
VIEWS = frozenset("copy copy_p optimization_barrier pcast pvary reshape squeeze stop_gradient transpose".split())
# The operands of these must be in memory.
PRODUCTS = frozenset("conv_general_dilated dot_general pallas_call".split())
# XLA compiles the bodies of these apart from the operations around them.
BODIES = frozenset("checkpoint cond pallas_call remat remat2 scan while".split())


def temporaries(jaxpr: core.Jaxpr) -> int:
    """Estimates the largest number of bytes that a program's values occupy at one moment, without its arguments.

    A value lives from its computation to its last read. A chain of elementwise operations occupies its inputs, as in a
    compiler that fuses it, until a product or a kernel reads the result, which is then written. Padding of a kernel's
    arguments, and what is cut from its results at once (a TPU's lanes), occupies nothing. A compiler may choose another
    order of operations, and may pad.
    """
    schedule = _Schedule.of(jaxpr)
    change = [0] * (len(schedule.operations) + 2)
    for value, (number, size) in schedule.written.items():
        change[number] += size
        change[schedule.last_read.get(value, number) + 1] -= size
    live, peak = 0, 0
    for operation, difference in zip(schedule.operations, change, strict=False):
        live += difference
        inner = max((temporaries(body) for body in operation.bodies), default=0)
        peak = max(peak, live + inner)
    return peak


def traffic(jaxpr: core.Jaxpr) -> float:
    """Estimates the bytes that a program reads from memory and writes to it; `temporaries` says which values it writes.

    A value is written once, and read by every operation, or fused chain of operations, that needs it.
    """
    schedule = _Schedule.of(jaxpr)
    sizes = {value: size for value, (_, size) in schedule.written.items()} | schedule.arguments
    moved = float(sum(size for _, size in schedule.written.values()))
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
    outputs: list[tuple[Hashable, int]]  # (value, bytes).
    bodies: list[core.Jaxpr]  # Their temporaries add to the values that are live around them.
    times: int = 1  # Runs of the bodies.


@dataclasses.dataclass
class _Schedule:
    """A program's operations in order, and the memory that its values occupy."""

    arguments: dict[Hashable, int]  # {value: bytes}.
    operations: list[_Operation] = dataclasses.field(default_factory=list)
    reads: list[frozenset] = dataclasses.field(default_factory=list)  # The values that each operation reads.
    written: dict[Hashable, tuple[int, int]] = dataclasses.field(default_factory=dict)  # {value: (operation, bytes)}.
    last_read: dict[Hashable, int] = dataclasses.field(default_factory=dict)  # {value: operation}.
    inputs_of_fused: dict[Hashable, frozenset] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, jaxpr: core.Jaxpr) -> "_Schedule":
        """Schedules a program in its own order."""
        arguments, operations, results = _flattened(jaxpr)
        names, operations = _without_views(operations)
        more_names, operations = _without_views(_without_padding(operations))
        names = {name: more_names.get(value, value) for name, value in names.items()} | more_names
        number_of_readers: dict[Hashable, int] = {}
        for operation in operations:
            for value in set(operation.inputs):
                number_of_readers[value] = number_of_readers.get(value, 0) + 1
        sizes = dict(arguments) | {value: size for operation in operations for value, size in operation.outputs}
        schedule = cls(dict(arguments))
        for operation in operations:
            schedule._add(operation, sizes, number_of_readers)
        for value in results:
            occupied = schedule._occupied(names.get(value, value))
            schedule.last_read |= dict.fromkeys(occupied, len(schedule.operations))
        return schedule

    def _occupied(self, value) -> frozenset:
        """Returns the values in memory from which `value` is read."""
        return self.inputs_of_fused.get(value, frozenset([value]))

    def _add(self, operation, sizes, number_of_readers):
        if operation.name in PRODUCTS:
            for value in dict.fromkeys(operation.inputs):
                if value in self.inputs_of_fused:
                    read = self.inputs_of_fused.pop(value)
                    self._write(_Operation("write", [value], [(value, sizes[value])], []), read)
        read = frozenset().union(*map(self._occupied, operation.inputs))
        largest = max((size for _, size in operation.outputs), default=0)
        # A sum of several large values with several readers, such as a residual stream, is written to memory.
        num_large = sum(self.written.get(value, (0, 0))[1] >= largest / 2 for value in read)
        is_shared = any(number_of_readers.get(value, 0) > 1 for value, _ in operation.outputs)
        if operation.name in FUSED and not (num_large > 1 and is_shared):
            self.inputs_of_fused |= {value: read for value, _ in operation.outputs}
        else:
            self._write(operation, read)

    def _write(self, operation, read):
        number = len(self.operations)
        self.written |= {value: (number, size) for value, size in operation.outputs}
        self.last_read |= dict.fromkeys(read, number)
        self.operations.append(operation)
        self.reads.append(read)


def _without_views(operations) -> tuple[dict, list[_Operation]]:
    """Returns {view: viewed value}, and the operations that are not views."""
    names: dict[Hashable, Hashable] = {}
    remaining = []
    for operation in operations:
        inputs = [names.get(value, value) for value in operation.inputs]
        if operation.name in VIEWS and len(inputs) == len(operation.outputs):
            names |= {value: viewed for (value, _), viewed in zip(operation.outputs, inputs, strict=True)}
        else:
            remaining.append(dataclasses.replace(operation, inputs=inputs))
    return names, remaining


def _without_padding(operations) -> list[_Operation]:
    """Makes kernels read values before padding, and write only what remains after their results are cut."""
    kernels = {value for operation in operations if operation.name == "pallas_call" for value, _ in operation.outputs}
    cut = {}
    for operation in operations:
        if operation.name == "slice" and operation.inputs[0] in kernels:
            value, size = operation.inputs[0], operation.outputs[0][1]
            cut[value] = max(cut.get(value, 0), size)

    def unpadded(operation):
        if operation.name == "pad" or (operation.name == "slice" and operation.inputs[0] in cut):
            return dataclasses.replace(operation, name="reshape", inputs=operation.inputs[:1])
        outputs = [(value, cut.get(value, size)) for value, size in operation.outputs]
        return dataclasses.replace(operation, outputs=outputs)

    return list(map(unpadded, operations))


@functools.lru_cache(maxsize=64)
def _flattened(jaxpr) -> tuple[list[tuple[Hashable, int]], list[_Operation], list[Hashable]]:
    """Returns a program's arguments, operations and results; the operations of plain calls replace the calls."""
    operations: list[_Operation] = []
    joined: dict[Hashable, list[tuple[Hashable, tuple[slice, ...]]]] = {}  # {concatenation: its parts and places}.

    def walk(jaxpr, names):
        def name(var):
            return names.setdefault(var, object())

        for equation in jaxpr.eqns:
            inputs = [name(var) for var in equation.invars if not isinstance(var, core.Literal)]
            bodies = list(flops.inner_jaxprs(equation))
            if len(bodies) == 1 and equation.primitive.name not in BODIES:
                (body,), inner = bodies, {}
                if len(equation.invars) == len(body.invars):
                    pairs = zip(body.invars, equation.invars, strict=True)
                    inner = {var: name(outer) for var, outer in pairs if not isinstance(outer, core.Literal)}
                results = walk(body, inner)
                names |= {var: value for var, value in zip(equation.outvars, results, strict=True) if value is not None}
                continue
            source = inputs[0] if inputs else None  # None: all inputs are literals.
            if equation.primitive.name in ("pcast", "pvary") and source in joined:
                names[equation.outvars[0]] = source
                continue
            if equation.primitive.name == "slice" and source in joined:
                place = tuple(map(slice, equation.params["start_indices"], equation.params["limit_indices"]))
                part = next((value for value, own in joined[source] if own == place), None)
                if part is not None and equation.params["strides"] is None:
                    names[equation.outvars[0]] = part
                    continue
            outputs = [(name(var), _num_bytes(var)) for var in equation.outvars]
            if equation.primitive.name == "concatenate" and len(inputs) == len(equation.invars):
                joined[outputs[0][0]] = list(zip(inputs, _places(equation), strict=True))
            if equation.primitive.name == "cond" and all(_is_view(body) for body in bodies):
                operations.append(_Operation("optimization_barrier", inputs[-len(outputs) :], outputs, []))
                continue
            if equation.primitive.name == "pallas_call":
                bodies = []  # A kernel's values are in the chip's own memory.
            times = equation.params.get("length", 1) if bodies else 1
            operations.append(_Operation(equation.primitive.name, inputs, outputs, bodies, times))
        return [None if isinstance(var, core.Literal) else name(var) for var in jaxpr.outvars]

    names: dict = {}
    arguments = [(names.setdefault(var, object()), _num_bytes(var)) for var in (*jaxpr.constvars, *jaxpr.invars)]
    results = [value for value in walk(jaxpr, names) if value is not None]
    # A compiler reads the parts of a concatenation themselves, such as the kernels of several teachers.
    read = {value for operation in operations for value in operation.inputs} | set(results)
    operations = [it for it in operations if it.name != "concatenate" or it.outputs[0][0] in read]
    return arguments, operations, results


def _places(concatenation: core.JaxprEqn) -> list[tuple[slice, ...]]:
    """Returns the place of each part in a concatenation, as slices of all its dimensions."""
    dimension, places, start = concatenation.params["dimension"], [], 0
    for var in concatenation.invars:
        place = [slice(0, size) for size in var.aval.shape]
        place[dimension] = slice(start, start := start + var.aval.shape[dimension])
        places.append(tuple(place))
    return places


def _is_view(jaxpr) -> bool:
    """Returns whether a branch returns its arguments, such as `recomputation.reread` on each platform."""
    return all(equation.primitive.name in VIEWS for equation in jaxpr.eqns)


def _num_bytes(var):
    if not hasattr(var.aval, "shape"):
        return 0
    dtype = var.aval.dtype
    return var.aval.size * (np.dtype(dtype).itemsize if not str(dtype).startswith("key") else 8)
