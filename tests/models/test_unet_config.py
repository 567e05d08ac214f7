"""Laws of a UNet's config: fields that contradict each other or change the result are refused by name."""

import pytest

from dmm_jax.models.unet_2d_condition import UNet2DConditionModel
from dmm_jax.models.unet_config import recomputed_blocks
from tests.models.torch_parity import abstract

SD1 = {
    "attention_head_dim": 8,
    "block_out_channels": [32, 64],
    "cross_attention_dim": 24,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}


def test_unknown_blocks_to_recompute_are_named_with_those_that_exist():
    with pytest.raises(ValueError, match=r"none, finest, all, .*down_blocks.3,up_blocks.0.*got 'True', 'up_blocks.4'"):
        recomputed_blocks("mid_block,up_blocks.4,True", 4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"act_fn": "mish", "class_embed_type": "timestep"}, "act_fn='mish', class_embed_type='timestep'"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim=256"),
        ({"rope_theta": 1e4}, "rope_theta"),
        ({"mid_block_type": None}, "mid_block_type"),
        ({"addition_embed_type": "image"}, "addition_embed_type"),
        ({"addition_embed_type": "text_time"}, "projection_class_embeddings_input_dim"),
        ({"addition_embed_type": "model_merge"}, "num_models"),
        ({"num_models": 3}, "num_models"),
        ({"down_block_types": ["CrossAttnDownBlock2D", "AttnDownBlock2D"]}, "down_block_types.*AttnDownBlock2D"),
        ({"up_block_types": ["UpBlock2D"]}, "up_block_types must be 2"),
        ({"num_attention_heads": 8}, "num_attention_heads"),
        ({"attention_head_dim": [8, 8, 8]}, "attention_head_dim must be one number or 2"),
        ({"attention_head_dim": 7}, "attention_head_dim.*32.*7"),
        ({"norm_num_groups": 24}, "norm_num_groups.*32.*24"),
        ({"transformer_layers_per_block": [[1, 1], 1]}, "transformer_layers_per_block"),
    ],
)
def test_uncomputed_fields_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        abstract(UNet2DConditionModel.from_config, SD1 | changes)


def test_an_unknown_implementation_of_attention_is_refused():
    with pytest.raises(ValueError, match="attention_implementation.*splash"):
        abstract(UNet2DConditionModel.from_config, SD1, attention_implementation="splash")
