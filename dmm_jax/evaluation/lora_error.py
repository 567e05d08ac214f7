"""Measures a LoRA that `export` wrote: how far one UNet evaluation with the LoRA is from one with the real weights."""

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dmm_jax.checkpoints import export_lora
from dmm_jax.checkpoints.abstract import abstract_model
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.formats.lora import with_loras
from dmm_jax.kernels.attention import choose_implementation
from dmm_jax.models.network import Network, cast_params
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel
from dmm_jax.models.unet_config import per_axis

TIMESTEP, MAX_SIDE, TOKENS = 500, 32, 77


class LoraError(NamedTuple):
    """The largest differences from the output of a checkpoint's UNet, relative to the output's maximum."""

    lora: float  # The base's with the LoRA.
    base: float  # The base's alone.

    def __str__(self) -> str:
        return f"one UNet evaluation differs by {self.lora:.1e} of the maximum; the base without it by {self.base:.1e}"


def print_lora_errors(student: Checkpoint, base: Checkpoint, files: Mapping[pathlib.Path, str], style: str) -> None:
    """Prints a line per LoRA of an export, in the order of the styles.

    Args:
      student: the checkpoint that was exported.
      files: {LoRA file: the name of its mix}.
      style: the mix that was exported; "" for every style.
    """
    mixes = export_lora.mixes_of(student, style)
    for file, name in files.items():
        print(f"{file}: {lora_error(export_lora.folded(student, mixes[name]), base, file)}")


def lora_error(changed: Checkpoint, base: Checkpoint, file: pathlib.Path) -> LoraError:
    """Evaluates the UNets of a checkpoint, of its base, and of the base with a LoRA file, on the same random inputs."""
    config = changed.unet_config
    implementation = choose_implementation("auto", jnp.dtype("float32"), num_devices=jax.local_device_count())

    def build(rngs):
        options = {"dtype": jnp.dtype("float32"), "attention_implementation": implementation}
        return UNet2DConditionModel.from_config(config, rngs=rngs, **options)

    graph, _ = nnx.split(abstract_model(build))
    side = min(MAX_SIDE, *per_axis(config.get("sample_size") or MAX_SIDE))
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.standard_normal((1, side, side, config.get("in_channels", 4)), np.float32))
    states = jnp.asarray(rng.standard_normal((1, TOKENS, config["cross_attention_dim"]), np.float32))
    added = None
    if config.get("addition_embed_type") == "text_time":
        width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        pixels = 8.0 * side
        added = {
            "text_embeds": jnp.asarray(rng.standard_normal((1, width), np.float32)),
            "time_ids": jnp.array([[pixels, pixels, 0, 0, pixels, pixels]], jnp.float32),
        }

    @jax.jit
    def evaluate(params):
        return Network(graph, params)(latents, jnp.array([TIMESTEP]), states, None, added).sample

    with_lora = with_loras(base, file, [(file, 1.0)])
    with jax.default_matmul_precision("highest"):
        expected, output, of_base = (
            np.asarray(evaluate(cast_params(it.params("unet"), jnp.float32))) for it in (changed, with_lora, base)
        )
    largest = np.abs(expected).max()
    return LoraError(*(float(np.abs(it - expected).max() / largest) for it in (output, of_base)))
