"""Averages checkpoints in weight space, without training, and writes the result as one stock checkpoint."""

import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from dmm_jax.checkpoints import licenses, provenance
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.compare import check_mergeable
from dmm_jax.checkpoints.merge_methods import METHODS, Method, merge_networks, parse_method
from dmm_jax.checkpoints.modelspec import Recipe
from dmm_jax.checkpoints.open import open_checkpoint, open_teacher
from dmm_jax.checkpoints.vae import with_vae
from dmm_jax.checkpoints.write import DTYPES, FLOAT8, write_folder, write_single_file
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.storage import check_output, check_output_file

SINGLE_FILE = ".safetensors"
COMPONENTS = ("unet", "text_encoder")  # What can be merged. The VAE is always the base's: it defines the latents.


class Average(NamedTuple):
    """A written average."""

    path: pathlib.Path
    notes: list[str]  # One line per network: whether it is merged or the base's.


def average(
    out: str | os.PathLike,
    base: str | os.PathLike,
    teachers: Sequence[str | os.PathLike],
    method: str,
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    density: float | None = None,
    seed: int | None = None,
    dtype: str = "float16",
    components: str = ",".join(COMPONENTS),
    prediction_type: str = "",
    vae: str | os.PathLike = "",
) -> Average:
    """Writes a weight average of checkpoints as one stock checkpoint; returns its path and a note per network.

    The checkpoints are read one tensor at a time. The same teachers in any order, under any names and in any file
    format give the same bits.

    Args:
      out: the output: a new single file if the name ends in .safetensors, otherwise a new or empty diffusers folder.
      base: the checkpoint that the teachers were fine-tuned from; it provides every network that is not merged.
      teachers: the checkpoints to merge.
      method: "average" (weighted mean), "task_arithmetic", "ties" or "dare"; see `merge_methods`.
      weights: one per teacher; None for equal weights.
      scale: the factor of the merged difference to the base; None for the method's default.
      density: the share of each difference that is kept, for ties and dare; None for the method's default.
      seed: determines which entries dare drops; None for 0.
      dtype: the dtype of the written tensors: float32, float16, bfloat16, or for a single file float8_e4m3fn.
      components: the networks to merge, separated by commas: unet, text_encoder (which means all text encoders).
      prediction_type: for single files that do not state it; see `open_checkpoint`.
      vae: a file, folder or checkpoint whose VAE replaces the base's; "" keeps it.

    Raises:
      UserError: the output exists, a number is out of range, or the method does not take an option.
      CheckpointError: a checkpoint is damaged or does not fit the base; lists all problems. Nothing is written.
    """
    is_file = pathlib.Path(out).suffix == SINGLE_FILE
    if dtype not in DTYPES and (dtype != FLOAT8 or not is_file):
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, or {FLOAT8} for a single file; got {dtype!r}.")
    parsed = parse_method(method, len(teachers), weights, scale=scale, density=density, seed=seed)
    out = check_output_file(pathlib.Path(out)) if is_file else check_output(out)
    opened = [open_teacher(path, base, prediction_type=prediction_type) for path in teachers]
    opened_base = open_checkpoint(base, prediction_type=prediction_type)
    check_mergeable(opened_base, {str(number): teacher for number, teacher in enumerate(opened, start=1)})
    names = [teacher.name for teacher in opened]
    networks = networks_of(opened_base, components.split(","))
    license = licenses.together(checkpoint.license for checkpoint in (opened_base, *opened))
    recipe = Recipe(f"{method} of {', '.join(names)}", names, describe(opened_base, opened, parsed, networks), license)
    write = write_single_file if is_file else write_folder
    merged = with_vae(merge_networks(opened_base, opened, parsed, networks), vae)
    path = write(out, merged, dtype, recipe)
    return Average(path, _notes(opened_base, opened, networks, method, vae))


def networks_of(base: Checkpoint, components: Sequence[str] = COMPONENTS) -> tuple[str, ...]:
    """Returns the base's networks that `components` names, such as ("unet", "text_encoder", "text_encoder_2").

    Raises:
      UserError: a component is unknown.
    """
    unknown = [name for name in components if name not in COMPONENTS]
    if unknown or not components:
        raise UserError(f"--components takes {', '.join(COMPONENTS)}; got {', '.join(unknown) or 'nothing'}.")
    unet = ("unet",) if "unet" in components else ()
    text_encoders = base.text_encoders if "text_encoder" in components else ()
    return unet + tuple(name for name in text_encoders if base.has(name))


def _notes(base: Checkpoint, teachers: Sequence[Checkpoint], networks: Sequence[str], method: str, vae="") -> list[str]:
    lines = []
    for network in networks:
        names = [
            teacher.name if teacher.has(network) else f"{teacher.name} (the base's: it has none)"
            for teacher in teachers
        ]
        lines.append(f"{network}: {method} of {', '.join(names)}")
    from_base = [name for name in base.components if name not in networks and not (vae and name == "vae")]
    lines += [f"vae: that of {vae}"] if vae else []
    return [*lines, f"{', '.join([*from_base, 'tokenizer'])}: the base's, {base.name}"]


def describe(base: Checkpoint, teachers: Sequence[Checkpoint], method: Method, networks: Sequence[str]) -> dict:
    """Returns the recipe: the method, the merged networks, and each parent's name, files' hashes and weight."""
    options = {option: getattr(method, option) for option in METHODS[method.name]}
    weighted = [
        provenance.record(teacher) | {"weight": weight}
        for teacher, weight in zip(teachers, method.weights, strict=True)
    ]
    return {
        "method": method.name, **options, "networks": list(networks), "base": provenance.record(base),
        "teachers": weighted,
    }  # fmt: skip
