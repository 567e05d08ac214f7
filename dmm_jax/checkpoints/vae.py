"""Replaces a checkpoint's VAE by that of another file, for pictures without a trained VAE's faults (`--vae FILE`)."""

import dataclasses
import functools
import os
import pathlib

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component, Place
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.diffusers_folder import WEIGHTS, read_json, weight_files
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, Tensors
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.open_single_file import open_vae_file

FIRST_DIFFUSERS_KEY = "encoder.down_blocks.0.resnets.0.conv1.weight"


def with_vae(checkpoint: Checkpoint, path: str | os.PathLike | None) -> Checkpoint:
    """Returns a checkpoint with another VAE; without a path, the same checkpoint.

    Args:
      path: a VAE's file (LDM's keys or diffusers'), its diffusers folder, or a whole checkpoint that holds one.

    Raises:
      CheckpointError: the path holds no VAE, or one with other latents than the checkpoint's own.
    """
    if not path:
        return checkpoint
    own = checkpoint.config("vae")
    vae, stated = _open(pathlib.Path(path), own)
    for field in ("latent_channels", "scaling_factor"):
        if field in stated and stated[field] != own.get(field, stated[field]):
            raise CheckpointError(
                f"the VAE {path} has {field} {stated[field]}, that of {checkpoint.path} {own[field]}: it belongs to "
                "another family, and its latents are others. Give a VAE of this family."
            )
    if len(vae.config["block_out_channels"]) != len(own["block_out_channels"]):
        raise CheckpointError(f"the VAE {path} has other latent cells than that of {checkpoint.path}.")
    fields = {name: own[name] for name in ("scaling_factor", "sample_size") if name in own}
    replaced = Component(vae.config | fields, vae.load)
    changed = dataclasses.replace(
        checkpoint,
        components={**checkpoint.components, "vae": replaced},
        from_base=tuple(name for name in checkpoint.from_base if name != "vae"),
    )
    naming.check_keys(changed.shapes("vae"), replaced.tensors, f"vae {path}")
    return changed


def _open(path: pathlib.Path, own: dict) -> tuple[Component, dict]:
    """Returns a VAE, and the fields of its config that its files state."""
    if path.is_dir() and (path / "config.json").is_file() and not (path / "model_index.json").is_file():
        config = read_json(path / "config.json")
        if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL" or "block_out_channels" not in config:
            raise CheckpointError(f"{path} is not the folder of a VAE: its config.json is of another network.")
        places = {key: Place(file, key) for file in weight_files(path, WEIGHTS["vae"]) for key in file}
        return Component(config, functools.partial(Tensors, places)), config
    if path.is_dir():
        checkpoint = open_checkpoint(path)
        return Component(checkpoint.vae_config, lambda: checkpoint.tensors("vae")), checkpoint.vae_config
    file = TensorFile(path)
    if (
        FIRST_DIFFUSERS_KEY in file
    ):  # Such a file states no config: its shapes must be those of the VAE that it replaces.
        places = {key: Place(file, key) for key in file}
        return Component(dict(own), functools.partial(Tensors, places)), {}
    if any(key.startswith(("model.diffusion_model.", "diffusion_model.")) for key in file):
        checkpoint = open_checkpoint(path, allow_unsupported=True)
        return Component(checkpoint.vae_config, lambda: checkpoint.tensors("vae")), checkpoint.vae_config
    vae = open_vae_file(file)
    return vae, {name: vae.config[name] for name in ("latent_channels",)}
