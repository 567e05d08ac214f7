"""The student's first parameters: the base's UNet, or the teachers' mean, with a style table.

A style is a row of `model_embedding`; a two-layer MLP maps it to a vector that is added to the timestep embedding
(DMM, arXiv:2504.12364, A.1). If the MLP's last layer is zero, the student equals its start at step 0.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.models.unet_config import style_mlp_name
from dmm_jax.runtime import sharding


def style_params(config: Mapping, style_init: str, seed: int) -> dict:
    """Draws the style table, N(0, 1), and its MLP, with PyTorch's initial weights, as host arrays.

    Args:
      config: the student's UNet config.
      style_init: "zero" sets the MLP's last layer to zero; "paper" draws it too.
    """
    abstract, mlp = abstract_params("unet", config), style_mlp_name(config)
    rng = np.random.default_rng(seed)
    table = rng.standard_normal(abstract["model_embedding"]["embedding"].shape, np.float32)
    params = {"model_embedding": {"embedding": table}, mlp: {}}
    for layer in ("linear_1", "linear_2"):
        leaves = abstract[mlp][layer]
        bound = leaves["kernel"].shape[0] ** -0.5
        params[mlp][layer] = {
            name: rng.uniform(-bound, bound, leaf.shape).astype(np.float32) for name, leaf in sorted(leaves.items())
        }
    if style_init == "zero":
        params[mlp]["linear_2"] = jax.tree.map(np.zeros_like, params[mlp]["linear_2"])
    return params


def put_student(sources: Sequence[Mapping], style: Mapping, config: Mapping, mesh: Mesh):
    """Places the student's float32 parameters: the mean of the UNets in `sources`, and the style table and MLP."""

    def put(path, leaf):
        keys = [part.key for part in path]
        leaves = [_at(tree, keys) for tree in ([style] if keys[0] in style else sources)]

        def read(index):
            return sum(np.asarray(source[index], np.float32) for source in leaves) / np.float32(len(leaves))

        return _put(leaf.shape, read, mesh)

    return jax.tree.map_with_path(put, abstract_params("unet", config))


def put_trained(params: Mapping, mesh: Mesh):
    """Places host parameters as the student's are: float32, divided among the devices."""
    return jax.tree.map(lambda leaf: _put(leaf.shape, leaf.__getitem__, mesh), params)


def _put(shape, read, mesh):
    return sharding.make_array(shape, jnp.float32, mesh, sharding.parameter_spec(shape, mesh), read)


def _at(tree, keys):
    for key in keys:
        tree = tree[key]
    return tree
