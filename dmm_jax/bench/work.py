"""Counts the work in what `bench` runs: TFLOP per image of training and of sampling."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from dmm_jax.bench.networks import SAMPLING
from dmm_jax.checkpoints.abstract import abstract_model, abstract_params
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.models.autoencoder_kl import AutoencoderKL
from dmm_jax.models.text_encoders import NUM_TIME_IDS
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel
from dmm_jax.planning import flops


def train_tflop(base: Checkpoint, student_config: Mapping) -> float:
    """Counts the TFLOP per image of a step: student forward and backward (twice the forward), one teacher's forward.

    Recomputation does not count, because it is a way of computing and not a part of the work; nor do text encoders.
    """
    return 3 * unet_tflop(student_config) + unet_tflop(base.unet_config)


def sample_tflop(base: Checkpoint) -> float:
    """Counts the TFLOP per sampled image: at each step the UNet for two prompts, for guidance; then the decoder.

    As in the pipeline, the layers before the first cross-attention of Stable Diffusion 1 and 2 run once for both.
    """
    decode = _network_tflop(AutoencoderKL, "vae", base.vae_config, _latents(base.unet_config), method="decode")
    config = base.unet_config
    both = 2 * unet_tflop(config) if config.get("addition_time_embed_dim") else unet_tflop(config, num_prompts=2)
    return SAMPLING["num_inference_steps"] * both + decode


def unet_tflop(config: Mapping, num_prompts: int = 1) -> float:
    """Counts the TFLOP of a UNet's forward pass for one image with one or several prompts."""
    states = jax.ShapeDtypeStruct((num_prompts, 77, config["cross_attention_dim"]), jnp.float32)
    inputs = [_latents(config), jax.ShapeDtypeStruct((1,), jnp.int32), states]
    style = (1, 4 * config["block_out_channels"][0]) if config.get("num_models") else None
    inputs.append(style and jax.ShapeDtypeStruct(style, jnp.float32))
    if config.get("addition_time_embed_dim"):
        pooled = config["projection_class_embeddings_input_dim"] - NUM_TIME_IDS * config["addition_time_embed_dim"]
        widths = {"text_embeds": pooled, "time_ids": NUM_TIME_IDS}
        inputs.append({name: jax.ShapeDtypeStruct((1, width), jnp.float32) for name, width in widths.items()})
    return _network_tflop(UNet2DConditionModel, "unet", config, *inputs)


def _latents(config):
    return jax.ShapeDtypeStruct((1, config["sample_size"], config["sample_size"], 4), jnp.float32)


def _network_tflop(model, component, config, *inputs, method="__call__") -> float:
    graph = nnx.split(abstract_model(lambda rngs: model.from_config(config, rngs=rngs)))[0]

    def forward(params, *inputs):
        return jax.tree.leaves(getattr(nnx.merge(graph, params), method)(*inputs))

    return flops.count(forward, abstract_params(component, config), *inputs) / 1e12
