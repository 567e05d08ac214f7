"""The configs that Stable Diffusion's networks were published with, for planning and benchmarks without checkpoints."""

import pathlib
from collections.abc import Mapping

from dmm_jax.checkpoints.architecture import SD1, SD2, SDXL, scheduler_config
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component
from dmm_jax.runtime.errors import UserError, meant

_VAE = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": 512,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32, "act_fn": "silu",
    "scaling_factor": 0.18215,
}  # fmt: skip
_CLIP_L = {
    "model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "vocab_size": 49408, "hidden_size": 768,
    "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 768, "bos_token_id": 49406,
    "eos_token_id": 49407, "pad_token_id": 1,
}  # fmt: skip
_SD15_UNET = {
    "_class_name": "UNet2DConditionModel", "sample_size": 64, "in_channels": 4, "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "cross_attention_dim": 768,
    "attention_head_dim": 8, "norm_num_groups": 32,
}  # fmt: skip
_OPEN_CLIP_H = _CLIP_L | {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "hidden_act": "gelu", "projection_dim": 512, "pad_token_id": 0,
}  # fmt: skip
_OPEN_CLIP_BIG_G = _OPEN_CLIP_H | {
    "architectures": ["CLIPTextModelWithProjection"], "hidden_size": 1280, "intermediate_size": 5120,
    "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280,
}  # fmt: skip
_SD21_UNET = _SD15_UNET | {
    "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}  # fmt: skip
_SDXL_UNET = _SD15_UNET | {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
    "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"], "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip

# {name: {component or "scheduler": config}}.
CONFIGS = {
    "sd15": {"unet": _SD15_UNET, "vae": _VAE, "text_encoder": _CLIP_L, "scheduler": scheduler_config(SD1)},
    "sd21": {
        "unet": _SD21_UNET,
        "vae": _VAE | {"sample_size": 768},
        "text_encoder": _OPEN_CLIP_H,
        "scheduler": scheduler_config(SD2) | {"prediction_type": "v_prediction"},
    },
    "sdxl": {
        "unet": _SDXL_UNET,
        "vae": _VAE | {"sample_size": 1024, "scaling_factor": 0.13025},
        "text_encoder": _CLIP_L,
        "text_encoder_2": _OPEN_CLIP_BIG_G,
        "scheduler": scheduler_config(SDXL),
    },
}


def checkpoint(name: str, configs: Mapping[str, Mapping] = CONFIGS) -> Checkpoint:
    """Returns a checkpoint of published configs without tensors, for callers that need shapes alone.

    Raises:
      UserError: the name is unknown.
    """
    if name not in configs:
        raise UserError(
            f"there is no published architecture {name!r}{meant(name, configs)} There are: {', '.join(configs)}."
        )
    components = {part: Component(dict(config), dict) for part, config in configs[name].items() if part != "scheduler"}
    scheduler = dict(configs[name]["scheduler"])
    return Checkpoint(pathlib.Path(name), "published", components, scheduler, None, None)
