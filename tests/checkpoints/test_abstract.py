"""A network without values has the structure and the shapes of the network."""

import jax
import pytest
from flax import nnx

from dmm_jax.checkpoints.abstract import COMPONENTS, abstract_model, abstract_params
from dmm_jax.checkpoints.open import open_checkpoint


@pytest.mark.parametrize("component", COMPONENTS)
def test_one_random_key_gives_the_structure_of_many(folder, component):
    config = open_checkpoint(folder).config(component.removesuffix("_2"))

    def build(rngs):
        return COMPONENTS[component].from_config(config, rngs=rngs)

    graph, state = nnx.split(abstract_model(build), nnx.Param)
    expected_graph, expected = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)
    assert graph == expected_graph
    assert nnx.to_pure_dict(state) == nnx.to_pure_dict(expected) == abstract_params(component, config)


def test_nothing_is_allocated():
    huge = {"block_out_channels": [2**20], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    leaves = jax.tree.leaves(abstract_params("unet", huge))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert max(leaf.size for leaf in leaves) > 2**42


def test_an_unsupported_field_is_an_error():
    with pytest.raises(ValueError, match="time_cond_proj_dim=256"):
        abstract_params("unet", {"time_cond_proj_dim": 256})
