"""Where the embedded world's checkpoints lie, and in which of the formats found in the wild."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

from dmm_jax.checkpoints import naming, safetensors_io

FOLDER = pathlib.Path(__file__).parent / "checkpoints"
BASE = "base"
CLASSIFIER = "shape_classifier.safetensors"


@dataclasses.dataclass(frozen=True)
class Teacher:
    """How one teacher is stored."""

    file: str  # A folder's or a single file's name.
    own_text_encoder: bool = False  # It was fine-tuned with the UNet.


TEACHERS = {
    "comic": Teacher("comic"),
    "cartoon": Teacher("cartoon.safetensors"),
    "ink": Teacher("ink.safetensors", own_text_encoder=True),
    "neon": Teacher("neon"),
}
