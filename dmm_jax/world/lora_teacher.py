"""The embedded world's LoRA teacher: factors on the UNet's layers, folded in as it trains, stored as kohya-ss does.

LoRA, arXiv:2106.09685, eq. 3: W + alpha / rank * up @ down. Keys, alpha and metadata follow kohya-ss/sd-scripts,
`networks.lora` with `conv_dim`: layers of the transformer blocks, and the residual blocks with their convolutions.
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
BLOCKS = ("attentions", "resnets", "downsamplers", "upsamplers")  # kohya-ss leaves what lies outside these alone.
DOWN, UP = "lora_down", "lora_up"


def new_factors(unet: Mapping, key: jax.Array) -> dict:
    """Returns {...: {"lora_down": {"kernel"}, "lora_up": {"kernel"}}} below each layer; `up` is 0, so the sum is W."""
    factors: dict = {}
    for number, (path, kernel) in enumerate(naming.flat(unet)):
        if path[-1] != "kernel" or not set(BLOCKS) & set(path):
            continue
        *spatial, into, out = kernel.shape
        bound = (into * int(np.prod(spatial))) ** -0.5  # PyTorch's initial scale.
        down = jax.random.uniform(jax.random.fold_in(key, number), (*spatial, into, RANK), minval=-bound, maxval=bound)
        layer = factors
        for name in path[:-1]:
            layer = layer.setdefault(name, {})
        layer[DOWN], layer[UP] = {"kernel": down}, {"kernel": jnp.zeros((*[1] * len(spatial), RANK, out))}
    return factors


def folded(unet: Mapping, factors: Mapping) -> dict:
    """Returns the UNet's parameters with the factors' products added."""
    if DOWN in factors:
        up = factors[UP]["kernel"]
        delta = ALPHA / RANK * jnp.tensordot(factors[DOWN]["kernel"], up.reshape(up.shape[-2:]), 1)
        return {**unet, "kernel": unet["kernel"] + delta}
    return {**unet, **{name: folded(unet[name], below) for name, below in factors.items()}}


def save_lora(path: pathlib.Path, name: str, factors: Mapping, said: Mapping[str, object]) -> None:
    """Writes factors in float16 with kohya-ss's keys and metadata.

    Args:
      name: the style's.
      said: what else the metadata tells of the training, without the prefix "ss_".
    """
    tensors = {}
    for key, array in naming.to_torch(factors).items():
        layer, role, leaf = key.rsplit(".", 2)
        layer = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{layer}.{role}.{leaf}"] = array.astype(np.float16)
        tensors[f"{layer}.alpha"] = np.array(ALPHA, np.float16)
    save(path, tensors, metadata(name, said))


def metadata(name: str, said: Mapping[str, object]) -> dict[str, str]:
    """Returns what kohya-ss writes of such a file, as text: of the network, of the training, and ModelSpec's."""
    about = {
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
    return {f"ss_{key}": str(value) for key, value in (about | dict(said)).items()} | {
        f"modelspec.{key}": value for key, value in modelspec.items()
    }
