"""A tiny Stable Diffusion 1, made and saved by stock diffusers: the reference of the tests in this folder."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component
from dmm_jax.checkpoints.modelspec import Recipe
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.write import write_single_file
from dmm_jax.models.unet_config import merged_config
from dmm_jax.world.tokenizer import write_tokenizer

STYLES = ("anime", "photo", "ink")

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
    """The pipeline, saved by diffusers, with the embedded world's tokenizer."""
    path = tmp_path_factory.mktemp("stock") / "tiny"
    stock.save_pretrained(path)
    write_tokenizer(path / "tokenizer")
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {"tokenizer": ["transformers", "CLIPTokenizer"]}))
    return path


@pytest.fixture(scope="session")
def student(folder) -> Checkpoint:
    """The pipeline with three random styles, like the result of a training run."""
    base = open_checkpoint(folder)
    config = merged_config(base.unet_config, len(STYLES))
    rng = np.random.default_rng(0)
    shapes = naming.torch_shapes(abstract_params("unet", config))
    tensors = {key: rng.normal(0, 0.1, shape).astype(np.float32) for key, shape in shapes.items()}
    tensors |= dict(base.tensors("unet"))
    components = {**base.components, "unet": Component(config, lambda: tensors)}
    return dataclasses.replace(base, kind="workdir", components=components, styles=STYLES)


@pytest.fixture
def recipe() -> Recipe:
    """The facts that an export states about its origin."""
    return Recipe("tiny", ["a", "b"], {"options": {"num_steps": 3}, "parents": {"a": "ü"}})


@pytest.fixture
def copy(folder, tmp_path) -> pathlib.Path:
    """A copy of the stock folder, which a test may change."""
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture
def single(folder, recipe, tmp_path) -> pathlib.Path:
    """The stock pipeline as a single file in float32, which a test may change."""
    return write_single_file(tmp_path / "one.safetensors", open_checkpoint(folder), "float32", recipe)
