"""How a checkpoint draws where a call does not say: as the run did that made it."""

import json
from collections.abc import Mapping

from dmm_jax.checkpoints import provenance
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile
from dmm_jax.checkpoints.modelspec import RECIPE_KEY
from dmm_jax.config.options import get_config, solver_options
from dmm_jax.config.serialization import from_json, load_config
from dmm_jax.diffusion import solvers
from dmm_jax.diffusion.schedule import NoiseSchedule
from dmm_jax.runtime.errors import UserError

MAX_CHARS = 1_000_000  # Longer recipes are not read.
MAX_GUIDANCE = 1000.0  # A larger scale draws nothing.
MAX_EXPORTS = 10  # Exports of exports, each with the recipe of the one before.


def recorded_sampling(source: Checkpoint) -> dict[str, object]:
    """Returns arguments of `Pipeline.__call__`: of the run's config, or of the recipe in an export's metadata.

    Other checkpoints, and those whose recipe cannot be used, have the defaults of `config.sampling`.
    """
    if source.kind == "workdir":
        return solver_options(load_config(source.root))
    try:
        recorded = solver_options(from_json(json.dumps(_options(recipe_of(source)))))
        schedule = NoiseSchedule.from_config(source.scheduler_config)
        solvers.plan(recorded["solver"], schedule, recorded["num_inference_steps"])
    except (UserError, RecursionError):  # JSON that is nested too deeply.
        return solver_options(get_config())
    scales = recorded["guidance_scale"], recorded["guidance_rescale"]
    is_usable = abs(scales[0]) <= MAX_GUIDANCE and 0 <= scales[1] <= 1  # Both are false for NaN.
    return recorded if is_usable else solver_options(get_config())


def recipe_of(source: Checkpoint) -> dict:
    """Returns the recipe in the metadata of a checkpoint's UNet; an empty one if there is none that can be read."""
    text = metadata_of(source).get(RECIPE_KEY, "")
    try:
        recipe = json.loads(text) if 0 < len(text) <= MAX_CHARS else {}
    except (ValueError, RecursionError):
        recipe = {}
    return recipe if isinstance(recipe, dict) else {}


def metadata_of(source: Checkpoint) -> dict[str, str]:
    """Returns the metadata of the first file that holds a checkpoint's UNet; an empty one without such a file."""
    files = provenance.unet_files(source)
    return TensorFile(files[0]).metadata if files else {}


def _options(recipe: Mapping) -> Mapping:
    """Returns the options of the run that a recipe begins with; an export of an export nests the earlier recipe."""
    for _ in range(MAX_EXPORTS):
        if "options" in recipe or not isinstance(recipe.get("recipe"), Mapping):
            break
        recipe = recipe["recipe"]
    options = recipe.get("options", {})
    return options if isinstance(options, Mapping) else {}
