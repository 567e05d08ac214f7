"""Where the embedded world's checkpoints lie, and in which of the formats found in the wild."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

import numpy as np

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.formats.lora import PLUS
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, save
from dmm_jax.checkpoints.open import WEIGHTS, Checkpoint, Component
from dmm_jax.checkpoints.write import Recipe, write_folder, write_single_file
from dmm_jax.world.lora_teacher import save_lora

FOLDER = pathlib.Path(__file__).parent / "checkpoints"
BASE = "base"
CLASSIFIER = "shape_classifier.safetensors"


@dataclasses.dataclass(frozen=True)
class Teacher:
    """How one teacher is stored."""

    file: str  # A folder's or a single file's name.
    own_text_encoder: bool = False  # It was fine-tuned with the UNet.
    lora: bool = False  # The file holds low-rank updates of the base's UNet.

    def path(self, folder: pathlib.Path = FOLDER) -> str:
        """Returns the teacher as a checkpoint is given."""
        path = str(folder / self.file)
        return f"{folder / BASE}{PLUS}{path}" if self.lora else path


TEACHERS = {
    "comic": Teacher("comic"),
    "cartoon": Teacher("cartoon.safetensors"),
    "ink": Teacher("ink.safetensors", own_text_encoder=True),
    "neon": Teacher("neon"),
    "blueprint": Teacher("blueprint_lora.safetensors", lora=True),
}


def teacher_paths(folder: pathlib.Path = FOLDER) -> tuple[tuple[str, str], ...]:
    """Returns ((style, path), ...) as a config's `teachers` wants them."""
    return tuple((name, teacher.path(folder)) for name, teacher in TEACHERS.items())


def save_base(
    folder: pathlib.Path, configs: Mapping, base: Mapping, tokenizer: pathlib.Path, classifier: Mapping
) -> None:
    """Writes the base as a diffusers folder in float16, and the classifier in float32.

    Args:
      configs: config.json of unet, vae and text_encoder, and the scheduler's.
      base: parameters of unet, vae and text_encoder.
      tokenizer: the folder of its files.
    """
    stock = _checkpoint(BASE, configs, base, ("unet", "vae", "text_encoder"), tokenizer)
    write_folder(folder / BASE, stock, "float16", Recipe("shapes", [], None))
    save(folder / CLASSIFIER, naming.to_torch(classifier), {"format": "pt"})


def save_teacher(folder: pathlib.Path, configs: Mapping, name: str, params: Mapping, said: Mapping) -> None:
    """Writes a teacher in its own form, in float16.

    Args:
      params: of unet and text_encoder; of a LoRA, its factors under "lora".
      said: what a LoRA's metadata tells of its training.
    """
    teacher = TEACHERS[name]
    if teacher.lora:
        save_lora(folder / teacher.file, name, params["lora"], said)
        return
    parts = ("unet", "text_encoder") if teacher.own_text_encoder else ("unet",)
    write = write_single_file if teacher.file.endswith(".safetensors") else write_folder
    stock = _checkpoint(name, configs, params, parts)
    write(folder / teacher.file, stock, "float16", Recipe(f"shapes, {name}", [], None))
    if name == "comic":
        as_variant(folder / teacher.file / "unet")
    if name == "neon":
        in_parts(folder / teacher.file / "unet", 2)


def _checkpoint(name, configs, params, components, tokenizer_folder=None) -> Checkpoint:
    parts = {part: Component(configs[part], lambda part=part: naming.to_torch(params[part])) for part in components}
    return Checkpoint(pathlib.Path(name), "diffusers", parts, dict(configs["scheduler"]), tokenizer_folder, None)


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
