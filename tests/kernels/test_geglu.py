"""Laws of the gated layer: an exact GELU gates the first half; its written-out gradient is the reference's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax.kernels.geglu import geglu, reference
from tests.models.torch_parity import normal


def test_an_exact_gelu_gates_the_first_half():
    kernel = jnp.array([[1.0, 10.0, -2.0, 0.5]])  # Two values, two gates.
    gelu = [-2.0 * 0.022750131948, 0.5 * 0.691462461274]  # x times the normal distribution function at x.
    expected = [gelu[0], 10 * gelu[1]]
    np.testing.assert_allclose(geglu(jnp.ones((1, 1, 1)), kernel, jnp.zeros(4))[0, 0], expected, rtol=2e-6)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-6)])
def test_values_and_gradients_are_the_references(dtype, tolerance):
    arrays = normal(3, 5, 8, std=2.0), normal(8, 12, std=0.35, seed=1), normal(12, std=0.35, seed=2)
    weights = normal(3, 5, 6, seed=3)

    def in_dtype(*arrays):
        return geglu(*(array.astype(dtype) for array in arrays))

    def run(form):
        output, pull = jax.vjp(form, *arrays)
        return output, *pull(weights.astype(output.dtype))

    for a, b in zip(run(in_dtype), run(reference), strict=True):
        assert jnp.abs(a - b).max() < tolerance * jnp.abs(b).max()
