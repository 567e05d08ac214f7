"""One number per array, which tells whether its bits are those it had: the same on every mesh, device and host."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WORDS_AT_ONCE = 2**20  # On the host: what the caches hold.


def of_tree(tree) -> dict[str, list]:
    """Returns {path: [dtype, shape, checksum]} of a tree of arrays; on the device, where it costs one read of them."""
    leaves = paths(tree)
    sums = [_on_device(leaf) if isinstance(leaf, jax.Array) else of_host(leaf) for leaf in leaves.values()]
    return {
        path: [*kind(leaf), int(one)] for (path, leaf), one in zip(leaves.items(), jax.device_get(sums), strict=True)
    }


def paths(tree) -> dict[str, Any]:
    """Returns the leaves of a tree by their path, written out."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def kind(leaf) -> tuple[str, list[int]]:
    """Returns dtype and shape of an array or of its description, as JSON holds them."""
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


@jax.jit
def _on_device(leaf):
    words = leaf if leaf.dtype == bool else jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
    words = words.astype(jnp.uint32)
    places = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):  # Never flattened: a sharded array stays where it is.
        places = places * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    return _mixed(words, places).sum(dtype=jnp.uint32)


def _mixed(words, places):
    """Hashes each word with its place (MurmurHash3's last round), so that their sum tells swapped words, too."""
    words = words ^ (places * np.uint32(0x9E3779B9))
    words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
