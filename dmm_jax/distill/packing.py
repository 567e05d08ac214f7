"""The state as the step holds it: many small arrays as one, and convolutions' kernels as the device reads them.

Biases and norms are half of a state's arrays, and the host pays for each at every step: a step that takes and returns
the state packed dispatches in less time. What it computes is the same.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from dmm_jax.runtime import sharding

# cuDNN reads a kernel (h, w, I, O), and writes its gradient, with the output channel first. Were the state laid out
# otherwise, kernels, gradients and moments would be turned over, and copied, at every step.
OUTPUT_FIRST, PLATFORMS = Layout((3, 0, 1, 2)), ("gpu",)


class Packing:
    """How a tree of arrays on a mesh becomes {"small": one vector, "large": the other arrays} and back."""

    def __init__(self, tree, mesh: Mesh | AbstractMesh):
        """Packs the float32 vectors that every device holds whole; `tree` may be of shapes with shardings."""
        leaves, self._structure = jax.tree.flatten(tree)
        self._is_small = [_is_small(leaf) for leaf in leaves]
        small, large = self._parted(leaves)
        self._ends = np.cumsum([leaf.size for leaf in small]).tolist()
        turns = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform in PLATFORMS
        self._is_turned = [turns and leaf.ndim == 4 for leaf in large]
        shardings = [leaf.sharding for leaf in large]
        places = [_turned(place) if turn else place for place, turn in zip(shardings, self._is_turned, strict=True)]
        self.places = {"small": NamedSharding(mesh, sharding.COPY), "large": places}
        self._join = jax.jit(_joined, out_shardings=self.places["small"])
        self._cut = jax.jit(self._pieces, out_shardings=self.places["small"])
        self._turn, self._turn_back = (
            jax.jit(
                list, out_shardings=[place(one) for one, turn in zip(shardings, self._is_turned, strict=True) if turn]
            )
            for place in (_turned, _plain)
        )

    def pack(self, tree) -> dict:
        """Returns the packed tree; large arrays are those that were given, but for the kernels that are turned."""
        small, large = self._parted(jax.tree.leaves(tree))
        return {"small": self._join(small), "large": self._with_kernels(self._turn, large)}

    def unpack(self, packed: dict):
        """Returns the tree, laid out as usual; `packed` stays as it is, and shares what need not be turned back."""
        return self._whole(self._cut(packed["small"]), self._with_kernels(self._turn_back, packed["large"]))

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

    def _with_kernels(self, turn, large):
        turned = iter(turn([leaf for leaf, is_turned in zip(large, self._is_turned, strict=True) if is_turned]))
        return [next(turned) if is_turned else leaf for leaf, is_turned in zip(large, self._is_turned, strict=True)]

    def _pieces(self, vector):
        return [vector[start:end] for start, end in zip([0, *self._ends], self._ends, strict=False)]

    def _whole(self, small, large):
        small, large = iter(small), iter(large)
        leaves = [next(small if is_small else large) for is_small in self._is_small]
        return jax.tree.unflatten(self._structure, leaves)


def _is_small(leaf) -> bool:
    return leaf.ndim == 1 and leaf.dtype == jnp.float32 and leaf.sharding.is_fully_replicated


def _turned(place):
    return Format(OUTPUT_FIRST, place)


def _plain(place):
    return Format(Layout((0, 1, 2, 3)), place)


def _joined(vectors):
    return jnp.concatenate([*vectors, jnp.zeros(0, jnp.float32)])
