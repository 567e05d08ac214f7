"""Compares two forms of an operation, in values and in gradients."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tests.models.torch_parity import normal


def assert_same(fast: Callable, reference: Callable, arrays: Sequence[jax.Array], value: dict, gradient: dict) -> None:
    """Asserts that both forms agree; `value` and `gradient` are tolerances, as arguments of `assert_allclose`."""
    outputs = [form(*arrays) for form in (fast, reference)]
    np.testing.assert_allclose(*outputs, **value)
    weights = normal(*outputs[0].shape, seed=3)
    gradients = [
        jax.grad(lambda *given, form=form: jnp.vdot(form(*given), weights), argnums=range(len(arrays)))(*arrays)
        for form in (fast, reference)
    ]
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, **gradient)
