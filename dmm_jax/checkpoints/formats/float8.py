"""Weights of 8 bits: float8 tensors, and the scales that accompany them, in files as ComfyUI reads and writes them.

A scaled layer X has a float8 `X.weight` and a scale, `X.scale_weight` or `X.weight_scale`: one number, or one per
output. The weight is their product. Tensors that only speed up products in float8 are left out.
"""

import math
import pathlib
from collections.abc import Collection, Mapping

import ml_dtypes
import numpy as np

from dmm_jax.checkpoints.errors import CheckpointError

E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
DTYPES = {"F8_E4M3": E4M3, "F8_E5M2": E5M2}
SCALES = (".scale_weight", ".weight_scale")
MARKER = "scaled_fp8"  # The end of an empty tensor that tells ComfyUI to look for scales.
# The ends of names of tensors that change no weight: scales of activations, and a JSON text.
NOT_USED = (MARKER, ".scale_input", ".input_scale", ".comfy_quant")
# The ends of names with which bitsandbytes, GPTQ and files of 4 bits accompany a weight.
QUANTISED = (
    ".absmax", ".quant_map", ".nested_absmax", ".bitsandbytes__nf4", ".bitsandbytes__fp4", ".SCB", ".weight_format",
    ".qweight", ".qzeros", ".g_idx", ".weight_scale_2", ".weight_scale_inv",
)  # fmt: skip
FEW_BITS = ("F8_", "F6_", "F4")  # The starts of the names of floats of 8, 6 and 4 bits.
MAX_E4M3 = 448.0


def refuse_quantised(path: pathlib.Path, header: Mapping) -> None:
    """Raises CheckpointError if tensors are codes of weights, other than float8, which other tensors decode."""
    for name, fields in header.items():
        dtype = str(fields.get("dtype")) if isinstance(fields, dict) else ""
        if dtype.startswith(FEW_BITS) and dtype not in DTYPES or name.endswith(QUANTISED):
            raise _quantised(path, name, dtype)


def _quantised(path, name, dtype) -> CheckpointError:
    return CheckpointError(
        f"{path} is quantised: it stores {name[:40]!r} as {str(dtype)[:16]!r}. Only float8_e4m3fn and float8_e5m2 are "
        "read, alone or with one scale per tensor or output. Use the float16 file of this model."
    )


def scales(path: pathlib.Path, entries: Mapping) -> tuple[dict[str, str], set[str]]:
    """Returns {float8 weight: its scale}, and the names of tensors that a reader does not show.

    Args:
      entries: {name: an object with `dtype` and `shape`}.

    Raises:
      CheckpointError: a scale accompanies no float8 weight, has another shape than one number or one per output, or a
        weight has two.
    """
    scale_of, hidden = {}, set()
    for name, entry in entries.items():
        end = next((end for end in (*SCALES, *NOT_USED) if name.endswith(end)), None)
        if end is None:
            continue
        weight = f"{name.removesuffix(end)}.weight"
        of_float8 = weight in entries and entries[weight].dtype in DTYPES.values()
        if end != MARKER and not of_float8:
            raise _quantised(path, name, entry.dtype)
        hidden.add(name)
        if end not in SCALES:
            continue
        shape = entries[weight].shape
        fits = math.prod(entry.shape) == 1 or shape and tuple(entry.shape) in (
            (shape[0],), (shape[0], *[1] * (len(shape) - 1)),
        )  # fmt: skip
        if not fits or entry.dtype.kind not in "fV" or entry.dtype.itemsize < 2 or weight in scale_of:
            raise CheckpointError(
                f"{path}: {name[:80]!r} of shape {entry.shape} and dtype {entry.dtype} is not the only scale of a "
                f"weight of shape {shape}. One number, or one per output, is read. Use the float16 file of this model."
            )
        scale_of[weight] = name
    return scale_of, hidden


def is_float8(dtype: np.dtype) -> bool:
    """Tells whether a dtype is a float of 8 bits."""
    return dtype in (E4M3, E5M2)


def decoded(array: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """Returns a float8 array as float16, which holds its values exactly; with a scale, their product in float32."""
    if scale is None:
        return array.astype(np.float16)
    rows = scale.astype(np.float32).reshape(-1, *[1] * (array.ndim - 1)) if array.ndim else scale.reshape(())
    return array.astype(np.float32) * rows


def scale_for(array: np.ndarray) -> np.ndarray:
    """Returns the scale at which the largest value of an array is float8_e4m3fn's largest: a float32 scalar."""
    largest = np.abs(array).max(initial=0.0).astype(np.float32)
    return np.asarray(largest / np.float32(MAX_E4M3) if largest else 1.0, np.float32)


def encoded(array: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Returns an array divided by a scale, rounded to float8_e4m3fn."""
    return np.clip(array.astype(np.float32) / scale, -MAX_E4M3, MAX_E4M3).astype(E4M3)


def summary(entries: Mapping, scale_of: Collection[str]) -> str:
    """Returns how many tensors are float8 and how many of them have a scale, in words; "" if none are."""
    names = [name for name, entry in entries.items() if is_float8(entry.dtype) and not name.endswith(MARKER)]
    if not names:
        return ""
    kinds = ", ".join(sorted({str(entries[name].dtype) for name in names}))
    return f"{len(names)} tensors are {kinds}, {len(scale_of)} of them with a scale"
