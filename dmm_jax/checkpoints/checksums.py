"""Computes one checksum per array, from all its bits: the same number on every mesh, device and host."""

import collections
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

WORDS_AT_ONCE = 2**20  # On the host: as many as fit in its caches.


def of_tree(tree) -> dict[str, list]:
    """Returns {path: [dtype, shape, checksum]} of a tree of arrays: numpy's, JAX's on one device, or on a mesh.

    Each device of a mesh sums its own part of an array, without communication: a program that communicates would wait
    for its turn among the programs that the processes have dispatched. The hosts add up the sums.
    """
    leaves, groups = paths(tree), collections.defaultdict(list)
    for path, leaf in leaves.items():
        groups[leaf.shape, np.dtype(leaf.dtype), getattr(leaf, "sharding", None)].append(path)
    parts = {}
    for (shape, _, place), names in groups.items():
        same = [leaves[name] for name in names]
        if isinstance(place, NamedSharding):
            parts |= dict(zip(names, _local_sums(_on_mesh(place, shape)(same), same[0]), strict=True))
        elif place is not None:
            parts |= dict(zip(names, [[total] for total in jax.device_get(_on_device(same))], strict=True))
        else:
            parts |= {name: [of_host(leaf)] for name, leaf in zip(names, same, strict=True)}
    sums = np.array([sum(map(int, parts[path])) % 2**32 for path in leaves], np.uint32)
    if jax.process_count() > 1 and any(isinstance(place, NamedSharding) for *_, place in groups):
        sums = multihost_utils.process_allgather(sums).astype(np.uint64).sum(0) % 2**32
    return {path: [*kind(leaf), int(total)] for (path, leaf), total in zip(leaves.items(), sums, strict=True)}


def paths(tree) -> dict[str, Any]:
    """Returns the leaves of a tree by their path, such as "['params']['bias']"."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def kind(leaf) -> tuple[str, list[int]]:
    """Returns the dtype and shape of an array or ShapeDtypeStruct, ready for JSON."""
    return np.dtype(leaf.dtype).name, list(leaf.shape)


def of_host(leaf: np.ndarray) -> int:
    """Returns the checksum of an array in the host's memory."""
    words = np.ascontiguousarray(leaf).reshape(-1)
    words = words.view(f"u{words.itemsize}")
    total = 0
    for first in range(0, words.size, WORDS_AT_ONCE):
        some = words[first : first + WORDS_AT_ONCE].astype(np.uint32)
        places = np.arange(first, first + some.size, dtype=np.uint64).astype(np.uint32)
        total += int(_mixed(some, places).sum(dtype=np.uint64))
    return total % 2**32


def _local_sums(summed, leaf) -> np.ndarray:
    """Returns the sums (leaves, parts) on this process's devices; of a part's copies, one counts."""
    counted = {shard.device for shard in leaf.addressable_shards if shard.replica_id == 0}
    sums = [shard.data for shard in summed.addressable_shards if shard.device in counted]
    return np.concatenate([np.zeros((0, summed.shape[1]), np.uint32), *jax.device_get(sums)]).T


@functools.cache
def _on_mesh(place, shape):
    """Returns the compiled function that sums arrays of one shape and sharding: (devices, arrays)."""

    def local(leaves):
        starts = []
        for axes, size in itertools.zip_longest(place.spec, leaves[0].shape):
            index = 0
            for axis in (axes,) if isinstance(axes, str) else axes or ():
                index = index * place.mesh.shape[axis] + jax.lax.axis_index(axis)
            starts.append(jnp.uint32(index * size))
        return jnp.stack([_sum(leaf, starts, shape) for leaf in leaves])[None]

    everywhere = P(place.mesh.axis_names)
    return jax.jit(jax.shard_map(local, mesh=place.mesh, in_specs=place.spec, out_specs=everywhere, check_vma=False))


@jax.jit
def _on_device(leaves):
    return [_sum(leaf, [jnp.uint32(0)] * leaf.ndim, leaf.shape) for leaf in leaves]


def _sum(part, starts, shape):
    """Returns the sum of the part of an array of `shape` that begins at `starts`, uint32."""
    words = part if part.dtype == bool else jax.lax.bitcast_convert_type(part, f"uint{8 * part.dtype.itemsize}")
    places = jnp.zeros(part.shape, jnp.uint32)
    for axis, (start, size) in enumerate(zip(starts, shape, strict=True)):
        places = places * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, part.shape, axis) + start
    return _mixed(words.astype(jnp.uint32), places).sum(dtype=jnp.uint32)


def _mixed(words, places):
    """Returns a hash of each word and its place (MurmurHash3's last round), so that swapped words change the sum."""
    words = words ^ (places * np.uint32(0x9E3779B9))
    words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
