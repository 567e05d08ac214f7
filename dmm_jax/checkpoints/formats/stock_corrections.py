"""Corrects a diffusers folder's configs as diffusers' pipelines do when they open it.

Source: the constructors of StableDiffusionPipeline and StableDiffusionXLPipeline (diffusers 0.42.1). The pipeline of XL
corrects nothing.
"""

import re
import warnings
from collections.abc import Mapping

from dmm_jax.checkpoints.architecture import SDXL, sample_size
from dmm_jax.diffusion.schedule import UNFOLLOWED

FIRST_SOUND_VERSION = (0, 9)  # Before it, diffusers wrote a `sample_size` of images of 256 pixels.
MIN_SAMPLE_SIZE = 64  # The smallest that diffusers believes in a config of before that version.


def corrected_scheduler(config: Mapping, family: str) -> dict:
    """Returns a scheduler_config.json as stock pipelines use it; warns of fields that no solver here follows."""
    if ignored := [name for name in UNFOLLOWED if config.get(name) is True]:
        text = f"the scheduler config sets {', '.join(ignored)}, which no solver here has: the noise levels of the "
        warnings.warn(f"{text}chosen solver are used instead.", stacklevel=2)
    if family == SDXL:
        return dict(config)
    corrected = dict(config) | {"steps_offset": 1}
    defaulted = config.get("_use_default_values")
    if isinstance(defaulted, list):  # The correction is not a default, and so solvers of other classes keep it.
        corrected["_use_default_values"] = [name for name in defaulted if name != "steps_offset"]
    return corrected | ({"clip_sample": False} if config.get("clip_sample") is True else {})


def corrected_unet(config: Mapping, family: str) -> dict:
    """Returns a UNet's config.json with a `sample_size`, and one number for a list of equal ones."""
    corrected = dict(config)
    for name in ("sample_size", "cross_attention_dim"):
        if isinstance(value := config.get(name), list) and value and value.count(value[0]) == len(value):
            corrected[name] = value[0]
    if corrected.get("sample_size") is None:
        corrected["sample_size"] = sample_size(family)
    version = re.match(r"(\d{1,6})\.(\d{1,6})", str(config.get("_diffusers_version")))
    is_old = version is not None and tuple(map(int, version.groups())) < FIRST_SOUND_VERSION
    if is_old and family != SDXL and isinstance(corrected["sample_size"], int):
        corrected["sample_size"] = max(corrected["sample_size"], MIN_SAMPLE_SIZE)
    return corrected
