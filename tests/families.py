"""Tiny checkpoints of Stable Diffusion 2 and XL with random weights, made and saved by stock diffusers."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import numpy as np
import pytest

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component
from dmm_jax.checkpoints.modelspec import Recipe
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.write import write_single_file
from dmm_jax.config.options import get_config
from dmm_jax.models.unet_config import merged_config
from dmm_jax.world import tokenizer

CA, DOWN, UP_CA, UP = "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"
CLIP = {
    "vocab_size": 581, "bos_token_id": 579, "eos_token_id": 580, "pad_token_id": 580, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 1, "hidden_act": "quick_gelu",
}  # fmt: skip
OPEN_CLIP = CLIP | {
    "hidden_size": 128, "num_attention_heads": 2, "hidden_act": "gelu", "projection_dim": 32, "pad_token_id": 0,
}  # fmt: skip
TEXTS = {"sd2": {"text_encoder": OPEN_CLIP}, "sdxl": {"text_encoder": CLIP, "text_encoder_2": OPEN_CLIP}}
PADS = {"sd2": {"tokenizer": "!"}, "sdxl": {"tokenizer": tokenizer.END, "tokenizer_2": "!"}}
UNET = {
    "sample_size": 8, "block_out_channels": (64, 64), "layers_per_block": 1, "attention_head_dim": (1, 1),
    "use_linear_projection": True,
}  # fmt: skip
UNETS = {
    "sd2": UNET | {"cross_attention_dim": 128, "down_block_types": (CA, DOWN), "up_block_types": (UP, UP_CA)},
    "sdxl": UNET
    | {
        "cross_attention_dim": 192, "down_block_types": (DOWN, CA), "up_block_types": (UP_CA, UP),
        "transformer_layers_per_block": (1, 1), "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 32 + 6 * 256,
    },
}  # fmt: skip
VAE = {
    "block_out_channels": (32,) * 4, "layers_per_block": 1, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
SCALES = {"sd2": 0.18215, "sdxl": 0.13025}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
NAMES = tuple(UNETS)
STYLES = ("left", "right")
RECIPE = Recipe("tiny", [], None)


def stock(family: str, seed: int):
    """Returns diffusers' pipeline of a family, with random weights and without tokenizers."""
    torch = pytest.importorskip("torch")
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    torch.manual_seed(seed)
    networks = {
        "unet": diffusers.UNet2DConditionModel(**UNETS[family]),
        "vae": diffusers.AutoencoderKL(**VAE, scaling_factor=SCALES[family]),
    }
    kinds = {"text_encoder": transformers.CLIPTextModel, "text_encoder_2": transformers.CLIPTextModelWithProjection}
    networks |= {name: kinds[name](transformers.CLIPTextConfig(**config)) for name, config in TEXTS[family].items()}
    networks = {name: network.eval() for name, network in networks.items()} | dict.fromkeys(PADS[family])
    if family == "sd2":
        scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, **BETAS)
        unchecked = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return diffusers.StableDiffusionPipeline(scheduler=scheduler, **networks, **unchecked)
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **BETAS)
    return diffusers.StableDiffusionXLPipeline(scheduler=scheduler, **networks)


def write_stock(folder: pathlib.Path, family: str, seed: int) -> pathlib.Path:
    """Saves a stock pipeline with the embedded world's tokenizers; returns the folder."""
    stock(family, seed).save_pretrained(folder)
    for name, pad in PADS[family].items():
        tokenizer.write_tokenizer(folder / name, pad)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {name: ["transformers", "CLIPTokenizer"] for name in PADS[family]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_world(folder: pathlib.Path, family: str) -> dict[str, pathlib.Path]:
    """Writes a base and two teachers: `left` as a folder, `right` as a single file; returns {name: path}."""
    names = ("base", "left", "right")
    paths = {name: write_stock(folder / name, family, seed) for seed, name in enumerate(names)}
    file = write_single_file(folder / "right.safetensors", open_checkpoint(paths["right"]), "float32", RECIPE)
    return paths | {"right": file}


def random_student(base: Checkpoint, names: Sequence[str] = STYLES) -> Checkpoint:
    """Returns a merged checkpoint: a base with random styles."""
    config = merged_config(base.unet_config, len(names))
    rng = np.random.default_rng(0)
    shapes = naming.torch_shapes(abstract_params("unet", config))
    tensors = dict(base.tensors("unet"))
    for key, shape in shapes.items():
        if key not in tensors:
            tensors[key] = rng.normal(0, 0.1, shape).astype(np.float32)
    components = {**base.components, "unet": Component(config, lambda: tensors)}
    return dataclasses.replace(base, components=components, styles=tuple(names))


def tiny_config(paths, cache: pathlib.Path):
    """Returns a config that trains in seconds."""
    config = get_config()
    config.base = str(paths["base"])
    config.teachers = tuple((name, str(paths[name])) for name in STYLES)
    config.dtype = "float32"
    config.data.kind, config.data.cache = "shapes_world", str(cache)
    config.data.num_examples, config.data.resolution = 12, 64
    config.batch_size, config.num_steps, config.warmup_steps, config.learning_rate = 4, 3, 1, 1e-2
    config.style_init, config.loop_blocks = "paper", 1
    config.log_every, config.validation_every, config.validation_size, config.checkpoint_every = 1, 3, 2, 3
    return config


def error(array, tensor) -> float:
    """Returns the largest difference over the largest value; a four-dimensional torch tensor has its channels first."""
    tensor = tensor.detach()
    expected = (tensor.movedim(1, -1) if tensor.ndim == 4 else tensor).numpy()
    return float(np.abs(np.asarray(array) - expected).max() / np.abs(expected).max())
