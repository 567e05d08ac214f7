"""Laws of group norm: its form with a gradient written out is the reference, in values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax.kernels import group_norm as kernel
from dmm_jax.kernels.group_norm import group_norm, identity, reference
from tests.kernels.forms import assert_same
from tests.models.torch_parity import normal

CLOSE = {"value": {"atol": 2e-6}, "gradient": {"rtol": 1e-5, "atol": 1e-5}}


def scale_and_bias(channels=16):
    return normal(channels, seed=1), normal(channels, seed=2)


@pytest.mark.parametrize("activation", [identity, jax.nn.silu])
@pytest.mark.parametrize("shape", [(2, 3, 5, 16), (2, 16, 24, 16), (3, 7, 16), (1, 1, 1, 16)])
def test_values_and_gradients_are_the_references(shape, activation):
    options = {"num_groups": 4, "epsilon": 1e-5, "activation": activation}
    arrays = 3 * normal(*shape) + 1, *scale_and_bias()
    assert_same(partial(group_norm, **options), partial(reference, **options), arrays, **CLOSE)


def test_values_and_gradients_with_a_shift_are_the_references():
    def form(function):
        return lambda hidden, shift, *params: function(hidden, *params, 4, 1e-5, shift, jax.nn.silu)

    arrays = normal(2, 8, 16, 16), 3 * normal(2, 16, seed=4), *scale_and_bias()
    assert_same(form(group_norm), form(reference), arrays, **CLOSE)


def test_adjacent_images_share_a_shift():
    hidden, shift = normal(4, 3, 5, 16), normal(2, 16, seed=4)
    repeated = group_norm(hidden, *scale_and_bias(), 4, 1e-5, jnp.repeat(shift, 2, axis=0))
    np.testing.assert_array_equal(group_norm(hidden, *scale_and_bias(), 4, 1e-5, shift), repeated)


def unlike_row(row):
    return 10.0 * (np.arange(64) == row)[:, None, None]


@pytest.mark.parametrize(
    ("scale", "offset"),
    [(1.0, 1e3), (1e-2, unlike_row(32)), (1e-2, unlike_row(0)), (1.0, np.linspace(-1e3, 1e3, 16))],
    ids=["large mean", "middle row", "first row", "means of channels"],
)
def test_large_means_and_unlike_rows_cost_no_digits(scale, offset):
    hidden = jnp.asarray(scale * np.asarray(normal(2, 64, 64, 16)) + offset, jnp.float32)
    groups = np.asarray(hidden, np.float64).reshape(2, -1, 4, 4)
    exact = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-5)
    output = group_norm(hidden, jnp.ones(16), jnp.zeros(16), 4, 1e-5)
    assert np.abs(output - exact.reshape(hidden.shape)).max() < 2e-5 * np.abs(exact).max()


@pytest.mark.parametrize("shape", [(2, 24, 16, 8), (2, 3, 5, 8), (3, 192, 8), (1, 1, 1, 8)])
def test_sums_in_blocks_are_sums_over_all_cells(shape):
    maps = normal(*shape), normal(*shape, seed=1)
    for in_blocks, at_once in zip(kernel._sum_in_blocks(*maps), kernel._sum_at_once(*maps), strict=True):
        np.testing.assert_allclose(in_blocks, at_once, atol=1e-4)


def test_bfloat16_rounds_only_input_and_output():
    hidden, weights = normal(2, 6, 16).astype(jnp.bfloat16), normal(2, 6, 16, seed=3).astype(jnp.bfloat16)

    def loss(hidden, *params):
        return jnp.vdot(group_norm(hidden, *params, 4, 1e-5).astype(jnp.float32), weights.astype(jnp.float32))

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    rounded = gradient(hidden, *scale_and_bias())
    exact = gradient(hidden.astype(jnp.float32), *scale_and_bias())
    assert rounded[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded[0].astype(jnp.float32), exact[0], rtol=2**-8, atol=2**-8)
    # The parameters' gradients are float32 sums of output gradients that were rounded once.
    for a, b in zip(rounded[1:], exact[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02)
