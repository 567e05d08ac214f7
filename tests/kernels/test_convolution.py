"""Laws of convolutions: every form is the reference, alone and in a stack of networks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax.kernels import convolution, upsample_convolution
from tests.kernels.forms import assert_same
from tests.models.torch_parity import normal

CONVOLUTIONS = {
    "1x1": (1, (1, 1), ((0, 0), (0, 0))),
    "3x3": (3, (1, 1), ((1, 1), (1, 1))),
    "3x3, strided": (3, (2, 2), ((0, 1), (0, 1))),
    "1x1, strided": (1, (2, 2), "VALID"),
}


@pytest.mark.parametrize("size, strides, padding", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_values_and_gradients_are_the_references(size, strides, padding):
    arrays = normal(2, 4, 6, 5), normal(size, size, 5, 3, seed=1)
    forms = [partial(f, strides=strides, padding=padding) for f in (convolution.convolve, convolution.reference)]
    assert_same(*forms, arrays, value={"atol": 1e-5}, gradient={"atol": 1e-4})


@pytest.mark.parametrize("size", [(3, 5), (1, 1), (4, 4)])
def test_upsampling_by_phases_is_the_reference(size):
    arrays = normal(2, *size, 4), normal(3, 3, 4, 6, std=1 / 6, seed=1)
    forms = upsample_convolution.upsample_convolve, upsample_convolution.reference
    assert_same(*forms, arrays, value={"atol": 1e-6}, gradient={"atol": 1e-4})


@pytest.mark.parametrize("upsample", [False, True])
def test_a_stack_runs_network_by_network(upsample):
    hidden, kernels = normal(3, 2, 4, 4, 5), normal(3, 3, 3, 5, 6, seed=1)

    def convolve(hidden, kernel, stacked):
        if upsample:
            return upsample_convolution.upsample_convolve(hidden, kernel, stacked)
        return convolution.convolve(hidden, kernel, (1, 1), ((1, 1), (1, 1)), stacked)

    stack = jax.vmap(partial(convolve, stacked=True))
    np.testing.assert_allclose(
        stack(hidden, kernels), jax.vmap(partial(convolve, stacked=False))(hidden, kernels), atol=1e-4
    )
    program = str(jax.make_jaxpr(stack)(hidden, kernels))
    assert program.count("conv_general_dilated") == 3 and "feature_group_count=3" not in program


def test_a_stack_may_share_a_kernel():
    hidden, kernel = normal(3, 2, 4, 4, 5), normal(3, 3, 5, 6, seed=1)
    stack = jax.vmap(partial(convolution.convolve, strides=(1, 1), padding="SAME", stacked=True), in_axes=(0, None))
    alone = jnp.stack([convolution.reference(images, kernel) for images in hidden])
    np.testing.assert_allclose(stack(hidden, kernel), alone, atol=1e-5)
