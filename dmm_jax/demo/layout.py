"""Where the embedded world's checkpoints lie, and in which of the formats found in the wild."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

import numpy as np

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.export import Recipe, write_folder, write_single_file
from dmm_jax.checkpoints.open import WEIGHTS, Checkpoint, Component
from dmm_jax.checkpoints.safetensors_io import TensorFile, save

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


def teacher_paths(folder: pathlib.Path = FOLDER) -> tuple[tuple[str, str], ...]:
    """Returns ((style, path), ...) as a config's `teachers` wants them."""
    return tuple((name, str(folder / teacher.file)) for name, teacher in TEACHERS.items())


def save_world(folder: pathlib.Path, configs: Mapping, base: Mapping, teachers: Mapping, classifier: Mapping) -> None:
    """Writes the base as a diffusers folder and each teacher in its own form, in float16; the classifier in float32.

    Args:
      configs: config.json of unet, vae and text_encoder, and the scheduler's.
      base: parameters of unet, vae and text_encoder.
      teachers: {style: parameters of unet and text_encoder}.
    """
    tokenizer = folder / "tokenizer"

    def checkpoint(name, params, components, tokenizer_folder=None):
        parts = {part: Component(configs[part], lambda part=part: naming.to_torch(params[part])) for part in components}
        return Checkpoint(pathlib.Path(name), "diffusers", parts, dict(configs["scheduler"]), tokenizer_folder, None)

    everything = checkpoint(BASE, base, ("unet", "vae", "text_encoder"), tokenizer)
    write_folder(folder / BASE, everything, "float16", Recipe("shapes", [], None))
    for name, teacher in TEACHERS.items():
        parts = ("unet", "text_encoder") if teacher.own_text_encoder else ("unet",)
        stock = checkpoint(name, teachers[name], parts)
        recipe = Recipe(f"shapes, {name}", [], None)
        if teacher.file.endswith(".safetensors"):
            write_single_file(folder / teacher.file, stock, "float16", recipe)
        else:
            write_folder(folder / teacher.file, stock, "float16", recipe)
    as_variant(folder / TEACHERS["comic"].file / "unet")
    in_parts(folder / TEACHERS["neon"].file / "unet", 2)
    save(folder / CLASSIFIER, naming.to_torch(classifier), {"format": "pt"})
    for path in tokenizer.iterdir():
        path.unlink()
    tokenizer.rmdir()


def as_variant(folder: pathlib.Path) -> None:
    """Renames a network's weights as hubs name the fp16 variant."""
    stem = WEIGHTS[folder.name]
    (folder / f"{stem}.safetensors").rename(folder / f"{stem}.fp16.safetensors")


def in_parts(folder: pathlib.Path, num_parts: int) -> None:
    """Splits a network's weights into files under an index, as hubs do with large ones."""
    stem = WEIGHTS[folder.name]
    whole = folder / f"{stem}.safetensors"
    file = TensorFile(whole)
    weight_map = {}
    for number, keys in enumerate(np.array_split(sorted(file), num_parts), start=1):
        name = f"{stem}-{number:05d}-of-{num_parts:05d}.safetensors"
        save(folder / name, {str(key): file[str(key)] for key in keys}, {"format": "pt"})
        weight_map |= {str(key): name for key in keys}
    index = {"metadata": {"total_size": file.num_bytes}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    whole.unlink()
