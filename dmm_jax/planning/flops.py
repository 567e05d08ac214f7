"""Floating-point operations of a JAX function: those of its matrix products and convolutions, 2 per multiply-add.

Counted on the traced program, before any compiler: what the mathematics needs, on every backend alike.
"""

import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.extend import core

from dmm_jax.distill.state import TrainState
from dmm_jax.distillation import Definition


def count(function: Callable, *args) -> float:
    """Returns the operations of one call; `args` may be shapes (jax.ShapeDtypeStruct)."""
    return of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def of_step(definition: Definition, state: TrainState, teachers, frozen, batch) -> float:
    """Returns the operations of one training step on one device, recomputation included; arguments may be shapes.

    They are counted with plain attention, since nothing inside a fused kernel can be counted.
    """
    gradients = definition.with_attention("xla").gradients(state.trained)
    return count(gradients, state.trained, teachers, frozen, batch, jax.ShapeDtypeStruct((), jnp.int32))


def of_jaxpr(jaxpr: core.Jaxpr) -> float:
    """Returns the operations of one run of a traced program."""
    return sum((_of_equation(equation) for equation in jaxpr.eqns), 0.0)


def _of_equation(equation) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, spec = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
        per_output = math.prod(kernel) / kernel[spec[0]]  # Taps times input channels of a group.
        spread = math.prod(params["lhs_dilation"])  # Zeros between the inputs, a stride's gradient, are no work.
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * per_output / spread
    inner = [of_jaxpr(jaxpr) for jaxpr in inner_jaxprs(equation)]
    if name == "cond":
        return max(inner)
    return sum(inner, 0.0) * params.get("length", 1)


def inner_jaxprs(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """Yields the programs inside an equation: bodies of loops, branches, calls."""
    for value in equation.params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(one, core.ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, core.Jaxpr):
                yield one
