"""Many small arrays as one: biases and norms are half of a state's arrays, and the host pays for each at every step.

A step that takes and returns the state packed dispatches in less time; what it computes is the same.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from dmm_jax import sharding


class Packing:
    """How a tree of arrays on a mesh becomes {"small": one vector, "large": the other arrays} and back."""

    def __init__(self, tree, mesh: Mesh | AbstractMesh):
        """Packs the float32 vectors that every device holds whole; `tree` may be of shapes with shardings."""
        leaves, self._structure = jax.tree.flatten(tree)
        self._is_small = [_is_small(leaf) for leaf in leaves]
        small, large = self._parted(leaves)
        self._ends = np.cumsum([leaf.size for leaf in small]).tolist()
        self.places = {"small": NamedSharding(mesh, sharding.COPY), "large": [leaf.sharding for leaf in large]}
        self._join = jax.jit(_joined, out_shardings=self.places["small"])
        self._cut = jax.jit(self._pieces, out_shardings=self.places["small"])

    def pack(self, tree) -> dict:
        """Returns the packed tree; the large arrays are those that were given, nothing of them is copied."""
        small, large = self._parted(jax.tree.leaves(tree))
        return {"small": self._join(small), "large": large}

    def unpack(self, packed: dict):
        """Returns the tree; `packed` stays as it is, and its large arrays are shared."""
        return self._whole(self._cut(packed["small"]), packed["large"])

    def around(self, step: Callable) -> Callable:
        """Returns the step that takes its first argument packed, and returns its first result so; to be compiled."""

        def packed_step(packed, *others):
            tree, results = step(self._whole(self._pieces(packed["small"]), packed["large"]), *others)
            small, large = self._parted(jax.tree.leaves(tree))
            return {"small": _joined(small), "large": large}, results

        return packed_step

    def _parted(self, leaves):
        parts = [], []
        for leaf, is_small in zip(leaves, self._is_small, strict=True):
            parts[not is_small].append(leaf)
        return parts

    def _pieces(self, vector):
        return [vector[start:end] for start, end in zip([0, *self._ends], self._ends, strict=False)]

    def _whole(self, small, large):
        small, large = iter(small), iter(large)
        leaves = [next(small if is_small else large) for is_small in self._is_small]
        return jax.tree.unflatten(self._structure, leaves)


def _is_small(leaf) -> bool:
    return leaf.ndim == 1 and leaf.dtype == jnp.float32 and leaf.sharding.is_fully_replicated


def _joined(vectors):
    return jnp.concatenate([*vectors, jnp.zeros(0, jnp.float32)])
