"""A style as a file of a few kilobytes: what moves a stock export of the same student from one mix to another.

A style is one vector added to the time embedding, and a stock export holds it in `time_embedding.linear_2.bias`. So two
exports of one student differ in that bias alone, and

    bias of the style = bias of the base + strength * difference, at strength 1.

The difference is taken to a stock export of a stated mix (the base; by default all styles in equal parts), and not to
the student's own bias: without a style the student was never trained, so there is no such export, and strength 0 would
not be a usable model. Used on any other checkpoint the file means nothing. Two of these files together add vectors
after the style MLP, where the paper mixes rows before it (arXiv:2504.12364, 4.5): fold a mix in by `single-file`.

Keys, as the tools' sources read them: ComfyUI takes `.diff_b` alone, A1111 only beside `.diff`, diffusers refuses a
file without keys of its own.
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.safetensors_io import raw_bytes, save
from dmm_jax.checkpoints.modelspec import Recipe, architecture, metadata
from dmm_jax.checkpoints.write import BIAS, DTYPES, fold
from dmm_jax.runtime.errors import UserError

TOOLS = ("comfyui", "diffusers", "a1111")
NAME = "style_lora.safetensors"
LAYER = "lora_unet_time_embedding_linear_2"  # ComfyUI and A1111 know it by this name in every family.
OURS = "unet.time_embedding.linear_2"  # And diffusers by this.
BASE_KEY = "dmm_jax.lora_base"  # As JSON: what the file is to be used on.


def style_difference(
    student: Checkpoint, weights: Float[np.ndarray, " N"], base: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " E"]:
    """Returns what turns the mix `base`, folded in, into the mix `weights`: a difference of biases, float32."""
    return _folded_bias(student, weights) - _folded_bias(student, base)


def _folded_bias(student, weights):
    return fold(student, weights).tensors("unet")[BIAS]


def lora_tensors(difference: Float[np.ndarray, " E"], dtype: str, tools: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the tensors of a style file.

    Args:
      difference: of the biases.
      dtype: of every tensor.
      tools: that are to read it; "a1111" needs a square matrix of zeros, 3.3 MB in float16 at 1280 channels.

    Raises:
      ValueError: there is no such tool.
    """
    unknown = sorted(set(tools) - set(TOOLS))
    if unknown or not tools:
        raise UserError(f"--lora-for takes {', '.join(TOOLS)}; got {', '.join(unknown) or 'nothing'}.")
    bias, width = difference.astype(DTYPES[dtype]), len(difference)
    tensors = {f"{LAYER}.diff_b": bias}
    if "a1111" in tools:
        tensors[f"{LAYER}.diff"] = np.zeros((width, width), bias.dtype)
    if "diffusers" in tools:
        tensors[f"{OURS}.lora_A.weight"] = np.zeros((1, width), bias.dtype)
        tensors[f"{OURS}.lora_B.weight"] = np.zeros((width, 1), bias.dtype)
        tensors[f"{OURS}.lora_B.bias"] = bias
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
    """Writes a style file and returns its path. It says in its metadata which mix it is to be used on.

    Args:
      out: the file.
      student: a merged checkpoint.
      weights: of the styles, the mix that strength 1 gives.
      base: of the styles, the mix that is folded into the checkpoint that the file is used on.

    Raises:
      ValueError: there is no such tool, or `out` is there.
    """
    if out.exists():
        raise CheckpointError(f"{out} is there; nothing is overwritten. Give another name.")
    tensors = lora_tensors(style_difference(student, weights, base), dtype, tools)
    stock = fold(student, base)
    said = metadata(stock, recipe, "sgm") | {BASE_KEY: json.dumps(_base(stock, student, base, dtype))}
    said["modelspec.architecture"] = f"{architecture(stock)}/lora"
    save(out, tensors, said)
    return out


def _base(stock: Checkpoint, student: Checkpoint, base, dtype) -> Mapping:
    """Returns how to know the right checkpoint: its mix, and the hash of its bias as an export of this dtype has it."""
    bias = stock.tensors("unet")[BIAS].astype(DTYPES[dtype])
    mix = mix_text(student.styles, base)
    return {"style": mix, "dtype": dtype, "bias": BIAS, "bias_sha256": hashlib.sha256(raw_bytes(bias)).hexdigest()}


def mix_text(styles: Sequence[str], weights: Float[np.ndarray, " N"]) -> str:
    """Returns a mix as `--style` takes it."""
    return ",".join(f"{name}={float(weight)!r}" for name, weight in zip(styles, weights, strict=True) if weight)


def equal_parts(styles: Sequence[str]) -> Float[np.ndarray, " N"]:
    """Returns the mix of all styles in equal parts."""
    return np.full(len(styles), 1 / len(styles), np.float32)
