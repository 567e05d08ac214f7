"""Counts the floating-point operations of a JAX function: matrix products and convolutions, 2 per multiply-add.

The traced program is counted, before any compiler changes it, so the count is the same on every backend.
"""

import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.extend import core

from dmm_jax.data.batches import Batch
from dmm_jax.distill.definition import Definition
from dmm_jax.distill.state import TrainState
from dmm_jax.distill.streaming import row_shapes
from dmm_jax.distill.teachers import Frozen, Teachers


def count(function: Callable, *args) -> float:
    """Returns the operations of one call; `args` may be shapes (jax.ShapeDtypeStruct)."""
    return of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def of_step(definition: Definition, state: TrainState, teachers: Teachers, frozen: Frozen, batch: Batch) -> float:
    """Returns the operations of one training step on one device, recomputation included; arguments may be shapes.

    Attention is traced as XLA's products, because products inside a fused kernel cannot be counted.

    Args:
      teachers: one of them, if they are in the host's memory.
    """
    gradients = definition.with_attention("xla").gradients(state.trained)
    if definition.config.teachers_in_host_memory:
        return len(batch.latents) * count(gradients, state.trained, teachers, frozen, row_shapes(batch), state.step)
    # Shapes without places, as `layout.compile_step` has them: what it has traced is not traced again.
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), teachers)
    return count(gradients, state.trained, shapes, frozen, batch, state.step)


def of_streamed_teachers(definition: Definition, teachers: Teachers, frozen: Frozen, batch: Batch) -> float:
    """Returns the operations of a step's predictions by teachers that are brought to the device, on one device."""
    predictions = definition.with_attention("xla").predictions()
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return len(batch.latents) * count(predictions, teachers, frozen, row_shapes(batch), step)


def of_jaxpr(jaxpr: core.Jaxpr) -> float:
    """Returns the operations of one run of a traced program."""
    return sum((_of_equation(equation) for equation in jaxpr.eqns), 0.0)


def _of_equation(equation) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left_shape = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left_shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, spec = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
        per_output = math.prod(kernel) / kernel[spec[0]]  # Taps times input channels of a group.
        spread = math.prod(params["lhs_dilation"])  # The gradient of a stride puts zeros between inputs: no work.
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * per_output / spread
    inner = [of_jaxpr(jaxpr) for jaxpr in inner_jaxprs(equation)]
    if name == "cond":
        return max(inner)
    return sum(inner, 0.0) * params.get("length", 1)


def inner_jaxprs(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """Yields the programs inside an equation: bodies of loops, branches, calls."""
    for value in equation.params.values():
        for param in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(param, core.ClosedJaxpr):
                yield param.jaxpr
            elif isinstance(param, core.Jaxpr):
                yield param
