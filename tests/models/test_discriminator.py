"""Laws of the discriminator: its backbone is the UNet's way down, its head reads any size down to one row of logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmm_jax.models.discriminator import Discriminator
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel
from tests.models.torch_parity import abstract, draw

UNET = {
    "sample_size": 8, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "block_out_channels": [32, 64], "layers_per_block": 1,
    "cross_attention_dim": 16, "attention_head_dim": 4, "norm_num_groups": 16,
}  # fmt: skip


def normal(*shape):
    return jax.random.normal(jax.random.key(sum(shape)), shape)


@pytest.mark.parametrize("side", [4, 8, 64])
def test_pictures_of_any_size_give_one_logit_per_class(side):
    judge = draw(abstract(Discriminator, UNET, 3, side))
    logits = nnx.jit(Discriminator.__call__)(judge, normal(2, side, side, 4), jnp.array([3, 900]), normal(2, 7, 16))
    assert logits.shape == (2, 6) and logits.dtype == jnp.float32
    assert np.abs(logits[0] - logits[1]).max() > 1e-3


def test_the_head_covers_the_picture_in_as_many_halvings_as_dmd2s():
    """Stable Diffusion 1.5's middle block is 8x8 at 64 cells, XL's 32x32 at 128: one halving, and three."""

    def num_blocks(levels, side):
        kinds = {"down_block_types": ["DownBlock2D"] * levels, "up_block_types": ["UpBlock2D"] * levels}
        config = UNET | kinds | {"block_out_channels": [32] * levels}
        return len(abstract(Discriminator, config, 2, side).head.blocks)

    assert (num_blocks(4, 64), num_blocks(3, 128)) == (2, 4)


def test_the_backbone_is_the_unets_way_down():
    """The same keys, and with the UNet's parameters its middle block."""
    unet = draw(abstract(UNet2DConditionModel.from_config, UNET))
    judge = draw(abstract(Discriminator, UNET, 2, 8), seed=1)
    params = nnx.to_pure_dict(nnx.state(unet, nnx.Param))
    backbone = nnx.to_pure_dict(nnx.state(judge.backbone, nnx.Param))
    assert sorted(params.keys() - backbone.keys()) == ["conv_norm_out", "conv_out", "up_blocks"]
    nnx.update(judge.backbone, nnx.State({name: params[name] for name in backbone}))
    inputs = normal(2, 8, 8, 4), jnp.array([3, 900]), normal(2, 7, 16)

    @nnx.jit
    def outputs(unet, judge):
        middle = unet(*inputs).features[2]
        return (judge.backbone.encode(*inputs).hidden, middle), (judge(*inputs), judge.head(middle))

    for actual, expected in outputs(unet, judge):
        np.testing.assert_array_equal(actual, expected)
