"""Laws of the norms whose gradients are written out: the values and the gradients of plain differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from torch_parity import normal

from dmm_jax.models import layers, norms


def random_norm(norm):
    norm.scale[...], norm.bias[...] = normal(*norm.scale.shape, seed=1), normal(*norm.bias.shape, seed=2)
    return nnx.split(norm)


def check_against_plain_differentiation(norm, hidden, *activation):
    graph, params = random_norm(norm)
    wanted = normal(*hidden.shape, seed=3)

    def ours(params, hidden):
        return layers.normed(nnx.merge(graph, params), hidden, *activation)

    def plain(params, hidden):
        output = nnx.merge(graph, params)(hidden)
        return activation[0](output) if activation else output

    np.testing.assert_allclose(ours(params, hidden), plain(params, hidden), atol=2e-6)
    grads = [
        jax.grad(lambda p, h, f=f: jnp.vdot(f(p, h), wanted), argnums=(0, 1))(params, hidden) for f in (ours, plain)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *grads)


@pytest.mark.parametrize("activation", [(), (jax.nn.silu,)], ids=["plain", "silu"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 16), (2, 16, 24, 16), (3, 7, 16), (1, 1, 1, 16)])
def test_group_norm_has_the_values_and_gradients_of_plain_differentiation(shape, activation):
    norm = layers.group_norm(4, 16, epsilon=1e-5, rngs=nnx.Rngs(0))
    check_against_plain_differentiation(norm, 3 * normal(*shape) + 1, *activation)


def off_row(row):
    return 10.0 * (np.arange(64) == row)[:, None, None]


@pytest.mark.parametrize(
    ("scale", "offset"),
    [(1.0, 1e3), (1e-2, off_row(32)), (1e-2, off_row(0)), (1.0, np.linspace(-1e3, 1e3, 16))],
    ids=["large mean", "middle row", "first row", "means of channels"],
)
def test_nothing_is_lost_beside_large_means_or_rows_unlike_the_others(scale, offset):
    hidden = jnp.asarray(scale * np.asarray(normal(2, 64, 64, 16)) + offset, jnp.float32)
    groups = np.asarray(hidden, np.float64).reshape(2, -1, 4, 4)
    exact = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-5)
    norm = layers.group_norm(4, 16, epsilon=1e-5, rngs=nnx.Rngs(0))
    assert np.abs(layers.normed(norm, hidden) - exact.reshape(hidden.shape)).max() < 2e-5 * np.abs(exact).max()


@pytest.mark.parametrize("shape", [(2, 24, 16, 8), (2, 3, 5, 8), (3, 192, 8), (1, 1, 1, 8)])
def test_the_sums_of_gpus_are_those_of_the_others(shape):
    maps = normal(*shape), normal(*shape, seed=1)
    for ours, wanted in zip(norms._in_parts(*maps), norms._at_once(*maps), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=1e-4)


def test_a_shift_is_as_if_it_had_been_added_to_every_cell():
    graph, params = random_norm(layers.group_norm(4, 16, epsilon=1e-5, rngs=nnx.Rngs(0)))
    hidden, shift, wanted = normal(2, 8, 16, 16), 3 * normal(2, 16, seed=4), normal(2, 8, 16, 16, seed=3)

    def apart(params, hidden, shift):
        return layers.normed(nnx.merge(graph, params), hidden, jax.nn.silu, shift)

    def added(params, hidden, shift):
        return layers.normed(nnx.merge(graph, params), hidden + shift[:, None, None], jax.nn.silu)

    outputs, grads = zip(*(jax.vjp(f, params, hidden, shift) for f in (apart, added)), strict=True)
    np.testing.assert_allclose(*outputs, atol=2e-6)
    pairs = [pull(wanted) for pull in grads]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *pairs)


@pytest.mark.parametrize("shape", [(2, 5, 16), (16,)])
def test_layer_norm_has_the_values_and_gradients_of_plain_differentiation(shape):
    check_against_plain_differentiation(layers.layer_norm(16, rngs=nnx.Rngs(0)), 3 * normal(*shape) + 1)


@pytest.mark.parametrize(
    "build",
    [lambda **rngs: layers.group_norm(4, 16, epsilon=1e-5, **rngs), lambda **rngs: layers.layer_norm(16, **rngs)],
)
def test_in_bfloat16_all_but_the_ends_is_float32(build):
    graph, params = random_norm(build(rngs=nnx.Rngs(0)))
    hidden, wanted = normal(2, 6, 16).astype(jnp.bfloat16), normal(2, 6, 16, seed=3).astype(jnp.bfloat16)

    def loss(params, hidden):
        return jnp.vdot(layers.normed(nnx.merge(graph, params), hidden).astype(jnp.float32), wanted.astype(jnp.float32))

    (of_params, of_hidden) = jax.grad(loss, argnums=(0, 1))(params, hidden)
    exact = jax.grad(loss, argnums=(0, 1))(params, hidden.astype(jnp.float32))
    assert of_hidden.dtype == jnp.bfloat16
    np.testing.assert_allclose(of_hidden.astype(jnp.float32), exact[1], rtol=2**-8, atol=2**-8)
    # Sums of float32, of gradients that were rounded once, as they came.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02), of_params, exact[0])
