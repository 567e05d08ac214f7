"""What a caller asks of a pipeline, looked at before anything is computed: a ValueError says what was expected.

`name` is how the caller calls the value. Types are checked, too: a TypeError from deep inside would not tell which.
"""

import math
import numbers
from typing import Any

from dmm_jax.runtime.errors import UserError

MAX_SEED = 2**32 - 1  # A key holds so much.
MAX_PIXELS = 2**14  # Of a side.


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Returns a whole number of at least `least`, at most `most`."""
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
    return value.item() if getattr(value, "ndim", None) == 0 else value  # Of NumPy's and JAX's numbers.


def number(name: str, value: Any, least: float = -math.inf) -> float:
    """Returns a finite number of at least `least`."""
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value) or value < least:
        bound = "" if least == -math.inf else f" of at least {least:g}"
        raise UserError(f"{name} must be a finite number{bound}; got {value!r}.")
    return float(value)


def size(name: str, value: Any, cells: int) -> int:
    """Returns pixels of a side: a multiple of `cells`, of which the autoencoder makes one latent."""
    value = whole(name, value, 0, MAX_PIXELS)
    if value % cells or not value:
        nearest = max(value - value % cells, cells)
        raise UserError(f"{name} must be a multiple of {cells} pixels; got {value}. Use {nearest}.")
    return value


def each(name: str, values: Any, count: int) -> list:
    """Returns one value per prompt."""
    if isinstance(values, str) or not hasattr(values, "__len__") or not hasattr(values, "__iter__"):
        raise UserError(f"{name} must be a sequence, one for each of the {count} prompts; got {values!r}.")
    if len(values) != count:
        raise UserError(f"{name} has {len(values)} entries for {count} prompts: give one each.")
    return list(values)


def texts(name: str, values: Any) -> list:
    """Returns texts, or None for none, of which there is at least one; a lone text is one."""
    values = [values] if isinstance(values, str) else values
    values = list(values) if hasattr(values, "__iter__") else values
    if not isinstance(values, list) or not all(isinstance(value, (str, type(None))) for value in values):
        raise UserError(f"{name} must be texts; got {values!r}.")
    if not values:
        raise UserError(f"{name} is empty: give at least one.")
    return values


def pair(name: str, value: Any) -> tuple[int, int]:
    """Returns two whole numbers: height and width, or top and left."""
    if isinstance(value, str) or not hasattr(value, "__len__") or len(value) != 2:
        raise UserError(f"{name} must be two numbers of pixels; got {value!r}.")
    return whole(name, value[0], 0), whole(name, value[1], 0)
