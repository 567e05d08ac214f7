"""The embedded world's LoRA teacher: low-rank factors of the UNet's layers, how they train, and their kohya-ss file.

The rule is W + alpha / rank * up @ down (LoRA, arXiv:2106.09685, eq. 3). Keys, alpha and metadata follow
kohya-ss/sd-scripts' `networks.lora` with `conv_dim`: factors for the transformer blocks' layers and for the residual
blocks' layers and convolutions.
"""

import json
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.formats.safetensors_io import HASH_PLACEHOLDER, save

RANK, ALPHA = 16, 8.0
BLOCKS = ("attentions", "resnets", "downsamplers", "upsamplers")  # kohya-ss has no factors outside these.
DOWN, UP = "lora_down", "lora_up"


def new_factors(unet: Mapping, key: jax.Array) -> dict:
    """Returns {"lora_down": {"kernel"}, "lora_up": {"kernel"}} at each layer's path; `up` is 0, so the sum is W."""
    factors: dict = {}
    for number, (path, kernel) in enumerate(naming.flat(unet)):
        if path[-1] != "kernel" or not set(BLOCKS) & set(path):
            continue
        *spatial, size_in, size_out = kernel.shape
        bound = (size_in * int(np.prod(spatial))) ** -0.5  # PyTorch's initial scale.
        down_key = jax.random.fold_in(key, number)
        down = jax.random.uniform(down_key, (*spatial, size_in, RANK), minval=-bound, maxval=bound)
        layer = factors
        for name in path[:-1]:
            layer = layer.setdefault(name, {})
        layer[DOWN], layer[UP] = {"kernel": down}, {"kernel": jnp.zeros((*[1] * len(spatial), RANK, size_out))}
    return factors


def folded(unet: Mapping, factors: Mapping) -> dict:
    """Returns the UNet's parameters with the factors' products added."""
    if DOWN in factors:
        up = factors[UP]["kernel"]
        delta = ALPHA / RANK * jnp.tensordot(factors[DOWN]["kernel"], up.reshape(up.shape[-2:]), 1)
        return {**unet, "kernel": unet["kernel"] + delta}
    return {**unet, **{name: folded(unet[name], children) for name, children in factors.items()}}


def save_lora(path: pathlib.Path, name: str, factors: Mapping, training: Mapping[str, object]) -> None:
    """Writes factors in float16 with kohya-ss's keys and metadata.

    Args:
      name: the style's name.
      training: metadata about the training; keys without the prefix "ss_".
    """
    tensors = {}
    for key, array in naming.to_torch(factors).items():
        layer, role, leaf = key.rsplit(".", 2)
        layer = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{layer}.{role}.{leaf}"] = array.astype(np.float16)
        tensors[f"{layer}.alpha"] = np.array(ALPHA, np.float16)
    save(path, tensors, metadata(name, training))


def metadata(name: str, training: Mapping[str, object]) -> dict[str, str]:
    """Returns kohya-ss's metadata about network and training, and ModelSpec's fields; all values are text."""
    network = {
        "output_name": name,
        "network_module": "networks.lora",
        "network_dim": RANK,
        "network_alpha": ALPHA,
        "network_args": json.dumps({"conv_dim": str(RANK), "conv_alpha": str(ALPHA)}),
        "base_model_version": "sd_v1",
        "v2": False,
    }
    modelspec = {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-v1/lora",
        "implementation": "diffusers",
        "title": name,
        "hash_sha256": HASH_PLACEHOLDER,
    }
    return {f"ss_{key}": str(value) for key, value in (network | dict(training)).items()} | {
        f"modelspec.{key}": value for key, value in modelspec.items()
    }
