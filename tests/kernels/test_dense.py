"""Laws of dense products: axes that stay apart give the product of joined ones."""

from functools import partial

import pytest

from dmm_jax.kernels.dense import dense, reference
from tests.kernels.forms import assert_same
from tests.models.torch_parity import normal


@pytest.mark.parametrize("shape, num_axes", [((2, 7, 12), 1), ((12,), 1), ((2, 7, 3, 4), 2), ((2, 7, 1, 12), 2)])
def test_values_and_gradients_are_the_references(shape, num_axes):
    forms = partial(dense, num_axes=num_axes), partial(reference, num_axes=num_axes)
    assert_same(*forms, (normal(*shape), normal(12, 5, seed=1)), value={"atol": 1e-5}, gradient={"atol": 1e-5})
