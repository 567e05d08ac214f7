"""The embedded world's shipped checkpoints: their paths, and how the recipe writes them.

Together the teachers have the formats that users meet: a folder with fp16 variant files, a folder with sharded weights,
a single file with and without a text encoder, and a LoRA on the base.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component
from dmm_jax.checkpoints.formats.diffusers_folder import WEIGHTS
from dmm_jax.checkpoints.formats.lora import PLUS
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, save
from dmm_jax.checkpoints.modelspec import Recipe
from dmm_jax.checkpoints.shipped import FOLDER
from dmm_jax.checkpoints.write import write_folder, write_single_file
from dmm_jax.world.lora_teacher import save_lora

BASE = "base"
CLASSIFIER = "shape_classifier.safetensors"


@dataclasses.dataclass(frozen=True)
class Teacher:
    """How one teacher is stored."""

    file: str  # Name of a folder or of a single file.
    own_text_encoder: bool = False  # Its text encoder was fine-tuned together with the UNet.
    lora: bool = False  # The file holds low-rank updates of the base's UNet.
    fp16_variant: bool = False  # The UNet's file carries the name of the fp16 variant.
    num_shards: int = 1  # The UNet's weights are split into this many files.

    def path(self, folder: pathlib.Path = FOLDER) -> str:
        """Returns the teacher's path as configs write it; a LoRA is "BASE + FILE"."""
        path = str(folder / self.file)
        return f"{folder / BASE}{PLUS}{path}" if self.lora else path


TEACHERS = {
    "comic": Teacher("comic", fp16_variant=True),
    "cartoon": Teacher("cartoon.safetensors"),
    "ink": Teacher("ink.safetensors", own_text_encoder=True),
    "neon": Teacher("neon", num_shards=2),
    "blueprint": Teacher("blueprint_lora.safetensors", lora=True),
}


def teacher_paths(folder: pathlib.Path = FOLDER) -> tuple[tuple[str, str], ...]:
    """Returns ((style, path), ...), the value of a config's `teachers`."""
    return tuple((name, teacher.path(folder)) for name, teacher in TEACHERS.items())


def save_base(
    folder: pathlib.Path, configs: Mapping, base: Mapping, tokenizer: pathlib.Path, classifier: Mapping
) -> None:
    """Writes the base as a diffusers folder in float16, and the classifier in float32.

    Args:
      configs: contents of config.json for unet, vae and text_encoder, and of the scheduler's.
      base: parameters of unet, vae and text_encoder.
      tokenizer: folder of the tokenizer's files.
      classifier: the classifier's parameters.
    """
    stock = stock_checkpoint(BASE, configs, base, ("unet", "vae", "text_encoder"), tokenizer)
    write_folder(folder / BASE, stock, "float16", Recipe("shapes", [], None))
    save(folder / CLASSIFIER, naming.to_torch(classifier), {"format": "pt"})


def save_teacher(folder: pathlib.Path, configs: Mapping, name: str, params: Mapping, lora_training: Mapping) -> None:
    """Writes a teacher in its format, in float16.

    Args:
      configs: as `save_base` takes them.
      params: parameters of unet and text_encoder; for a LoRA, its factors under "lora".
      lora_training: facts about the training for a LoRA's metadata.
    """
    teacher = TEACHERS[name]
    path = folder / teacher.file
    if teacher.lora:
        save_lora(path, name, params["lora"], lora_training)
        return
    components = ("unet", "text_encoder") if teacher.own_text_encoder else ("unet",)
    write = write_single_file if path.suffix == ".safetensors" else write_folder
    write(path, stock_checkpoint(name, configs, params, components), "float16", Recipe(f"shapes, {name}", [], None))
    if teacher.fp16_variant:
        rename_to_fp16_variant(path / "unet")
    if teacher.num_shards > 1:
        split_into_shards(path / "unet", teacher.num_shards)


def stock_checkpoint(
    name: str,
    configs: Mapping,
    params: Mapping,
    components: Sequence[str],
    tokenizer_folder: pathlib.Path | None = None,
) -> Checkpoint:
    """Returns trained networks as a checkpoint that can be written.

    Args:
      configs: as `save_base` takes them.
      params: the networks' parameters, by component.
    """
    parts = {part: Component(configs[part], lambda part=part: naming.to_torch(params[part])) for part in components}
    return Checkpoint(pathlib.Path(name), "diffusers", parts, dict(configs["scheduler"]), tokenizer_folder, None)


def rename_to_fp16_variant(folder: pathlib.Path) -> None:
    """Renames a network's weights to the fp16 variant's file name on hubs."""
    stem = WEIGHTS[folder.name]
    (folder / f"{stem}.safetensors").rename(folder / f"{stem}.fp16.safetensors")


def split_into_shards(folder: pathlib.Path, num_shards: int) -> None:
    """Splits a network's weights into several files with an index, the form of large networks on hubs."""
    stem = WEIGHTS[folder.name]
    path = folder / f"{stem}.safetensors"
    tensors = TensorFile(path)
    weight_map = {}
    for number, keys in enumerate(np.array_split(sorted(tensors), num_shards), start=1):
        name = f"{stem}-{number:05d}-of-{num_shards:05d}.safetensors"
        save(folder / name, {str(key): tensors[str(key)] for key in keys}, {"format": "pt"})
        weight_map |= {str(key): name for key in keys}
    index = {"metadata": {"total_size": tensors.num_bytes}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    path.unlink()
