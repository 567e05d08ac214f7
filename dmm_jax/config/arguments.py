"""Checks of the arguments that a caller passes; each raises UserError with what was expected and what was passed.

`name` is the argument's name as the caller knows it. Types are checked too: a TypeError from deep inside would not
name the argument.
"""

import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dmm_jax.runtime.errors import UserError, meant, refuse

MAX_SEED = 2**32 - 1  # The largest seed of a JAX key.
MAX_PIXELS = 2**14  # Pixels per side.


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Returns a whole number from `least` to `most`."""
    value = _plain(value)
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers.Integral)
        or not least <= value <= (value if most is None else most)
    ):
        raise UserError(f"{name} must be a whole number {bounds}; got {value!r}.")
    return int(value)


def _plain(value):
    return value.item() if getattr(value, "ndim", None) == 0 else value  # NumPy and JAX scalars have no dimensions.


def number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """Returns a finite number from `least` to `most`."""
    value = _plain(value)
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not least <= value <= most:
        bound = (
            ""
            if least == -math.inf
            else f" of at least {least:g}"
            if most == math.inf
            else (f" from {least:g} to {most:g}")
        )
        raise UserError(f"{name} must be a finite number{bound}; got {value!r}.")
    return float(value)


def pixels(name: str, value: Any, multiple: int) -> int:
    """Returns the pixels of a side, a positive multiple of the autoencoder's scale factor."""
    value = whole_number(name, value, 0, MAX_PIXELS)
    if value % multiple or not value:
        usable = max(value - value % multiple, multiple)
        raise UserError(f"{name} must be a multiple of {multiple} pixels; got {value}. Use {usable}.")
    return value


def per_prompt(name: str, values: Any, count: int, repeats: int = 1) -> list:
    """Returns a list of `count` values; each of `count` / `repeats` values is for so many consecutive images."""
    if isinstance(values, str) or not hasattr(values, "__len__") or not hasattr(values, "__iter__"):
        raise UserError(f"{name} must be a sequence, one for each of the {count} prompts; got {values!r}.")
    if len(values) * repeats == count:
        return [value for value in values for _ in range(repeats)]
    if len(values) != count:
        raise UserError(f"{name} has {len(values)} entries for {count} prompts: give one each.")
    return list(values)


def per_image(name: str, values: Any, count: int, repeats: int, *bounds: float) -> np.ndarray:
    """Returns one number per image (B,), float32; `bounds` as in `number`."""
    values = [values] * count if np.ndim(values) == 0 else values
    return np.array([number(name, value, *bounds) for value in per_prompt(name, values, count, repeats)], np.float32)


def texts(name: str, values: Any) -> list:
    """Returns a list of at least one text or None; a lone text is a list of one."""
    values = [values] if isinstance(values, str) else values
    values = list(values) if hasattr(values, "__iter__") else values
    if not isinstance(values, list) or not all(isinstance(value, (str, type(None))) for value in values):
        raise UserError(f"{name} must be texts; got {values!r}.")
    if not values:
        raise UserError(f"{name} is empty: give at least one.")
    return values


def refuse_unknown(others: Mapping, function: Callable, other_names: Mapping[str, str]) -> None:
    """Raises UserError if there are further keyword arguments; suggests what the function calls them.

    Args:
      other_names: {name in other libraries: name here}.
    """
    parameters = [name for name in inspect.signature(function).parameters if name not in ("self", "others")]
    refuse(
        "unknown arguments",
        [f"{name}{meant(other_names.get(name, name), [*parameters, *other_names.values()])}" for name in others],
    )


def pixel_pair(name: str, value: Any) -> tuple[int, int]:
    """Returns two numbers of pixels: height and width, or top and left."""
    if isinstance(value, str) or not hasattr(value, "__len__") or len(value) != 2:
        raise UserError(f"{name} must be two numbers of pixels; got {value!r}.")
    return whole_number(name, value[0], 0), whole_number(name, value[1], 0)
