"""What a file says of itself, in its metadata, as text: ModelSpec 1.0.1, the styles' names, and the recipe."""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence

from dmm_jax.checkpoints import licenses
from dmm_jax.checkpoints.architecture import SD2, UNKNOWN
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.formats.diffusers_folder import STYLES_KEY
from dmm_jax.checkpoints.formats.safetensors_io import HASH_PLACEHOLDER

MERGED_FROM = "modelspec.merged_from"
RECIPE_KEY = "dmm_jax.recipe"  # As JSON.
CELL = 8  # Pixels along the side of a latent cell, in every VAE of these models.


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is said about a file inside it."""

    title: str
    merged_from: Sequence[str]  # Names of the parents.
    details: Mapping | None  # The whole recipe; None leaves it out.
    license: str = ""  # Of all parents together.


def metadata(source: Checkpoint, recipe: Recipe, implementation: str) -> dict[str, str]:
    """Returns the metadata of a file that holds networks of `source`; its hash is filled in as it is written.

    Args:
      implementation: "sgm" for single files, "diffusers" for folders.
    """
    said = {
        "format": "pt",  # transformers and diffusers refuse a file that does not say it.
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": implementation,
        "modelspec.title": recipe.title,
        "modelspec.date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.hash_sha256": HASH_PLACEHOLDER,
    }
    if source.has("unet"):
        side = (source.unet_config.get("sample_size") or 64) * CELL
        said["modelspec.architecture"] = architecture(source) + ("/dmm" if source.styles else "")
        said["modelspec.resolution"] = f"{side}x{side}"
    if source.prediction_type != UNKNOWN:
        said["modelspec.prediction_type"] = "v" if source.prediction_type == "v_prediction" else "epsilon"
    if recipe.license:
        said[licenses.MODELSPEC] = recipe.license
    if recipe.merged_from:
        said[MERGED_FROM] = ", ".join(name.replace(",", " ") for name in recipe.merged_from)
    if source.styles:
        said[STYLES_KEY] = json.dumps(list(source.styles))
    if recipe.details is not None:
        said[RECIPE_KEY] = json.dumps(recipe.details, sort_keys=True)
    return said


def architecture(source: Checkpoint) -> str:
    """Returns ModelSpec's name of a checkpoint's architecture, which for Stable Diffusion 2 tells the prediction."""
    if source.architecture != SD2 or source.prediction_type == UNKNOWN:
        return source.architecture
    return f"{SD2}-768-v" if source.prediction_type == "v_prediction" else f"{SD2}-512"
