"""Laws of the shared layers: PyTorch's initial weights and defaults, and configs read field by field."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmm_jax.models import layers
from dmm_jax.models.resnet import Upsample2D


def drawn_like_pytorch(layer, fan_in):
    limit = fan_in**-0.5
    for values in (np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])):
        assert 0.9 * limit < np.abs(values).max() <= limit
        assert values.std() == pytest.approx(limit / 3**0.5, rel=0.15)


def test_dense_layers_start_as_pytorchs():
    drawn_like_pytorch(layers.linear(64, 256, dtype=jnp.float32, rngs=nnx.Rngs(0)), fan_in=64)


def test_convolutions_start_as_pytorchs():
    drawn_like_pytorch(layers.conv(8, 256, 3, dtype=jnp.float32, rngs=nnx.Rngs(0)), fan_in=72)


@pytest.mark.parametrize("kernel_size, stride, size", [(3, 1, 6), (1, 1, 6), (3, 2, 3)])
def test_convolutions_pad_half_a_kernel_all_round(kernel_size, stride, size):
    conv = layers.conv(1, 1, kernel_size, stride=stride, dtype=jnp.float32, rngs=nnx.Rngs(0))
    conv.kernel[...] = jnp.ones_like(conv.kernel[...])
    conv.bias[...] = jnp.zeros(1)
    sums = conv(jnp.ones((1, 6, 6, 1)))[0, :, :, 0]
    assert sums.shape == (size, size)
    assert sums[0, 0] == (kernel_size - kernel_size // 2) ** 2  # The corner's kernel reaches out to the top and left.


def test_parameters_are_float32_in_every_compute_dtype():
    for layer in (
        layers.linear(4, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
        layers.conv(4, 4, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
    ):
        assert layer.kernel[...].dtype == layer.bias[...].dtype == jnp.float32
        assert layer(jnp.ones((1, 4, 4, 4))).dtype == jnp.bfloat16


@pytest.mark.parametrize("kernel_size", [None, 1, 3], ids=["dense", "convolution by cell", "convolution"])
def test_the_gradient_of_a_bias_is_summed_in_float32(kernel_size):
    common = {"dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
    layer = layers.conv(1, 2, kernel_size, **common) if kernel_size else layers.linear(1, 2, **common)
    hidden = jnp.zeros((1, 17, 241, 1))  # 4,097 rows: bfloat16 knows 4,096 and 4,128.
    graph, params = nnx.split(layer)
    grads = jax.grad(lambda params: nnx.merge(graph, params)(hidden).astype(jnp.float32).sum())(params)
    assert grads.bias[...].tolist() == [4097.0, 4097.0]


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
def test_norms_divide_by_the_root_of_variance_plus_epsilon_in_float32(epsilon):
    hidden = (3e-3 * np.random.default_rng(0).standard_normal((2, 8, 8))).astype(np.float32)  # Variance about 1e-5.
    centred = hidden - hidden.mean(-1, keepdims=True)
    exact = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + epsilon)
    ours = layers.layer_norm(8, epsilon=epsilon, rngs=nnx.Rngs(0))(jnp.asarray(hidden))
    np.testing.assert_allclose(ours, exact, atol=1e-5)

    centred = hidden - hidden.mean((1, 2), keepdims=True)
    exact = centred / np.sqrt(np.square(centred).mean((1, 2), keepdims=True) + epsilon)
    norm = layers.group_norm(1, 8, epsilon=epsilon, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(norm(jnp.asarray(hidden)), exact, atol=1e-5)
    assert norm(jnp.asarray(hidden, jnp.bfloat16)).dtype == jnp.float32


def test_norms_keep_a_small_variance_beside_a_large_mean():
    # The mean of squares less the square of the mean would lose it all: 1e6 has a last bit of 0.06.
    hidden = jnp.asarray(1000 + np.random.default_rng(0).standard_normal((1, 4, 4, 8)) / 16, jnp.float32)
    normed = layers.group_norm(1, 8, epsilon=1e-6, rngs=nnx.Rngs(0))(hidden)
    assert normed.std() == pytest.approx(1, rel=1e-2)


class Chain(nnx.Module):
    """One of each kind of layer that is not the same under `vmap`."""

    def __init__(self, *, rngs):
        common = {"dtype": jnp.float32, "rngs": rngs}
        self.conv = layers.conv(4, 8, 3, **common)
        self.by_cell = layers.conv(8, 8, 1, **common)
        self.norm = layers.group_norm(2, 8, epsilon=1e-5, rngs=rngs)
        self.up = Upsample2D(8, **common)

    def __call__(self, hidden):
        return self.up(layers.normed(self.norm, self.by_cell(self.conv(hidden))))


def test_networks_in_a_stack_are_each_itself_and_no_convolution_is_by_groups():
    models = [layers.for_stacks(Chain(rngs=nnx.Rngs(seed))) for seed in range(3)]
    graph, _ = nnx.split(models[0])
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.split(model)[1] for model in models))
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 4, 4, 4)), jnp.float32)
    stacked = jax.vmap(lambda params, hidden: nnx.merge(graph, params)(hidden))
    for k, model in enumerate(models):
        np.testing.assert_allclose(stacked(params, hidden)[k], model(hidden[k]), atol=1e-5)
    program = str(jax.make_jaxpr(stacked)(params, hidden))
    assert program.count("conv_general_dilated") == 2 * len(models) and "feature_group_count=3" not in program


def build(widths, heads=2, *, dtype=None, rngs=None):
    """Stands for a network's constructor."""


def test_known_fields_pass_and_inert_ones_and_notes_fall_away():
    config = {"_class_name": "X", "widths": [1], "act": "silu", "absent": None, "off": False}
    assert layers.constructor_arguments(build, config, {"act": ("silu",)}) == {"widths": [1]}


def test_every_field_that_would_change_the_result_is_named():
    config = {"widths": [1], "act": "relu", "dropout": 0.1, "rngs": 3}
    with pytest.raises(ValueError, match="act='relu', dropout=0.1, rngs=3"):
        layers.constructor_arguments(build, config, {"act": ("silu",)})


def test_configs_hash_by_value_so_that_equal_ones_share_a_compilation():
    one, two = layers.Config(widths=[1, 2], heads=8), layers.Config(heads=8, widths=[1, 2])
    assert one == two and hash(one) == hash(two)
    assert hash(one) != hash(layers.Config(widths=[1, 2], heads=4))
