"""Checksums are equal on host, device and mesh, and every change of the array changes them."""

import os
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dmm_jax.checkpoints import checksums


def random(shape=(6, 5), dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def of(leaf):
    return checksums.of_tree({"leaf": leaf})["['leaf']"]


@pytest.mark.parametrize(
    "leaf",
    [random(), random((2, 3, 4)), random(dtype=ml_dtypes.bfloat16), np.int32(7), np.arange(3) > 1, random((0, 4))],
    ids=lambda leaf: f"{leaf.dtype}{list(leaf.shape)}",
)
def test_host_and_device_agree(leaf):
    leaf = np.asarray(leaf)
    assert of(leaf) == of(jnp.asarray(leaf))
    assert of(leaf)[:2] == [leaf.dtype.name, list(leaf.shape)]


def test_large_arrays_are_read_in_pieces(monkeypatch):
    complete = of(random())
    monkeypatch.setattr(checksums, "WORDS_AT_ONCE", 7)
    assert of(random()) == complete


MESHES = """
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from dmm_jax.runtime import sharding
from dmm_jax.checkpoints import checksums

mesh = sharding.make_mesh(1, 2, 4)
leaf = np.random.default_rng(0).standard_normal((8, 16), np.float32)
expected = checksums.of_tree([leaf])
for spec in (P(), P("fsdp"), P(None, "fsdp"), P(("data", "fsdp")), P("data", "fsdp"), P("fsdp", "data")):
    place = NamedSharding(mesh, spec)
    assert checksums.of_tree([jax.device_put(leaf, place)]) == expected, spec
    program = checksums._on_mesh(place, leaf.shape).lower([jax.device_put(leaf, place)]).compile().as_text()
    assert not any(name in program for name in ("all-gather", "all-reduce", "collective-permute", "all-to-all")), spec
"""


def test_every_mesh_has_the_same_checksum_without_communication():
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", MESHES], env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_bit_and_every_place_counts():
    leaf = random((40,))
    sums = {of(leaf)[-1]}
    for word in range(leaf.size):
        for bit in range(32):
            changed = leaf.copy()
            changed.view(np.uint32)[word] ^= np.uint32(1 << bit)
            sums.add(of(changed)[-1])
    assert len(sums) == 1 + 32 * leaf.size
    swapped = leaf.copy()
    swapped[[3, 9]] = swapped[[9, 3]]
    assert len({of(array)[-1] for array in (leaf, swapped, -leaf, np.zeros_like(leaf), leaf[::-1])}) == 5
