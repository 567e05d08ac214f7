"""The families of Stable Diffusion: how a UNet shows its family, and the defaults that single files do not state."""

from collections.abc import Mapping

from dmm_jax.checkpoints.errors import CheckpointError

SD1, SD2, SDXL = "stable-diffusion-v1", "stable-diffusion-v2", "stable-diffusion-xl-v1-base"  # ModelSpec's names.
MERGED = ("model_merge", "model_merge_xl")  # The `addition_embed_type` of a UNet with a style table.
UNKNOWN = "unknown"  # A prediction type that neither tensors nor metadata show.
NO_REFINER = (
    "it is the refiner of Stable Diffusion XL, which finishes another model's images and cannot be merged with "
    "other models. Use the base model."
)
NO_EDM = (
    "it was trained on EDM's noise levels (as CosXL and Playground v2.5 were), not on betas: it predicts neither the "
    "noise nor the velocity at a timestep. Use a model of the usual schedule."
)
# The published sizes: {name: (family, block_out_channels, cross_attention_dim)}.
FULL_SIZES = {
    "Stable Diffusion 1": (SD1, [320, 640, 1280, 1280], 768),
    "Stable Diffusion 2": (SD2, [320, 640, 1280, 1280], 1024),
    "Stable Diffusion XL": (SDXL, [320, 640, 1280], 2048),
}
INPAINTING_CHANNELS = 9
CELL = 8  # Pixels along the side of a latent cell, in every VAE of these models.
_BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_PNDM = {"_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True, "clip_sample": False}
_SCHEDULERS = {
    SD1: _PNDM | _BETAS | {"steps_offset": 1, "prediction_type": "epsilon"},
    # 768-v predicts the velocity, 512-base the noise; their tensors have the same shapes.
    SD2: _PNDM | _BETAS | {"steps_offset": 1, "prediction_type": UNKNOWN},
    SDXL: {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
    | _BETAS
    | {"steps_offset": 1, "prediction_type": "epsilon"},
}
_TEXT_ENCODERS = {SD1: ("text_encoder",), SD2: ("text_encoder",), SDXL: ("text_encoder", "text_encoder_2")}
_SAMPLE_SIZES = {SD1: 64, SD2: 96, SDXL: 128}  # Latent cells along the side of a training image.
_VAE_SCALES = {SD1: 0.18215, SD2: 0.18215, SDXL: 0.13025}


def architecture(unet_config: Mapping) -> str:
    """Returns the family of a UNet, from its structure and not its size, by ModelSpec's name."""
    if unet_config.get("addition_embed_type") in ("text_time", "model_merge_xl"):
        return SDXL
    return SD2 if unet_config.get("use_linear_projection") else SD1


def published_name(unet_config: Mapping) -> str:
    """Returns the name of the family if a UNet has its published size, which stock tools expect of a file; else ""."""
    size = architecture(unet_config), unet_config.get("block_out_channels"), unet_config.get("cross_attention_dim")
    return next((name for name, published in FULL_SIZES.items() if published == size), "")


def scheduler_config(family: str) -> dict:
    """Returns the scheduler_config.json that a family's checkpoints are published with."""
    return dict(_SCHEDULERS[family])


def text_encoders(family: str) -> tuple[str, ...]:
    """Returns the names of a family's text encoders, in the order in which their hidden states are joined."""
    return _TEXT_ENCODERS[family]


def components(family: str) -> tuple[str, ...]:
    """Returns the names of the networks that a complete checkpoint of a family holds."""
    return ("unet", "vae", *text_encoders(family))


def sample_size(family: str) -> int:
    """Returns the `sample_size` that a family's UNets were trained at, in latent cells."""
    return _SAMPLE_SIZES[family]


def vae_scale(family: str) -> float:
    """Returns the `scaling_factor` of a family's VAE."""
    return _VAE_SCALES[family]


def check_plain(in_channels: int, where: str) -> None:
    """Raises CheckpointError for a UNet that takes more than latents: inpainting, image editing, upscaling."""
    if in_channels == INPAINTING_CHANNELS:
        raise CheckpointError(
            f"{where} is an inpainting model ({INPAINTING_CHANNELS} input channels): it cannot be merged with others. "
            "Use the plain model."
        )
    if in_channels != 4:
        raise CheckpointError(
            f"{where} takes {in_channels} input channels, a plain text-to-image model 4: it edits or enlarges images "
            "and cannot be merged with others."
        )
