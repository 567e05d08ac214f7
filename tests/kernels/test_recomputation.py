"""Laws of barriers: they change no value, and `reread` is one on NVIDIA GPUs alone."""

import jax
import jax.numpy as jnp
import pytest

from dmm_jax.kernels.recomputation import reread


@pytest.mark.parametrize("platform, is_barrier", [("cuda", True), ("cpu", False), ("tpu", False)])
def test_reread_is_a_barrier_on_nvidia_gpus_alone(platform, is_barrier):
    traced = jax.jit(lambda x: reread(2 * x)[0]).trace(jax.ShapeDtypeStruct((3,), jnp.float32))
    assert ("optimization_barrier" in traced.lower(lowering_platforms=(platform,)).as_text()) == is_barrier


def test_reread_changes_no_value():
    a, b = reread(jnp.arange(3.0), jnp.ones(2))
    assert a.tolist() == [0.0, 1.0, 2.0] and b.tolist() == [1.0, 1.0]
