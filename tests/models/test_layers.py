"""Laws of the shared layers: PyTorch's initial weights and defaults, float32 parameters, and stacks of networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmm_jax.models import layers
from tests.models.torch_parity import normal


def assert_initialised_like_pytorch(layer, fan_in):
    limit = fan_in**-0.5
    for values in (np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])):
        assert 0.9 * limit < np.abs(values).max() <= limit
        assert values.std() == pytest.approx(limit / 3**0.5, rel=0.15)


def test_dense_layers_start_as_pytorchs():
    assert_initialised_like_pytorch(layers.Linear(64, 256, dtype=jnp.float32, rngs=nnx.Rngs(0)), fan_in=64)


def test_convolutions_start_as_pytorchs():
    assert_initialised_like_pytorch(layers.Conv(8, 256, 3, dtype=jnp.float32, rngs=nnx.Rngs(0)), fan_in=72)


def test_a_dense_layer_sums_over_several_axes_as_over_one():
    layer = layers.Linear(12, 5, dtype=jnp.float32, rngs=nnx.Rngs(0))
    hidden = normal(2, 7, 3, 4)
    np.testing.assert_allclose(layer(hidden, num_axes=2), layer(hidden.reshape(2, 7, 12)), atol=1e-6)


@pytest.mark.parametrize("kernel_size, stride, size", [(3, 1, 6), (1, 1, 6), (3, 2, 3)])
def test_convolutions_pad_half_a_kernel_on_every_side(kernel_size, stride, size):
    conv = layers.Conv(1, 1, kernel_size, stride=stride, dtype=jnp.float32, rngs=nnx.Rngs(0))
    conv.kernel[...] = jnp.ones_like(conv.kernel[...])
    conv.bias[...] = jnp.zeros(1)
    sums = conv(jnp.ones((1, 6, 6, 1)))[0, :, :, 0]
    assert sums.shape == (size, size)
    assert sums[0, 0] == (kernel_size - kernel_size // 2) ** 2  # The corner's kernel reaches out to the top and left.


def test_parameters_are_float32_in_every_compute_dtype():
    common = {"dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
    for layer in (layers.Linear(4, 4, **common), layers.Conv(4, 4, 3, **common), layers.UpsampleConv(4, 4, **common)):
        assert layer.kernel[...].dtype == layer.bias[...].dtype == jnp.float32
        assert layer(jnp.ones((1, 4, 4, 4))).dtype == jnp.bfloat16


@pytest.mark.parametrize("kernel_size", [None, 1, 3], ids=["dense", "1x1 convolution", "3x3 convolution"])
def test_the_gradient_of_a_bias_is_summed_in_float32(kernel_size):
    common = {"dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
    layer = layers.Conv(1, 2, kernel_size, **common) if kernel_size else layers.Linear(1, 2, **common)
    hidden = jnp.zeros((1, 17, 241, 1))  # 4,097 rows: bfloat16 has 4,096 and 4,128.
    graph, params = nnx.split(layer)
    grads = jax.grad(lambda params: nnx.merge(graph, params)(hidden).astype(jnp.float32).sum())(params)
    assert grads.bias[...].tolist() == [4097.0, 4097.0]


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
def test_norms_divide_by_the_root_of_variance_plus_epsilon(epsilon):
    hidden = (3e-3 * np.random.default_rng(0).standard_normal((2, 8, 8))).astype(np.float32)  # Variance about 1e-5.
    centred = hidden - hidden.mean(-1, keepdims=True)
    exact = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + epsilon)
    output = layers.LayerNorm(8, epsilon=epsilon, rngs=nnx.Rngs(0))(jnp.asarray(hidden))
    np.testing.assert_allclose(output, exact, atol=1e-5)

    centred = hidden - hidden.mean((1, 2), keepdims=True)
    exact = centred / np.sqrt(np.square(centred).mean((1, 2), keepdims=True) + epsilon)
    norm = layers.GroupNorm(1, 8, epsilon=epsilon, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(norm(jnp.asarray(hidden)), exact, atol=1e-5)


def test_norms_keep_the_dtype_of_their_input():
    hidden = normal(2, 6, 16)
    for norm in (layers.GroupNorm(4, 16, epsilon=1e-5, rngs=nnx.Rngs(0)), layers.LayerNorm(16, rngs=nnx.Rngs(0))):
        assert (norm(hidden).dtype, norm(hidden.astype(jnp.bfloat16)).dtype) == (jnp.float32, jnp.bfloat16)


def test_norms_are_exact_for_a_small_variance_and_a_large_mean():
    # The mean of squares less the square of the mean would lose it all: 1e6 has a last bit of 0.06.
    hidden = jnp.asarray(1000 + np.random.default_rng(0).standard_normal((1, 4, 4, 8)) / 16, jnp.float32)
    for norm in (layers.GroupNorm(1, 8, epsilon=1e-6, rngs=nnx.Rngs(0)), layers.LayerNorm(8, rngs=nnx.Rngs(0))):
        assert norm(hidden).std() == pytest.approx(1, rel=1e-2)


class Chain(nnx.Module):
    """One layer of each kind that `vmap` changes."""

    def __init__(self, *, rngs):
        common = {"dtype": jnp.float32, "rngs": rngs}
        self.conv = layers.Conv(4, 8, 3, **common)
        self.conv_1x1 = layers.Conv(8, 8, 1, **common)
        self.norm = layers.GroupNorm(2, 8, epsilon=1e-5, rngs=rngs)
        self.up = layers.UpsampleConv(8, 8, **common)

    def __call__(self, hidden):
        return self.up(self.norm(self.conv_1x1(self.conv(hidden))))


def test_a_stack_computes_each_network_without_grouped_convolutions():
    models = [layers.for_stacks(Chain(rngs=nnx.Rngs(seed))) for seed in range(3)]
    graph, _ = nnx.split(models[0])
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.split(model)[1] for model in models))
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 4, 4, 4)), jnp.float32)
    stacked = jax.vmap(lambda params, hidden: nnx.merge(graph, params)(hidden))
    for k, model in enumerate(models):
        np.testing.assert_allclose(stacked(params, hidden)[k], model(hidden[k]), atol=1e-5)
    program = str(jax.make_jaxpr(stacked)(params, hidden))
    assert program.count("conv_general_dilated") == 2 * len(models) and "feature_group_count=3" not in program
