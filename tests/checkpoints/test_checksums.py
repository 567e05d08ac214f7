"""Checksums: the same wherever they are computed, another for every change."""

import os
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

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


MESHES = """
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from dmm_jax import sharding
from dmm_jax.checkpoints import checksums

mesh = sharding.make_mesh(1, 2, 4)
leaf = np.random.default_rng(0).standard_normal((8, 16), np.float32)
wanted = checksums.of_tree([leaf])
for spec in (P(), P("fsdp"), P(None, "fsdp"), P(("data", "fsdp")), P("data", "fsdp"), P("fsdp", "data")):
    place = NamedSharding(mesh, spec)
    assert checksums.of_tree([jax.device_put(leaf, place)]) == wanted, spec
    program = checksums._on_mesh(place, leaf.shape).lower([jax.device_put(leaf, place)]).compile().as_text()
    assert not any(name in program for name in ("all-gather", "all-reduce", "collective-permute", "all-to-all")), spec
"""


def test_every_mesh_has_the_same_and_no_device_waits_for_another():
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", MESHES], env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


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
