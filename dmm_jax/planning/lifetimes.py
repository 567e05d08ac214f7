"""What a traced program holds at its fullest moment: estimated on its jaxpr, so that no compiler is asked.

Inside a `shard_map` the shapes are one device's, so the bytes are too.
"""

import dataclasses
from collections.abc import Hashable

import numpy as np
from jax.extend import core

from dmm_jax import flops

# Results that XLA computes inside the operation that reads them, and so never writes to memory.
FUSED = frozenset(
    "abs add add_any and bitcast_convert_type broadcast_in_dim ceil clamp convert_element_type copy copy_p cos div eq "
    "erf erfc erf_inv exp exp2 expm1 floor ge gt integer_pow iota is_finite le log log1p logistic lt max min mul ne "
    "neg not or pad pcast pow pvary random_bits random_wrap random_unwrap rem reshape rev round rsqrt select_n "
    "shift_left shift_right_arithmetic shift_right_logical sign sin slice split sqrt square squeeze stop_gradient sub "
    "tanh threefry2x32 transpose unstack xor".split()
)


BODIES = frozenset("checkpoint cond pallas_call remat remat2 scan while".split())  # Run apart from what is around them.


def temporaries(jaxpr: core.Jaxpr) -> int:
    """Estimates the bytes that a program holds at its fullest moment, its arguments not counted.

    A value lives from where it is computed to where it is last read. Chains of elementwise operations are held as their
    inputs, as a compiler that fuses them would; in what order a compiler works, and what it pads, is not known here.
    """
    operations, results = _flattened(jaxpr)
    number_of_readers: dict[Hashable, int] = {}
    for operation in operations:
        for value in set(operation.inputs):
            number_of_readers[value] = number_of_readers.get(value, 0) + 1
    stand_for: dict[Hashable, frozenset] = {}  # A fused value: the values that are held in its place.
    born: dict[Hashable, tuple[int, int]] = {}  # A held value: the number of its operation, its bytes.
    last_read: dict[Hashable, int] = {}
    for number, operation in enumerate(operations):
        read = frozenset().union(*(stand_for.get(value, frozenset([value])) for value in operation.inputs))
        largest = max((size for _, size in operation.outputs), default=0)
        # A sum of several large values that is read more than once, such as a residual stream, is written down.
        large = sum(born.get(value, (0, 0))[1] >= largest / 2 for value in read)
        shared = any(number_of_readers.get(value, 0) > 1 for value, _ in operation.outputs)
        if operation.fused and not (large > 1 and shared):
            stand_for |= {value: read for value, _ in operation.outputs}
        else:
            born |= {value: (number, size) for value, size in operation.outputs}
            last_read |= dict.fromkeys(read, number)
    for value in results:
        last_read |= dict.fromkeys(stand_for.get(value, frozenset([value])), len(operations))
    return _peak(operations, born, last_read)


def _peak(operations, born, last_read):
    change = [0] * (len(operations) + 2)
    for value, (number, size) in born.items():
        change[number] += size
        change[last_read.get(value, number) + 1] -= size
    held, peak = 0, 0
    for operation, more in zip(operations, change, strict=False):
        held += more
        peak = max(peak, held + max(map(temporaries, operation.bodies), default=0))
    return peak


@dataclasses.dataclass(frozen=True)
class _Operation:
    inputs: list[Hashable]
    outputs: list[tuple[Hashable, int]]  # With their bytes.
    fused: bool
    bodies: list[core.Jaxpr]  # That work beside what is held around them.


def _flattened(jaxpr) -> tuple[list[_Operation], list[Hashable]]:
    """Returns a program's operations, those of plain calls in place of the call, and its results."""
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
            kernel = equation.primitive.name == "pallas_call"  # Works in the chip's own memory.
            fused = equation.primitive.name in FUSED
            operations.append(_Operation(inputs, outputs, fused, [] if kernel else bodies))
        return [None if isinstance(var, core.Literal) else name(var) for var in jaxpr.outvars]

    return operations, [value for value in walk(jaxpr, {}) if value is not None]


def _bytes(var):
    if not hasattr(var.aval, "shape"):
        return 0
    dtype = var.aval.dtype
    return var.aval.size * (np.dtype(dtype).itemsize if not str(dtype).startswith("key") else 8)
