"""Stacked blocks in a loop compute what the blocks compute one by one; stacking loses nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmm_jax.checkpoints.abstract import abstract_model, abstract_params
from dmm_jax.models.block_loops import is_looped, stack_blocks, unstack_blocks
from dmm_jax.models.transformer_2d import Transformer2DModel
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel
from tests import families
from tests.models.torch_parity import normal

UNET = families.UNETS["sdxl"] | {"transformer_layers_per_block": [1, 3]}


def transformer(looped, **sizes):
    options = {"use_linear_projection": True, "num_groups": 4, "dtype": jnp.float32}
    return lambda rngs: Transformer2DModel(16, 12, 2, 3, looped=looped, rngs=rngs, **options, **sizes)


@pytest.mark.parametrize("num_prompts, remat", [(2, False), (4, False), (4, True)])
def test_a_loop_has_the_outputs_and_gradients_of_its_blocks(num_prompts, remat):
    model, loop = transformer(False)(nnx.Rngs(0)), nnx.split(abstract_model(transformer(True)))[0]
    graph, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    inputs = normal(2, 4, 4, 16), normal(num_prompts, 5, 12, seed=1)

    def loss(graph, params, *inputs):
        return jnp.mean(jnp.square(nnx.merge(graph, params)(*inputs) - 1.0))

    values = jax.value_and_grad(loss, argnums=(1, 2, 3))
    expected, grads = jax.jit(values, static_argnums=0)(graph, params, *inputs)
    inputs += None, remat
    actual, loop_grads = jax.jit(values, static_argnums=(0, 5))(loop, stack_blocks(params, 3, jnp.stack), *inputs)
    assert actual == pytest.approx(float(expected), rel=1e-6)
    one_by_one = unstack_blocks(loop_grads, list)
    assert jax.tree.structure(one_by_one) == jax.tree.structure(grads)
    for looped_result, unrolled_result in zip(jax.tree.leaves(one_by_one), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(
            looped_result, unrolled_result, atol=2e-6 * float(jnp.abs(unrolled_result).max()) + 1e-9
        )


def test_a_recomputed_loop_keeps_the_inputs_of_its_blocks_alone():
    graph = nnx.split(abstract_model(transformer(True)))[0]
    params = stack_blocks(nnx.to_pure_dict(nnx.state(transformer(False)(nnx.Rngs(0)))), 3, jnp.stack)

    def residual_shapes(remat):
        """Returns the shapes of three blocks each that the backward pass needs, without those of parameters."""
        run = lambda params, *inputs: nnx.merge(graph, params)(*inputs, None, remat)  # noqa: E731
        backward = jax.eval_shape(lambda *arguments: jax.vjp(run, *arguments)[1], params, *inputs)
        shapes = [leaf.shape for leaf in jax.tree.leaves(backward) if leaf.shape[:2] == (3, 2)]
        return sorted(set(shapes)), len(shapes)

    inputs = normal(2, 4, 4, 16), normal(2, 5, 12, seed=1)
    assert residual_shapes(True) == ([(3, 2, 16, 16)], 1)  # The tokens before each block.
    assert (3, 2, 16, 64) in residual_shapes(False)[0]


def test_only_groups_that_are_large_enough_are_stacked():
    shapes = abstract_params("unet", UNET)
    stacked = stack_blocks({"mu": shapes, "count": jnp.int32(3)}, 3, lambda leaves: (len(leaves), leaves[0].shape))
    (three,) = [stacked["mu"][name]["attentions"][0]["transformer_blocks"] for name in ("mid_block",)]
    assert three["attn1"]["to_q"]["kernel"] == (3, (64, 64)) and stacked["count"] == 3
    assert stack_blocks(shapes, 4, list) == stack_blocks(shapes, 0, list) == shapes
    assert [is_looped(3, fewest) for fewest in (0, 2, 3, 4)] == [False, True, True, False]


def test_unstacking_restores_every_array_in_its_place():
    numbers = iter(range(10_000))
    params = jax.tree.map(lambda leaf: np.full(2, next(numbers)), abstract_params("unet", UNET))
    restored = unstack_blocks(stack_blocks(params, 2, np.stack), list)
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(params), strict=True))


def test_a_unet_loops_the_groups_that_its_option_asks_for():
    def looped(fewest):
        unet = abstract_model(lambda rngs: UNet2DConditionModel.from_config(UNET, rngs=rngs, loop_blocks=fewest))
        return [unet.mid_block.attentions[0].looped, unet.down_blocks[1].attentions[0].looped]

    assert looped(0) == looped(4) == [False, False] and looped(3) == [True, True]
