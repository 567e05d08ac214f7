"""A tiny Stable Diffusion 1 made and saved by stock diffusers: what every test of this folder is measured against."""

import pathlib

import pytest

from dmm_jax.demo import world

TEXT = {"vocab_size": 581, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}
UNET = {
    "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 64,
    "attention_head_dim": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
VAE = {
    "block_out_channels": (32, 64), "layers_per_block": 1, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
    "set_alpha_to_one": False, "skip_prk_steps": True,
}  # fmt: skip


@pytest.fixture(scope="session")
def stock():
    """The diffusers pipeline, random weights."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokens = {"bos_token_id": 579, "eos_token_id": 580, "pad_token_id": 580}
    text = transformers.CLIPTextConfig(hidden_act="quick_gelu", projection_dim=64, **TEXT, **tokens)
    return diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(**UNET).eval(),
        vae=diffusers.AutoencoderKL(**VAE).eval(),
        text_encoder=transformers.CLIPTextModel(text).eval(),
        tokenizer=None,
        scheduler=diffusers.PNDMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def folder(stock, tmp_path_factory) -> pathlib.Path:
    """The same, saved by diffusers, with the embedded world's tokenizer beside it."""
    path = tmp_path_factory.mktemp("stock") / "tiny"
    stock.save_pretrained(path)
    world.write_tokenizer(path / "tokenizer")
    return path
