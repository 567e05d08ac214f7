"""Laws of flash attention: it is the reference in values and gradients, and needs less memory."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dmm_jax.kernels import attention as attention_kernels
from dmm_jax.kernels import flash_attention
from dmm_jax.kernels.attention import attention, reference
from tests.kernels.forms import normal

LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'dmm-jax[plan]'"
)


def query_key_value(length, keys, head_size, dtype=jnp.float32, std=1.0):
    shapes = ((1, length, 2, head_size), (1, keys, 2, head_size), (1, keys, 2, head_size))
    return [normal(*shape, std=std, seed=seed).astype(dtype) for seed, shape in enumerate(shapes)]


def interpreted(*heads):
    return flash_attention.flash_attention(*heads, interpret=True)


@pytest.mark.parametrize(
    "length, keys, head_size", [(256, 256, 40), (128, 384, 80), (128, 128, 160), (256, 77, 40), (100, 130, 8)]
)
def test_values_and_gradients_are_the_references(length, keys, head_size):
    heads = query_key_value(length, keys, head_size)
    weights = normal(1, length, 2, head_size, seed=9)

    def run(form):
        return jax.value_and_grad(lambda heads: jnp.sum(form(*heads) * weights))(heads)

    (output, gradients), (expected, expected_gradients) = run(interpreted), run(reference)
    assert float(output) == pytest.approx(float(expected), rel=1e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert a.shape == b.shape and np.abs(a - b).max() < 1e-5 * np.abs(b).max()


def test_the_softmax_is_float32_for_bfloat16_inputs():
    heads = query_key_value(128, 128, 64, jnp.bfloat16, std=6.0)  # The scale is 1/8: queries are not rounded by it.
    exact = reference(*(array.astype(jnp.float32) for array in heads))
    output = interpreted(*heads)
    assert output.dtype == jnp.bfloat16
    assert np.abs(np.asarray(output, np.float32) - exact).max() < 2**-7 * np.abs(exact).max()


def test_only_many_queries_use_the_kernel(monkeypatch):
    lengths = []
    monkeypatch.setattr(attention_kernels, "flash_attention", lambda query, *_: lengths.append(query.shape[1]) or query)
    for length, keys in ((4096, 4096), (4096, 77), (256, 256), (64, 64), (64, 77)):
        query, key = (jax.ShapeDtypeStruct((1, size, 2, 40), jnp.bfloat16) for size in (length, keys))
        jax.eval_shape(lambda query, key: attention(query, key, key, "flash"), query, key)
    assert lengths == [4096, 4096, 256]


@pytest.mark.parametrize("length, keys, head_size, queries, resident", [
    (4096, 4096, 40, (512, 256), (4096, 512)), (9216, 9216, 64, (512, 256), (3072, 512)),
    (2304, 2304, 40, (384, 256), (2304, 384)), (640, 640, 160, (128, 128), (640, 128)),
    (4096, 128, 40, (512, 256), (128, 128)), (17408, 17408, 40, (512, 256), (1024, 512)),
    (4096, 4096, 80, (512, 256), (2048, 512)), (4096, 4096, 160, (512, 256), (1024, 512)),
])  # fmt: skip
def test_all_keys_of_a_head_stay_resident_if_they_fit(length, keys, head_size, queries, resident):
    sizes = flash_attention._block_sizes(length, keys, head_size)
    assert (sizes.block_q, sizes.block_q_dkv) == queries
    assert (sizes.block_kv, sizes.block_kv_compute) == (sizes.block_kv_dkv, sizes.block_kv_dkv_compute) == resident


@LIBTPU
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("length, keys, head_size", [
    (4096, 4096, 40), (16384, 16384, 40), (4096, 4096, 80), (1024, 1024, 160), (64, 64, 160),  # SD 1.x
    (9216, 9216, 64), (4096, 4096, 64), (4096, 77, 64), (576, 576, 64),  # SD 2.x and XL
])  # fmt: skip
def test_every_networks_heads_fit_a_tpus_fast_memory(topology, length, keys, head_size):
    from dmm_jax.planning import compiler

    devices = compiler.tpu_mesh(topology, teacher=1, data=4, fsdp=1).devices.flat[:1]
    placed = jax.sharding.NamedSharding(jax.sharding.Mesh(devices, "data"), P())
    shapes = [
        (2, length, 2, head_size),
        *[(2, keys, 2, head_size)] * 2,
    ]  # Two images: the kernel exchanges what is resident.
    heads = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=placed) for shape in shapes]

    def run(*heads):
        result, pull = jax.vjp(flash_attention.flash_attention, *heads)
        return pull(result)

    with jax.default_matmul_precision("default"):  # The kernel's only precision for bfloat16.
        jax.jit(run).lower(*heads).compile(compiler_options=compiler.LEAST_EFFORT)


@LIBTPU
def test_flash_attention_needs_an_eighth_of_the_memory():
    from dmm_jax.planning import compiler

    mesh = compiler.tpu_mesh("v5e:2x2", teacher=1, data=4, fsdp=1)
    placed = jax.sharding.NamedSharding(mesh, P("data"))
    heads = [jax.ShapeDtypeStruct((4, 4096, 8, 40), jnp.bfloat16, sharding=placed)] * 3

    def temporaries(implementation):
        def local(*heads):
            return jax.grad(lambda heads: jnp.sum(attention(*heads, implementation).astype(jnp.float32) ** 2))(heads)

        step = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
        with jax.default_matmul_precision("default"):  # The kernel's only precision for bfloat16.
            compiled = jax.jit(step).lower(*heads).compile(compiler_options=compiler.LEAST_EFFORT)
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries("flash") < temporaries("xla") / 8
