"""Joins a network's vectors while it is updated: biases and norms are most of its arrays, and few of its numbers.

An update is elementwise, so its numbers are the same. A compiler takes longer for hundreds of short chains of
operations than for a few.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp


class JoinedVectors:
    """Joins the vectors under each top-level name of a network's parameters into the first of them."""

    def __init__(self, params: Any):
        """Plans by the network's parameters, arrays or shapes: {name: tree}."""
        self._places, self._lengths = {}, {}
        for path, leaf in jax.tree.leaves_with_path(params):
            if leaf.ndim == 1:
                lengths = self._lengths.setdefault(path[0], [])
                self._places[path] = path[0], len(lengths)
                lengths.append(leaf.size)

    def join(self, tree):
        """Returns a tree that holds trees like the parameters, with their vectors joined; all but the first are empty.

        A tree of the optimiser's state may lack parameters, but not some vectors of one name.
        """
        vectors = {}
        for path, leaf in jax.tree.leaves_with_path(tree):
            if owner := self._owner(path):
                vectors.setdefault(owner[:2], []).append(leaf)

        def joined(path, leaf):
            if not (owner := self._owner(path)):
                return leaf
            *group, number = owner
            return leaf[:0] if number else jnp.concatenate(vectors[tuple(group)])

        return jax.tree.map_with_path(joined, tree)

    def split(self, tree):
        """Undoes `join`: returns the tree with every vector apart."""
        parts = {}
        for path, leaf in jax.tree.leaves_with_path(tree):
            if (owner := self._owner(path)) and owner[2] == 0:
                ends = itertools.accumulate(self._lengths[owner[1]])
                parts[owner[:2]] = jnp.split(leaf, list(ends)[:-1])

        def part(path, leaf):
            owner = self._owner(path)
            return parts[owner[:2]][owner[2]] if owner else leaf

        return jax.tree.map_with_path(part, tree)

    def _owner(self, path):
        """Returns (path to a tree like the parameters, top-level name, number of the vector); None for other leaves."""
        for start in range(len(path)):
            if place := self._places.get(path[start:]):
                return path[:start], *place
        return None
