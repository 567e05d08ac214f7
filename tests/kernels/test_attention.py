"""Laws of attention: all forms are the reference, and one rule chooses the form by platform, dtype and shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax.kernels.attention import attention, choose_implementation, reference
from tests.kernels.forms import assert_same
from tests.models.torch_parity import normal


def query_key_value(std=1.0, dtype=jnp.float32, shape=(2, 12, 3, 8)):
    return [normal(*shape, std=std, seed=seed).astype(dtype) for seed in range(3)]


def exact_attention(query, key, value):
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    logits = np.einsum("blnk,bsnk->bnls", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnls,bsnk->blnk", weights / weights.sum(-1, keepdims=True), value)


@pytest.mark.parametrize("form", [attention, reference])
@pytest.mark.parametrize("std", [0.1, 1.0, 10.0])
def test_attention_is_the_softmax_of_scaled_products(std, form):
    heads = query_key_value(std)
    exact = exact_attention(*heads)
    assert np.abs(form(*heads) - exact).max() < 1e-5 * np.abs(exact).max()


def test_a_row_attends_to_its_own_number_of_keys():
    query, key, value = query_key_value()
    attended = attention(query, key, value, num_keys=jnp.array([5, 12]))
    alone = attention(query[:1], key[:1, :5], value[:1, :5])
    assert np.abs(attended[:1] - alone).max() < 1e-6 * np.abs(alone).max()
    assert np.abs(attended[1:] - attention(query[1:], key[1:], value[1:])).max() < 1e-6 * np.abs(attended).max()


@pytest.mark.parametrize("is_causal", [False, True])
def test_values_and_gradients_are_the_references(is_causal):
    forms = [lambda *heads, form=form: form(*heads, is_causal=is_causal) for form in (attention, reference)]
    assert_same(*forms, query_key_value(), value={"atol": 2e-6}, gradient={"atol": 1e-5})


@pytest.mark.parametrize("form", [attention, reference])
def test_logits_and_softmax_are_float32_for_bfloat16_inputs(form):
    # Logits of about 100: in bfloat16 their spacing is 0.5, which changes weights by half their size.
    heads = query_key_value(6.0, jnp.bfloat16)
    exact, output = exact_attention(*heads), form(*heads)
    assert output.dtype == jnp.bfloat16
    assert np.abs(np.asarray(output, np.float64) - exact).max() < 2**-7 * np.abs(exact).max()


@pytest.mark.parametrize(
    "requested, dtype, platform, num_devices, expected",
    [
        ("auto", "bfloat16", "gpu", 1, "cudnn"),
        ("auto", "bfloat16", "gpu", 8, "cudnn"),
        ("auto", "float32", "gpu", 1, "xla"),
        ("auto", "bfloat16", "tpu", 1, "flash"),
        ("auto", "float32", "tpu", 1, "flash"),
        ("auto", "bfloat16", "tpu", 4, "xla"),
        ("auto", "bfloat16", "cpu", 1, "xla"),
        ("auto", "bfloat16", "", 1, "xla"),  # The tests' own platform.
        ("xla", "bfloat16", "gpu", 1, "xla"),
        ("cudnn", "bfloat16", "cpu", 1, "cudnn"),
        ("flash", "bfloat16", "cpu", 1, "flash"),
        ("flash", "bfloat16", "tpu", 4, "xla"),
    ],
)
def test_the_implementation_fits_platform_dtype_and_devices(requested, dtype, platform, num_devices, expected):
    assert choose_implementation(requested, jnp.dtype(dtype), platform, num_devices) == expected


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
def test_cudnns_kernel_runs_only_if_requested_and_fitting(
    monkeypatch, implementation, dtype, tokens, keys, head_size, expected
):
    implementations = []

    def record(query, key, value, implementation, **options):
        implementations.append(implementation)
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    query = jax.ShapeDtypeStruct((1, tokens, 2, head_size), dtype)
    key = jax.ShapeDtypeStruct((1, keys, 2, head_size), dtype)
    jax.eval_shape(lambda query, key: attention(query, key, key, implementation), query, key)
    assert implementations == [expected]


def test_fused_kernels_take_no_causal_mask(monkeypatch):
    implementations, plain = [], jax.nn.dot_product_attention

    def record(query, key, value, implementation, **options):
        implementations.append(implementation)
        return plain(query, key, value, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    heads = query_key_value(dtype=jnp.bfloat16, shape=(1, 256, 1, 8))
    for implementation in ("cudnn", "flash"):
        attention(*heads, implementation, is_causal=True)
    assert implementations == ["xla", "xla"]


def test_keys_padded_for_cudnn_have_no_weight(monkeypatch):
    calls, plain = [], jax.nn.dot_product_attention

    def fused(query, key, value, implementation, **lengths):
        calls.append((implementation, key.shape[1]))
        return plain(query, key, value, implementation="xla", **lengths)

    query, key, value = query_key_value(dtype=jnp.bfloat16, shape=(2, 256, 3, 8))
    key, value = key[:, :77], value[:, :77]
    expected = attention(query, key, value)
    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    np.testing.assert_array_equal(attention(query, key, value, "cudnn"), expected)
    assert calls == [("cudnn", 80)]
