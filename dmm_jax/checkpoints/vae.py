"""Replaces a checkpoint's VAE by that of another file, for pictures without a trained VAE's faults (`--vae FILE`).

The VAEs of Stable Diffusion 1, 2 and XL have the same tensors and shapes, but XL's latents are others. So a file's
family is read from its config or metadata. If they state none, its encoder is compared with that of the VAE that it
replaces: a fine-tuned encoder points the same way, and encoders of separate trainings have nothing in common.
"""

import dataclasses
import functools
import os
import pathlib
import warnings
from collections.abc import Mapping

import numpy as np

from dmm_jax.checkpoints import architecture, naming
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component, Place
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.diffusers_folder import WEIGHTS, read_json, weight_files
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, Tensors, shape_of
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.open_single_file import open_vae_file

FIRST_DIFFUSERS_KEY = "encoder.down_blocks.0.resnets.0.conv1.weight"
SAME_TRAINING = 0.5  # The cosine of related encoders is near 1, that of others near 0.


def with_vae(checkpoint: Checkpoint, path: str | os.PathLike | None) -> Checkpoint:
    """Returns a checkpoint with another VAE; without a path, the same checkpoint.

    Args:
      path: a VAE's file (LDM's keys or diffusers'), its diffusers folder, or a whole checkpoint that holds one.

    Warns:
      The file does not state its family, and its encoder is unlike the checkpoint's own.

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
    blocks = vae.config["block_out_channels"]
    if not isinstance(blocks, (list, tuple)):
        raise CheckpointError(f"the VAE {path}: its block_out_channels {blocks!r:.50} is no list.")
    if len(blocks) != len(own["block_out_channels"]):
        raise CheckpointError(f"the VAE {path} has other latent cells than that of {checkpoint.path}.")
    fields = {name: own[name] for name in ("scaling_factor", "sample_size") if name in own}
    replaced = Component(vae.config | fields, vae.load, pathlib.Path(path))
    changed = dataclasses.replace(
        checkpoint,
        components={**checkpoint.components, "vae": replaced},
        from_base=tuple(name for name in checkpoint.from_base if name != "vae"),
    )
    naming.check_keys(changed.shapes("vae"), replaced.tensors, f"vae {path}")
    is_related = "scaling_factor" in stated or (
        encoder_similarity(replaced.tensors, checkpoint.tensors("vae")) > SAME_TRAINING
    )
    if not is_related:
        warnings.warn(
            f"{path} does not state its family, and its encoder is unlike that of the VAE that it replaces. VAEs of "
            "Stable Diffusion 1 and XL have the same tensors; with the other family's, pictures have wrong colours. "
            "Look at a picture first; a folder whose config.json states scaling_factor removes the doubt.",
            stacklevel=2,
        )
    return changed


def encoder_similarity(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> float:
    """Returns the median cosine of the angles between the matrices and kernels of two VAEs' encoders."""
    cosines = []
    for key in first:
        if key.startswith("encoder.") and key.endswith(".weight") and key in second:
            vector, other = (np.asarray(tensors[key], np.float32).ravel() for tensors in (first, second))
            if len(vector) == len(other) and len(shape_of(first, key)) > 1:
                with np.errstate(all="ignore"):  # Damage is reported when the tensors are used.
                    cosines.append(float(vector @ other / (np.linalg.norm(vector) * np.linalg.norm(other))))
    return float(np.median(cosines)) if cosines else 0.0


def _open(path: pathlib.Path, own: dict) -> tuple[Component, dict]:
    """Returns a VAE, and the fields of its config that its files state."""
    if path.is_dir() and (path / "config.json").is_file() and not (path / "model_index.json").is_file():
        config = read_json(path / "config.json")
        if not _is_vae(config):
            raise CheckpointError(f"{path} is not the folder of a VAE: its config.json is of another network.")
        places = {key: Place(file, key) for file in weight_files(path, WEIGHTS["vae"]) for key in file}
        return Component(config, functools.partial(Tensors, places)), config
    if path.is_dir():
        checkpoint = open_checkpoint(path)
        return Component(checkpoint.vae_config, lambda: checkpoint.tensors("vae")), checkpoint.vae_config
    file = TensorFile(path)
    if FIRST_DIFFUSERS_KEY in file:
        places = {key: Place(file, key) for key in file}
        beside = path.parent / "config.json"
        config = read_json(beside) if beside.is_file() else {}
        # Without a config, its shapes must be those of the VAE that it replaces.
        stated = config if _is_vae(config) else _stated(file)
        return Component(dict(config if _is_vae(config) else own), functools.partial(Tensors, places)), stated
    if any(key.startswith(("model.diffusion_model.", "diffusion_model.")) for key in file):
        checkpoint = open_checkpoint(path, allow_unsupported=True)
        return Component(checkpoint.vae_config, lambda: checkpoint.tensors("vae")), checkpoint.vae_config
    vae = open_vae_file(file)
    return vae, {"latent_channels": vae.config["latent_channels"]} | _stated(file)


def _is_vae(config: Mapping) -> bool:
    return config.get("_class_name", "AutoencoderKL") == "AutoencoderKL" and "block_out_channels" in config


def _stated(file: TensorFile) -> dict:
    """Returns the scaling factor of the family in a file's metadata; {} if they name none that is known."""
    name = file.metadata.get("modelspec.architecture", "")
    for family in (architecture.SDXL, architecture.SD2, architecture.SD1):
        if name.startswith(family):
            return {"scaling_factor": architecture.vae_scale(family)}
    return {}
