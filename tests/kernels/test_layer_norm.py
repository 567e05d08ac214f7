"""Laws of layer norm: its form with a gradient written out is the reference, in values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax.kernels.layer_norm import layer_norm, reference
from tests.kernels.forms import assert_same
from tests.models.torch_parity import normal

SCALE, BIAS = normal(16, seed=1), normal(16, seed=2)


@pytest.mark.parametrize("shape", [(2, 5, 16), (16,)])
def test_values_and_gradients_are_the_references(shape):
    arrays = 3 * normal(*shape) + 1, SCALE, BIAS
    tolerances = {"value": {"atol": 2e-6}, "gradient": {"rtol": 1e-5, "atol": 1e-5}}
    # Epsilon is not differentiated, so the custom gradient takes it by position.
    assert_same(lambda *params: layer_norm(*params, 1e-5), partial(reference, epsilon=1e-5), arrays, **tolerances)


def test_bfloat16_rounds_only_input_and_output():
    hidden, weights = normal(2, 6, 16).astype(jnp.bfloat16), normal(2, 6, 16, seed=3).astype(jnp.bfloat16)

    def loss(hidden, *params):
        return jnp.vdot(layer_norm(hidden, *params, 1e-5).astype(jnp.float32), weights.astype(jnp.float32))

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    rounded, exact = gradient(hidden, SCALE, BIAS), gradient(hidden.astype(jnp.float32), SCALE, BIAS)
    assert rounded[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded[0].astype(jnp.float32), exact[0], rtol=2**-8, atol=2**-8)
    # The parameters' gradients are float32 sums of output gradients that were rounded once.
    for a, b in zip(rounded[1:], exact[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02)
