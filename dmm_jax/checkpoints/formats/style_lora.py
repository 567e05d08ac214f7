"""Style files of a few kilobytes for ComfyUI, diffusers and A1111: they change a stock export from one mix to another.

A style is one vector added to the time embedding, and a stock export holds it in `time_embedding.linear_2.bias`. So two
exports of one student differ in that bias alone, and

    bias of the style = bias of the base + difference (strength 1).

The base is a stock export of a stated mix, by default of all styles in equal parts. It is not the student's own bias:
the student was never trained without a style, so strength 0 would not be a usable model. On any other checkpoint the
file is meaningless. Two style files together add vectors after the style MLP, whereas the paper mixes rows before it
(arXiv:2504.12364, 4.5); export such a mix as `single-file` instead.

Keys that the tools' sources read: ComfyUI reads `.diff_b` alone, A1111 reads it only together with `.diff`, diffusers
refuses a file without keys of its own form.
"""

import hashlib
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.safetensors_io import raw_bytes, save
from dmm_jax.checkpoints.modelspec import Recipe, architecture, metadata
from dmm_jax.checkpoints.styles import BIAS, fold_style
from dmm_jax.checkpoints.write import DTYPES
from dmm_jax.runtime.errors import UserError

TOOLS = ("comfyui", "diffusers", "a1111")
NAME = "style_lora.safetensors"
KOHYA_LAYER = "lora_unet_time_embedding_linear_2"  # The layer's name for ComfyUI and A1111, in every family.
DIFFUSERS_LAYER = "unet.time_embedding.linear_2"
BASE_KEY = "dmm_jax.lora_base"  # Metadata, as JSON: the stock export that the file belongs to.


def style_difference(
    student: Checkpoint, weights: Float[np.ndarray, " N"], base: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " E"]:
    """Returns the bias of a stock export of the mix `weights` minus that of the mix `base`, float32."""
    bias, base_bias = (fold_style(student, mix).tensors("unet")[BIAS] for mix in (weights, base))
    return bias - base_bias


def lora_tensors(difference: Float[np.ndarray, " E"], dtype: str, tools: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the tensors of a style file, all of dtype `dtype`.

    Args:
      difference: of the biases, see `style_difference`.
      tools: the tools that read the file; "a1111" adds a square matrix of zeros, 3.3 MB in float16 at 1280 channels.

    Raises:
      ValueError: a tool is unknown.
    """
    unknown = sorted(set(tools) - set(TOOLS))
    if unknown or not tools:
        raise UserError(f"--lora-for takes {', '.join(TOOLS)}; got {', '.join(unknown) or 'nothing'}.")
    bias, width = difference.astype(DTYPES[dtype]), len(difference)
    tensors = {f"{KOHYA_LAYER}.diff_b": bias}
    if "a1111" in tools:
        tensors[f"{KOHYA_LAYER}.diff"] = np.zeros((width, width), bias.dtype)
    if "diffusers" in tools:
        tensors[f"{DIFFUSERS_LAYER}.lora_A.weight"] = np.zeros((1, width), bias.dtype)
        tensors[f"{DIFFUSERS_LAYER}.lora_B.weight"] = np.zeros((width, 1), bias.dtype)
        tensors[f"{DIFFUSERS_LAYER}.lora_B.bias"] = bias
    return tensors


def write_style_lora(
    out: pathlib.Path,
    student: Checkpoint,
    weights: Float[np.ndarray, " N"],
    base: Float[np.ndarray, " N"],
    dtype: str,
    tools: Sequence[str],
    recipe: Recipe,
) -> pathlib.Path:
    """Writes a style file and returns its path. Its metadata names the stock export that it belongs to.

    Args:
      student: a merged checkpoint.
      weights: the weights of the styles that strength 1 gives.
      base: the weights of the styles in the stock export that the file is used on.

    Raises:
      ValueError: a tool is unknown, or `out` exists.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists; nothing is overwritten. Give another name.")
    tensors = lora_tensors(style_difference(student, weights, base), dtype, tools)
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
    save(out, tensors, file_metadata)
    return out


def equal_parts(styles: Sequence[str]) -> Float[np.ndarray, " N"]:
    """Returns the weights of all styles in equal parts."""
    return np.full(len(styles), 1 / len(styles), np.float32)
