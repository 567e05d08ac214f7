"""Laws of attention: PyTorch's, in float32 whatever the compute dtype; the fused kernel only where it fits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from torch_parity import SCALES, TOLERANCE, abstract, load, normal, relative_error, scaled, to_torch

from dmm_jax.models.attention import GEGLU, Attention, BasicTransformerBlock, FeedForward, attention


def query_key_value(std=1.0, dtype=jnp.float32, shape=(2, 12, 3, 8)):
    return [normal(*shape, std=std, seed=seed).astype(dtype) for seed in range(3)]


def exact_attention(query, key, value):
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    logits = np.einsum("blnk,bsnk->bnls", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnls,bsnk->blnk", weights / weights.sum(-1, keepdims=True), value)


@pytest.mark.parametrize("std", [0.1, 1.0, 10.0])
def test_attention_is_the_softmax_of_scaled_products(std):
    heads = query_key_value(std)
    exact = exact_attention(*heads)
    assert np.abs(attention(*heads) - exact).max() < 1e-5 * np.abs(exact).max()


def test_logits_and_softmax_are_float32_for_bfloat16_inputs():
    # Logits of about 100: in bfloat16 their spacing is 0.5, which changes weights by half their size.
    heads = query_key_value(6.0, jnp.bfloat16)
    exact = exact_attention(*heads)
    ours = attention(*heads)
    assert ours.dtype == jnp.bfloat16
    assert np.abs(np.asarray(ours, np.float64) - exact).max() < 2**-7 * np.abs(exact).max()


@pytest.mark.parametrize(
    "implementation, dtype, tokens, keys, head_size, expected",
    [
        ("cudnn", "bfloat16", 256, 256, 40, "cudnn"),
        ("cudnn", "float16", 1024, 1024, 128, "cudnn"),
        ("xla", "bfloat16", 256, 256, 40, "xla"),
        ("cudnn", "float32", 256, 256, 40, "xla"),
        ("cudnn", "bfloat16", 255, 255, 40, "xla"),
        ("cudnn", "bfloat16", 4096, 77, 40, "cudnn"),
        ("cudnn", "bfloat16", 64, 77, 40, "xla"),
        ("cudnn", "bfloat16", 256, 256, 160, "xla"),
        ("cudnn", "bfloat16", 256, 256, 36, "xla"),
    ],
)
def test_the_fused_kernel_runs_only_where_asked_for_and_fitting(
    monkeypatch, implementation, dtype, tokens, keys, head_size, expected
):
    chosen = []

    def record(query, key, value, implementation, **lengths):
        chosen.append(implementation)
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    query = jax.ShapeDtypeStruct((1, tokens, 2, head_size), dtype)
    key = jax.ShapeDtypeStruct((1, keys, 2, head_size), dtype)
    jax.eval_shape(lambda query, key: attention(query, key, key, implementation), query, key)
    assert chosen == [expected]


def test_keys_that_the_fused_kernel_wants_padded_weigh_nothing(monkeypatch):
    asked, plain = [], jax.nn.dot_product_attention

    def fused(query, key, value, implementation, **lengths):
        asked.append((implementation, key.shape[1]))
        return plain(query, key, value, implementation="xla", **lengths)

    query, key, value = query_key_value(dtype=jnp.bfloat16, shape=(2, 256, 3, 8))
    key, value = key[:, :77], value[:, :77]
    expected = attention(query, key, value)
    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    np.testing.assert_array_equal(attention(query, key, value, "cudnn"), expected)
    assert asked == [("cudnn", 80)]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("std", [1.0, 0.1])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_the_layer_is_that_of_diffusers(scale, std, cross):
    torch = pytest.importorskip("torch")
    from diffusers.models.attention_processor import Attention as TorchAttention

    torch.manual_seed(0)
    width = 20 if cross else 32
    twin = scaled(TorchAttention(32, cross_attention_dim=width if cross else None, heads=4, dim_head=8), scale)
    model = load(abstract(Attention, 32, width, 4, dtype=jnp.float32), twin)
    hidden, states = normal(2, 12, 32, std=std), normal(2, 7, width, std=std, seed=1) if cross else None
    theirs = twin(to_torch(hidden), to_torch(states) if cross else None)
    assert relative_error(model(hidden, states), theirs) < TOLERANCE


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("std", [1.0, 0.1])
def test_the_feed_forward_layer_is_that_of_diffusers(scale, std):
    torch = pytest.importorskip("torch")
    from diffusers.models.attention import FeedForward as TorchFeedForward

    torch.manual_seed(0)
    twin = scaled(TorchFeedForward(32, activation_fn="geglu"), scale)
    model = load(abstract(FeedForward, 32, dtype=jnp.float32), twin)
    hidden = normal(2, 12, 32, std=std)
    assert relative_error(model(hidden), twin(to_torch(hidden))) < TOLERANCE


def test_the_gates_gelu_is_the_error_functions_and_gates_the_first_half():
    model = GEGLU(1, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    model.proj.kernel[...] = jnp.array([[1.0, 10.0, -2.0, 0.5]])  # Two values, two gates.
    model.proj.bias[...] = jnp.zeros(4)
    gelu = [-2.0 * 0.022750131948, 0.5 * 0.691462461274]  # x times the normal distribution function at x.
    np.testing.assert_allclose(model(jnp.ones((1, 1, 1)))[0, 0], [gelu[0], 10 * gelu[1]], rtol=2e-6)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-6)])
def test_the_gradients_of_the_gated_layer_are_those_of_the_product(dtype, tolerance):
    (graph, params), (exact, _) = (
        nnx.split(GEGLU(8, 6, dtype=kind, rngs=nnx.Rngs(0))) for kind in (dtype, jnp.float32)
    )
    hidden, weights = normal(3, 5, 8, std=2.0), normal(3, 5, 6, seed=1)

    def ours(params, hidden):
        return jnp.sum(weights * nnx.merge(graph, params)(hidden))

    def plain(params, hidden):
        value, gate = jnp.split(nnx.merge(exact, params).proj(hidden), 2, axis=-1)
        return jnp.sum(weights * value * jax.nn.gelu(gate, approximate=False))

    found, wanted = (jax.grad(function, argnums=(0, 1))(params, hidden) for function in (ours, plain))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert jnp.abs(a - b).max() < tolerance * jnp.abs(b).max()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("std", [1.0, 0.1, 0.01])
def test_the_transformer_block_is_that_of_diffusers(scale, std):
    torch = pytest.importorskip("torch")
    from diffusers.models.attention import BasicTransformerBlock as TorchBlock

    torch.manual_seed(0)
    twin = scaled(TorchBlock(32, 4, 8, cross_attention_dim=20), scale)
    model = load(abstract(BasicTransformerBlock, 32, 20, 4, dtype=jnp.float32), twin)
    hidden, states = normal(2, 12, 32, std=std), normal(2, 7, 20, seed=1)
    theirs = twin(to_torch(hidden), encoder_hidden_states=to_torch(states))
    assert relative_error(model(hidden, states), theirs) < TOLERANCE
