"""Writes the difference between a checkpoint and its base as LoRA files: one for a mix, or one for each style."""

import json
import math
import pathlib
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import extract_lora
from dmm_jax.checkpoints.formats.adapter_facts import STYLE_BASE
from dmm_jax.checkpoints.formats.extract_lora import Rank
from dmm_jax.checkpoints.formats.lora_tools import DIFFUSERS, SUFFIXES, adapter_metadata, spellings
from dmm_jax.checkpoints.formats.safetensors_io import save
from dmm_jax.checkpoints.modelspec import Recipe, architecture, metadata
from dmm_jax.checkpoints.styles import BIAS, fold_style
from dmm_jax.checkpoints.write import DTYPES
from dmm_jax.config.styles import parse_style, style_row
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.processes import say

STEM = "lora"
WHOLE = BIAS.removesuffix(".bias")  # A1111 reads the bias of a layer only next to the whole difference of its weight.
# {family: what kohya's metadata calls it}
BASE_VERSIONS = {
    "stable-diffusion-v1": "sd_v1",
    "stable-diffusion-v2": "sd_v2",
    "stable-diffusion-xl-v1-base": "sdxl_base_v1-0",
}


def write_loras(
    folder: pathlib.Path,
    student: Checkpoint,
    base: Checkpoint,
    mixes: Mapping[str, np.ndarray | None],
    rank: Rank,
    dtype: str,
    tools: Sequence[str],
    about: Callable[[str], Recipe],
    base_record: Mapping,
    exact: bool = False,
    progress: Callable = lambda keys: keys,
) -> list[pathlib.Path]:
    """Writes one LoRA per mix, and per spelling that the tools need; returns their paths.

    All styles of a student differ in one bias alone, so the layers are decomposed once.

    Args:
      student: a merged checkpoint, or a stock one with the only mix None.
      base: the checkpoint on which the LoRAs are used.
      mixes: {name: weights of the styles (N,)}.
      tools: names of `lora_tools.TOOLS`.
      about: returns the recipe of a mix, from its name.
      base_record: what the metadata states about the base.
    """
    stems, paths, shared = _stems(list(mixes)), [], None
    matrices = (WHOLE,) if "a1111" in tools else ()
    for line in networks_left_out(student, base):
        say(line)
    if line := other_prediction(student, base):
        warnings.warn(line, stacklevel=2)
    for name, weights in mixes.items():
        changed = folded(student, weights)
        if shared is None:
            wall, busy = time.perf_counter(), time.process_time()
            result = shared = extract_lora.extract(changed, base, rank, DTYPES[dtype], exact, progress)
            wall, busy = time.perf_counter() - wall, time.process_time() - busy
            say(f"{len(result.factors)} layers decomposed in {wall:.1f} s, {busy:.1f} s of processor time.")
        else:
            result = extract_lora.with_vector(shared, ("unet", BIAS), _bias_difference(changed, base))
        for spelling in spellings(tools):
            path = folder / f"{stems[name]}{SUFFIXES[spelling]}.safetensors"
            stored = extract_lora.without_norms(result) if spelling == DIFFUSERS else result
            tensors = extract_lora.tensors_of(stored, spelling, changed.architecture, changed.unet_config, matrices)
            facts = _metadata(changed, base, about(name), base_record, stored)
            save(path, tensors, facts | (adapter_metadata(tensors) if spelling == DIFFUSERS else {}))
            paths.append(path)
            say(f"{path.name}: {extract_lora.described(stored)}.")
            if matrices and spelling != DIFFUSERS:
                say(f"{path.name}: {_unread_by_a1111(stored, matrices)}")
    return paths


def mixes_of(student: Checkpoint, style: str) -> dict[str, np.ndarray | None]:
    """Returns {name: weights (N,)} of the LoRAs of an export: of a mix, or one per style; one of a stock checkpoint."""
    if student.styles is None:
        return {student.name: None}
    if style:
        return {style: style_row(parse_style(style), student.styles)}
    return {name: style_row(name, student.styles) for name in student.styles}


def places(folder: pathlib.Path, student: Checkpoint, style: str, tools: Sequence[str]) -> dict[pathlib.Path, str]:
    """Returns {LoRA file: the name of its mix} of an export into a folder, in the order in which they are written."""
    stems = _stems(list(mixes_of(student, style)))
    suffixes = [SUFFIXES[spelling] for spelling in spellings(tools)]
    return {folder / f"{stem}{suffix}.safetensors": name for name, stem in stems.items() for suffix in suffixes}


def folded(student: Checkpoint, weights: np.ndarray | None) -> Checkpoint:
    """Returns the stock checkpoint of a mix; a stock checkpoint itself, without weights."""
    return student if weights is None else fold_style(student, weights)


def refuse_equal(student: Checkpoint, base: Checkpoint, mixes: Mapping[str, np.ndarray | None]) -> None:
    """Refuses an export of mixes that equal the base; reads little if none does.

    Raises:
      UserError: names these mixes.
    """
    if student.styles is None:
        return  # `extract` refuses it.
    pairs = extract_lora.differences(folded(student, next(iter(mixes.values()))), base)  # Checks the shapes.
    vectors = {name: _bias_difference(folded(student, weights), base) for name, weights in mixes.items()}
    equal = [name for name, vector in vectors.items() if not vector.any()]
    rest = (it for it in pairs if (it.network, it.key) != ("unet", BIAS))
    if not equal or any(np.any(np.asarray(it.new[it.key]) != np.asarray(it.old[it.key])) for it in rest):
        return
    names = ", ".join(repr(name) for name in equal)
    others = [name for name in student.styles if name not in equal]
    advice = f" Choose another style by --style: {', '.join(others)}." if others else ""
    raise UserError(f"{names} of {student.path} equals the base {base.path}: a LoRA of it would be empty.{advice}")


def networks_left_out(changed: Checkpoint, base: Checkpoint) -> list[str]:
    """Returns a sentence for each network that the LoRA does not hold although the checkpoints differ in it."""
    lines = []
    for name in changed.text_encoders:
        if changed.has(name) and not base.has(name):
            lines.append(f"The LoRA leaves out the {name} of {changed.path}: {base.path} has none to compare it with.")
    if changed.has("vae") and base.has("vae") and "vae" not in changed.from_base:
        try:
            is_same = _is_same_vae(changed, base)
        except CheckpointError as error:
            lines.append(f"The VAEs were not compared, since one cannot be read: {error}")
        else:
            line = f"The LoRA leaves out the VAE of {changed.path}, which differs from the base's."
            lines += [] if is_same else [line]
    return lines


def _is_same_vae(changed, base) -> bool:
    """Tells whether two VAEs are equal up to the rounding of bfloat16."""
    if changed.components["vae"] is base.components["vae"]:
        return True
    if changed.shapes("vae") != base.shapes("vae"):
        return False
    new, old = (naming.checked_tensors(it.shapes("vae"), it.tensors("vae"), it.where("vae")) for it in (changed, base))
    return all(np.allclose(np.float32(new[key]), np.float32(old[key]), rtol=2**-7, atol=1e-6) for key in new)


def other_prediction(changed: Checkpoint, base: Checkpoint) -> str:
    """Returns a sentence if a checkpoint and its base differ in prediction type or terminal SNR; "" if they do not."""
    facts = {}
    for name, it in (("changed", changed), ("base", base)):
        zero = ", zero terminal SNR" if it.scheduler_config.get("rescale_betas_zero_snr") else ""
        facts[name] = f"{it.prediction_type}{zero}"
    if facts["changed"] == facts["base"]:
        return ""
    return (
        f"{changed.path} predicts {facts['changed']}, and its base {base.path} predicts {facts['base']}. No tool reads "
        f"this from a LoRA: set {facts['changed']} by hand, or the pictures are noise."
    )


def _unread_by_a1111(result, matrices) -> str:
    unread = extract_lora.unread_biases(result, matrices)
    squared = math.fsum(float(np.square(result.vectors[it], dtype=np.float64).sum()) for it in unread)
    names = f", such as {'.'.join(unread[0])}" if unread else ""
    return (
        f"A1111 does not read the differences of {len(unread)} biases{names}: "
        f"{100 * squared / result.squared:.2g} % of the squared difference."
    )


def _bias_difference(changed: Checkpoint, base: Checkpoint) -> np.ndarray:
    new, old = (np.asarray(it.tensors("unet")[BIAS], np.float32) for it in (changed, base))
    return new - old


def _stems(names: Sequence[str]) -> dict[str, str]:
    """Returns a file's name for every mix, of plain letters and digits alone."""
    if len(names) == 1:
        return {names[0]: STEM}
    stems = {}
    for number, name in enumerate(names):
        plain = re.sub(r"[^A-Za-z0-9-]+", "_", name)[:60].strip("_")
        stem = f"{STEM}_{plain}" if plain else f"{STEM}_{number}"
        stems[name] = stem if stem.lower() not in {other.lower() for other in stems.values()} else f"{stem}_{number}"
    return stems


def _metadata(changed: Checkpoint, base: Checkpoint, recipe: Recipe, record: Mapping, result) -> dict[str, str]:
    ranks = [len(factors.down) for factors in result.factors.values()]
    prediction = {"prediction_type": base.prediction_type} if other_prediction(changed, base) else {}
    return metadata(changed, recipe, "sgm") | {
        "modelspec.architecture": f"{architecture(changed)}/lora",
        STYLE_BASE: json.dumps({"name": base.name, **record, **prediction}, sort_keys=True),
        "dmm_jax.kept_share": f"{result.share:.6f}",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks, default=0)),
        "ss_network_alpha": str(max(ranks, default=0)),
        "ss_sd_model_name": base.name,
        "ss_base_model_version": BASE_VERSIONS[changed.architecture],
    }
