"""Factors next to frozen layers: applied, they are the layer with the folded kernel; B = 0 changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.abstract import abstract_model, abstract_params
from dmm_jax.models import layers, lora
from dmm_jax.models.attention import GEGLU
from dmm_jax.models.block_loops import stack_blocks, unstack_blocks
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel
from tests import worlds

OPTIONS = {"dtype": jnp.float32}
UNET = worlds.UNET | {"addition_embed_type": "model_merge", "num_models": 2}
TWO_LEVELS = {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [32, 64],
}  # fmt: skip
RANKS = {"lora_rank": 3, "lora_conv_rank": 2}
STYLE = ("model_embedding", "add_embedding")


class Named(nnx.Module):
    """A layer under the name of a part of the UNet that gets factors."""

    def __init__(self, layer):
        self.attentions = layer

    def __call__(self, hidden):
        return self.attentions(hidden)


LAYERS = {
    "dense": (lambda rngs: layers.Linear(12, 20, rngs=rngs, **OPTIONS), (2, 5, 12)),
    "convolution": (lambda rngs: layers.Conv(12, 20, 3, stride=2, rngs=rngs, **OPTIONS), (2, 8, 8, 12)),
    "upsampling": (lambda rngs: layers.UpsampleConv(12, 20, rngs=rngs, **OPTIONS), (2, 4, 4, 12)),
    "gated": (lambda rngs: GEGLU(12, 20, rngs=rngs, **OPTIONS), (2, 5, 12)),
}


def split(model) -> tuple:
    """Returns the structure of a network, and random parameters."""
    graph, params = nnx.split(model)
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32)  # noqa: E731
    return graph, jax.tree.map(draw, nnx.to_pure_dict(params))


def without_update(params):
    """Returns parameters whose B are zero."""
    return jax.tree.map_with_path(lambda path, leaf: leaf * (lora.UP not in [part.key for part in path]), params)


@pytest.mark.parametrize("kind", LAYERS)
def test_applied_factors_equal_the_folded_kernel(kind):
    build, shape = LAYERS[kind]
    plain, model = Named(build(nnx.Rngs(0))), Named(build(nnx.Rngs(0)))
    lora.add_factors(model, 3, 0, nnx.Rngs(0))
    (graph, params), plain_graph = split(model), nnx.split(plain)[0]
    hidden = jax.random.normal(jax.random.key(1), shape)

    def compared(graph, params):
        """Returns a function of the output, and its gradient in the input."""
        return jax.value_and_grad(lambda hidden: jnp.sin(nnx.merge(graph, params)(hidden)).sum())(hidden)

    applied, folded = compared(graph, params), compared(plain_graph, lora.folded(params))
    assert worlds.differing(applied, folded) < 1e-5
    assert worlds.differing(applied, compared(plain_graph, lora.folded(without_update(params)))) > 1e-2


@pytest.fixture(scope="module")
def unets():
    """Structure and parameters of a UNet with factors of rank 3 and 2, and the structure of the plain one; inputs."""
    model, plain = (
        abstract_model(lambda rngs, options=options: UNet2DConditionModel.from_config(UNET, rngs=rngs, **options))
        for options in (RANKS, {})
    )
    keys = jax.random.split(jax.random.key(2), 3)
    inputs = (jax.random.normal(keys[0], (2, 8, 8, 4)), jnp.array([10, 700]), jax.random.normal(keys[1], (2, 5, 64)))
    return split(model), nnx.split(plain)[0], (*inputs, jax.random.normal(keys[2], (2, 256)))


def predict(graph, params, inputs):
    return jax.jit(lambda params: nnx.merge(graph, params)(*inputs))(params)


def test_a_new_student_equals_the_plain_one_bit_for_bit(unets):
    (graph, params), plain, inputs = unets
    params = without_update(params)
    _, frozen = lora.split(params, ())
    applied, expected = predict(graph, params, inputs), predict(plain, frozen, inputs)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(applied), jax.tree.leaves(expected), strict=True))


def test_a_folded_unet_predicts_what_the_applied_one_does(unets):
    (graph, params), plain, inputs = unets
    applied, folded = predict(graph, params, inputs), predict(plain, lora.folded(params), inputs)
    assert worlds.differing(applied, folded) < 1e-5
    assert worlds.differing(applied, predict(plain, lora.folded(without_update(params)), inputs)) > 1e-2


def test_factors_run_in_a_loop_of_equal_blocks(unets):
    (graph, params), _, inputs = unets
    looped = abstract_model(lambda rngs: UNet2DConditionModel.from_config(UNET, rngs=rngs, loop_blocks=1, **RANKS))
    stacked = stack_blocks(params, 1, jnp.stack)
    assert worlds.differing(predict(nnx.split(looped)[0], stacked, inputs), predict(graph, params, inputs)) < 1e-5
    unstacked = unstack_blocks(lora.folded(stacked), list)
    assert worlds.differing(unstacked, lora.folded(params)) < 1e-6


@pytest.mark.parametrize("kind", LAYERS)
def test_factors_of_full_rank_represent_any_update(kind):
    model = Named(LAYERS[kind][0](nnx.Rngs(0)))
    lora.add_factors(model, 10**6, 0, nnx.Rngs(0))
    _, params = split(model)
    layer = params["attentions"].get("proj", params["attentions"])
    update = np.random.default_rng(3).normal(size=layer["kernel"].shape).astype(np.float32)
    rows = update.reshape(-1, update.shape[-1])
    down, up = (np.eye(len(rows)), rows) if len(rows) < rows.shape[1] else (rows, np.eye(rows.shape[1]))
    shapes = layer["lora_A"]["kernel"].shape, layer["lora_B"]["kernel"].shape
    layer["lora_A"]["kernel"], layer["lora_B"]["kernel"] = jnp.reshape(down, shapes[0]), jnp.reshape(up, shapes[1])
    folded = lora.folded(layer)["kernel"]
    assert np.allclose(folded - layer["kernel"], update, atol=1e-6)


def test_split_and_joined_parameters_are_the_same(unets):
    (_, params), _, _ = unets
    trained, frozen = lora.split(params, STYLE)
    joined = lora.joined(frozen, trained)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert all(map(np.array_equal, jax.tree.leaves(joined), jax.tree.leaves(params)))
    assert {path[0] for path, _ in naming.flat(trained) if not lora.is_factor(path)} == set(STYLE)
    assert not [path for path, _ in naming.flat(frozen) if lora.is_factor(path) or path[0] in STYLE]


def test_factors_have_the_keys_of_diffusers():
    shapes = naming.torch_shapes(lora.split(abstract_params("unet", UNET | TWO_LEVELS, **RANKS), STYLE)[0])
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert shapes[f"{block}.attn1.to_out.0.lora_A.weight"] == (3, 32)
    assert shapes[f"{block}.ff.net.0.proj.lora_B.weight"] == (256, 3)
    assert shapes["down_blocks.0.downsamplers.0.conv.lora_A.weight"] == (2, 32, 3, 3)
    assert shapes["down_blocks.0.downsamplers.0.conv.lora_B.weight"] == (32, 2, 1, 1)
    assert not [key for key in shapes if key.startswith(("conv_in", "conv_out", "time_embedding"))]
