"""A network's structure and parameters together, and how a process keeps parameters on its devices."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from dmm_jax.models import layers
from dmm_jax.runtime import sharding


@dataclasses.dataclass(frozen=True)
class Network:
    """A network's structure and parameters; calls and attributes are those of its NNX module."""

    graph: nnx.GraphDef
    params: Mapping

    def merged(self) -> nnx.Module:
        """Returns the NNX module."""
        return nnx.merge(self.graph, self.params)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.merged(), name)

    def __call__(self, *args, **kwargs):
        return self.merged()(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Network({self.graph.nodes[0].type.__name__}, {self.num_parameters:,} parameters)"

    @property
    def num_parameters(self) -> int:
        """The number of parameters; 0 if the network has none yet."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def place_params(params: Mapping, dtype):
    """Casts parameters with `cast_params` and copies them to every device of this process."""
    return sharding.on_each_device(cast_params(params, dtype))


def cast_params(params: Mapping, dtype):
    """Returns parameters as layers of this compute dtype store them (`layers.stored_dtype`)."""
    return jax.tree.map_with_path(lambda path, leaf: jnp.asarray(leaf, layers.stored_dtype(path, dtype)), params)
