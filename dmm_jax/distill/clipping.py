"""The gradient's norm, summed once for metrics and optimiser, and the clip by that norm."""

import collections
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from dmm_jax.runtime import sharding


def build_norm(mesh: Mesh | AbstractMesh, specs) -> Callable:
    """Returns `f(grads) -> {network: norm of all its gradients}` under a shard_map, for gradients placed at `specs`."""

    def local(grads):
        return {name: _norm(grads[name], specs[name]) for name in grads}

    return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=sharding.COPY)


def _norm(grads, specs):
    placed = collections.defaultdict(list)
    specs = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, P))
    for leaf, spec in zip(jax.tree.leaves(grads), specs, strict=True):
        placed[tuple(sharding.divided_dims(spec))].append(leaf)
    return jnp.sqrt(sum(jax.lax.psum(_squares(leaves), axes) for axes, leaves in placed.items()))


def _squares(leaves):
    """Sums all squares; vectors are joined first, since one kernel for each would be hundreds of launches per step."""
    vectors = [jnp.atleast_1d(leaf) for leaf in leaves if leaf.ndim < 2]
    joined = [jnp.concatenate(vectors)] if vectors else []
    return sum(jnp.sum(jnp.square(leaf)) for leaf in [*joined, *(leaf for leaf in leaves if leaf.ndim > 1)])


def clip_by_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """As `optax.clip_by_global_norm`, with the norm as an argument: the step has computed it already."""

    def update(updates, state, params=None, *, norm, **_):
        del params
        is_short = jax.lax.optimization_barrier(norm < max_norm)
        return jax.tree.map(lambda leaf: jnp.where(is_short, leaf, leaf / norm * max_norm), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
