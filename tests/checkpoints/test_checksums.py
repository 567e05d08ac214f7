"""Checksums: the same wherever they are computed, another for every change."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dmm_jax import sharding
from dmm_jax.checkpoints import checksums


def drawn(shape=(6, 5), dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def of(leaf):
    return checksums.of_tree({"leaf": leaf})["['leaf']"]


@pytest.mark.parametrize(
    "leaf",
    [drawn(), drawn((2, 3, 4)), drawn(dtype=ml_dtypes.bfloat16), np.int32(7), np.arange(3) > 1, drawn((0, 4))],
    ids=lambda leaf: f"{leaf.dtype}{list(leaf.shape)}",
)
def test_host_and_device_agree(leaf):
    leaf = np.asarray(leaf)
    assert of(leaf) == of(jnp.asarray(leaf))
    assert of(leaf)[:2] == [leaf.dtype.name, list(leaf.shape)]


def test_large_arrays_are_read_in_pieces(monkeypatch):
    whole = of(drawn())
    monkeypatch.setattr(checksums, "WORDS_AT_ONCE", 7)
    assert of(drawn()) == whole


@pytest.mark.parametrize("spec", [P("fsdp"), P(None, "fsdp"), P(("data", "fsdp"))])
def test_every_mesh_has_the_same_and_gathers_nothing(spec):
    mesh = sharding.make_mesh(1, 2, 4) if len(jax.devices()) == 8 else sharding.make_mesh()
    leaf = jax.device_put(drawn((8, 16)), NamedSharding(mesh, spec))
    assert of(leaf) == of(drawn((8, 16)))
    assert "all-gather" not in checksums._on_device.lower(leaf).compile().as_text()


def test_every_bit_and_every_place_counts():
    leaf = drawn((40,))
    seen = {of(leaf)[-1]}
    for word in range(leaf.size):
        for bit in range(32):
            changed = leaf.copy()
            changed.view(np.uint32)[word] ^= np.uint32(1 << bit)
            seen.add(of(changed)[-1])
    assert len(seen) == 1 + 32 * leaf.size
    swapped = leaf.copy()
    swapped[[3, 9]] = swapped[[9, 3]]
    assert len({of(one)[-1] for one in (leaf, swapped, -leaf, np.zeros_like(leaf), leaf[::-1])}) == 5
