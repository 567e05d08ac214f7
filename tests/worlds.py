"""Tiny random checkpoints in real formats: a base, two teachers, one of them with a text encoder of its own."""

import pathlib

import numpy as np
from flax import nnx

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component
from dmm_jax.checkpoints.modelspec import Recipe
from dmm_jax.checkpoints.write import write_folder, write_single_file
from dmm_jax.config.options import get_config
from dmm_jax.models.autoencoder_kl import AutoencoderKL
from dmm_jax.models.clip_text import CLIPTextModel
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel
from dmm_jax.world.architecture import SCHEDULER_CONFIG, TEXT_CONFIG, VAE_CONFIG
from dmm_jax.world.tokenizer import tokenizer_fields, write_tokenizer

# Each group of a norm has two channels: with one, the norms would remove everything that timestep and style add.
UNET = {
    "_class_name": "UNet2DConditionModel", "sample_size": 8, "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"], "block_out_channels": [64], "layers_per_block": 1,
    "cross_attention_dim": 64, "attention_head_dim": 8,
}  # fmt: skip
VAE = VAE_CONFIG | {"block_out_channels": [32] * 4}
NAMES = ("left", "right")


def random_params(model, config, seed: int) -> dict:
    """Returns random parameters of PyTorch's initial scale."""
    return nnx.to_pure_dict(nnx.state(model.from_config(config, rngs=nnx.Rngs(seed)), nnx.Param))


def write_world(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Writes the base as a folder, `left` as a single file (UNet alone), `right` as a folder with a text encoder."""
    write_tokenizer(folder / "tokenizer")
    text = TEXT_CONFIG | tokenizer_fields(folder / "tokenizer") | {"num_hidden_layers": 1}
    recipe = Recipe("tiny", [], None)

    def checkpoint(tokenizer, **params):
        configs = {"unet": UNET, "vae": VAE, "text_encoder": text}
        parts = {
            name: Component(configs[name], lambda tree=tree: naming.to_torch(tree)) for name, tree in params.items()
        }
        return Checkpoint(folder, "diffusers", parts, dict(SCHEDULER_CONFIG), tokenizer, None)

    unets = [random_params(UNet2DConditionModel, UNET, seed) for seed in range(3)]
    encoders = [random_params(CLIPTextModel, text, seed) for seed in range(2)]
    base = checkpoint(
        folder / "tokenizer", unet=unets[0], vae=random_params(AutoencoderKL, VAE, 0), text_encoder=encoders[0]
    )
    write_folder(folder / "base", base, "float32", recipe)
    write_single_file(folder / "left.safetensors", checkpoint(None, unet=unets[1]), "float32", recipe)
    right = checkpoint(None, unet=unets[2], text_encoder=encoders[1])
    write_folder(folder / "right", right, "float32", recipe)
    return {"base": folder / "base", "left": folder / "left.safetensors", "right": folder / "right"}


def tiny_config(paths: dict[str, pathlib.Path], cache: pathlib.Path):
    """Returns a config that trains in seconds."""
    config = get_config()
    config.base = str(paths["base"])
    config.teachers = tuple((name, str(paths[name])) for name in NAMES)
    config.dtype = "float32"
    config.data.kind = "shapes_world"
    config.data.num_examples = 24
    config.data.resolution = 64
    config.data.cache = str(cache)
    config.batch_size = 8
    config.num_steps = 6
    config.warmup_steps = 2
    config.learning_rate = 1e-3
    config.log_every = 1
    config.validation_every = 3
    config.validation_size = 4
    config.checkpoint_every = 2
    config.sampling.num_inference_steps = 2
    return config


def differing(a, b) -> float:
    """Returns the largest difference of two trees over the largest value."""
    import jax

    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    top = max(float(np.abs(np.asarray(x)).max()) for x, _ in pairs)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs) / top
