"""Laws of the bias: the sum, and a gradient that is summed in float32 whatever the dtype of the map."""

import jax
import jax.numpy as jnp
import pytest

from dmm_jax.kernels.add_bias import add_bias, reference
from tests.kernels.forms import assert_same
from tests.models.torch_parity import normal


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (7, 8), (8,)])
def test_values_and_gradients_are_the_references(shape):
    arrays = normal(*shape), normal(8, seed=1)
    assert_same(add_bias, reference, arrays, value={"atol": 0}, gradient={"atol": 1e-6})


def test_the_gradient_is_summed_in_float32():
    hidden = jnp.zeros((17, 241, 2), jnp.bfloat16)  # 4,097 rows: bfloat16 has 4,096 and 4,128.
    gradient = jax.grad(lambda bias: add_bias(hidden, bias).astype(jnp.float32).sum())(jnp.zeros(2))
    assert gradient.tolist() == [4097.0, 4097.0]
