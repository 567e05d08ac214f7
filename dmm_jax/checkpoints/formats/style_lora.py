"""Style files of a few kilobytes for ComfyUI, diffusers and A1111: they change a stock export from one mix to another.

A style is one vector added to the time embedding, and a stock export holds it in `time_embedding.linear_2.bias`. So two
exports of one student differ in that bias alone, and

    bias of the style = bias of the base + difference (strength 1).

The base is a stock export of a stated mix, by default of all styles in equal parts. It is not the student's own bias:
the student was never trained without a style, so strength 0 would not be a usable model. On any other checkpoint the
file is meaningless. Two style files together add vectors after the style MLP, whereas the paper mixes rows before it
(arXiv:2504.12364, 4.5); export such a mix as `single-file` instead.

Keys that the tools' sources read: ComfyUI reads `.diff_b` alone, A1111 reads it only together with `.diff`, diffusers
has names of its own and a file of its own (`lora_tools`).
"""

import hashlib
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.extract_lora import stored
from dmm_jax.checkpoints.formats.lora_tools import DIFFUSERS, SUFFIXES, spellings
from dmm_jax.checkpoints.formats.safetensors_io import raw_bytes, save
from dmm_jax.checkpoints.modelspec import Recipe, architecture, metadata
from dmm_jax.checkpoints.styles import BIAS, fold_style
from dmm_jax.checkpoints.write import DTYPES

STEM = "style_lora"
KOHYA_LAYER = "lora_unet_time_embedding_linear_2"  # The layer's name for ComfyUI and A1111, in every family.
DIFFUSERS_LAYER = "unet.time_embedding.linear_2"
BASE_KEY = "dmm_jax.lora_base"  # Metadata, as JSON: the stock export that the file belongs to.


def style_difference(
    student: Checkpoint, weights: Float[np.ndarray, " N"], base: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " E"]:
    """Returns the bias of a stock export of the mix `weights` minus that of the mix `base`, float32."""
    bias, base_bias = (fold_style(student, mix).tensors("unet")[BIAS] for mix in (weights, base))
    return bias - base_bias


def lora_tensors(
    difference: Float[np.ndarray, " E"], dtype: str, spelling: str, with_matrix: bool = False
) -> dict[str, np.ndarray]:
    """Returns the tensors of a style file, all of dtype `dtype`.

    Args:
      difference: of the biases, see `style_difference`.
      spelling: "kohya" or "diffusers".
      with_matrix: whether kohya's spelling has the square matrix of zeros that A1111 needs, 3.3 MB in float16 at 1280
        channels.
    """
    bias, width = stored(difference, DTYPES[dtype], BIAS), len(difference)
    if spelling == DIFFUSERS:
        return {
            f"{DIFFUSERS_LAYER}.lora_A.weight": np.zeros((1, width), bias.dtype),
            f"{DIFFUSERS_LAYER}.lora_B.weight": np.zeros((width, 1), bias.dtype),
            f"{DIFFUSERS_LAYER}.lora_B.bias": bias,
        }
    tensors = {f"{KOHYA_LAYER}.diff_b": bias}
    if with_matrix:
        tensors[f"{KOHYA_LAYER}.diff"] = np.zeros((width, width), bias.dtype)
    return tensors


def places(folder: pathlib.Path, tools: Sequence[str]) -> dict[str, pathlib.Path]:
    """Returns {spelling: its file} of a style in a folder, for the tools that read it."""
    return {spelling: folder / f"{STEM}{SUFFIXES[spelling]}.safetensors" for spelling in spellings(tools)}


def write_style_loras(
    folder: pathlib.Path,
    student: Checkpoint,
    weights: Float[np.ndarray, " N"],
    base: Float[np.ndarray, " N"],
    dtype: str,
    tools: Sequence[str],
    recipe: Recipe,
) -> list[pathlib.Path]:
    """Writes one style file per spelling that the tools need; their metadata names the stock export that they change.

    Args:
      student: a merged checkpoint.
      weights: the weights of the styles that strength 1 gives.
      base: the weights of the styles in the stock export that the file is used on.

    Raises:
      UserError: a tool is unknown, or a file exists.
    """
    files = places(folder, tools)
    if existing := [path for path in files.values() if path.exists()]:
        raise CheckpointError(f"{existing[0]} exists; nothing is overwritten. Give another folder.")
    stock = fold_style(student, base)
    bias = stock.tensors("unet")[BIAS].astype(DTYPES[dtype])
    mix = [f"{name}={float(weight)!r}" for name, weight in zip(student.styles, base, strict=True) if weight]
    stock_export = {  # Its mix as `--style` takes it, and its bias as an export of this dtype stores it.
        "style": ",".join(mix),
        "dtype": dtype,
        "bias": BIAS,
        "bias_sha256": hashlib.sha256(raw_bytes(bias)).hexdigest(),
    }
    file_metadata = metadata(stock, recipe, "sgm") | {BASE_KEY: json.dumps(stock_export)}
    file_metadata["modelspec.architecture"] = f"{architecture(stock)}/lora"
    difference = style_difference(student, weights, base)
    for spelling, path in files.items():
        save(path, lora_tensors(difference, dtype, spelling, with_matrix="a1111" in tools), file_metadata)
    return list(files.values())


def equal_parts(styles: Sequence[str]) -> Float[np.ndarray, " N"]:
    """Returns the weights of all styles in equal parts."""
    return np.full(len(styles), 1 / len(styles), np.float32)
