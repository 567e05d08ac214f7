"""Makes the metadata of a safetensors file: ModelSpec 1.0.1, the styles' names, and the recipe."""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence

from dmm_jax.checkpoints import licenses
from dmm_jax.checkpoints.architecture import CELL, SD2, UNKNOWN
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.clip_skip import METADATA_KEY
from dmm_jax.checkpoints.formats.diffusers_folder import STYLES_KEY
from dmm_jax.checkpoints.formats.safetensors_io import HASH_PLACEHOLDER
from dmm_jax.models.unet_config import per_axis

MERGED_FROM = "modelspec.merged_from"
RECIPE_KEY = "dmm_jax.recipe"  # Its value is JSON.


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The facts about a model's origin that its files state in their metadata."""

    title: str
    merged_from: Sequence[str]  # Names of the parents.
    details: Mapping | None  # The complete recipe, ready for JSON; None leaves it out.
    license: str = ""  # The licences of all parents together.


def metadata(source: Checkpoint, recipe: Recipe, implementation: str) -> dict[str, str]:
    """Returns the metadata of a file that holds networks of `source`; its hash is filled in when it is written.

    Args:
      implementation: "sgm" for single files, "diffusers" for folders.
    """
    fields = {
        "format": "pt",  # transformers and diffusers refuse a file without it.
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": implementation,
        "modelspec.title": recipe.title,
        "modelspec.date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.hash_sha256": HASH_PLACEHOLDER,
    }
    if source.has("unet"):
        height, width = (cells * CELL for cells in per_axis(source.unet_config.get("sample_size") or 64))
        fields["modelspec.architecture"] = architecture(source) + ("/dmm" if source.styles else "")
        fields["modelspec.resolution"] = f"{width}x{height}"
    if source.prediction_type != UNKNOWN:
        fields["modelspec.prediction_type"] = "v" if source.prediction_type == "v_prediction" else "epsilon"
    if recipe.license:
        fields[licenses.MODELSPEC] = recipe.license
    if recipe.merged_from:
        fields[MERGED_FROM] = ", ".join(name.replace(",", " ") for name in recipe.merged_from)
    if source.clip_skip != 1:
        fields[METADATA_KEY] = str(source.clip_skip)
    if source.styles:
        fields[STYLES_KEY] = json.dumps(list(source.styles))
    if recipe.details is not None:
        fields[RECIPE_KEY] = json.dumps(recipe.details, sort_keys=True)
    return fields


def architecture(source: Checkpoint) -> str:
    """Returns ModelSpec's name of a checkpoint's architecture; for Stable Diffusion 2 it includes the prediction."""
    if source.architecture != SD2 or source.prediction_type == UNKNOWN:
        return source.architecture
    return f"{SD2}-768-v" if source.prediction_type == "v_prediction" else f"{SD2}-512"
