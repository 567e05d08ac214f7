"""The mathematics of adapters: the difference that each kind adds to a layer's weight, in float32.

LoRA (arXiv:2106.09685), LoHa and LoKr (LyCORIS, arXiv:2309.14859), DoRA (arXiv:2402.09353), GLoRA (arXiv:2306.07967),
IA3 (arXiv:2205.05638), and full differences. O and I are a layer's outputs and inputs, r is a rank and k the size of a
kernel (1 for dense layers). Weights are matrices (O, I k); "up" is (O, r) and "down" (r, I k).
"""

import math
from collections.abc import Mapping

import numpy as np

Shape = tuple[int, ...]
Arrays = Mapping[str, np.ndarray]


def matrix(array: np.ndarray) -> np.ndarray:
    """Returns an array (O, ...) as a matrix (O, -1)."""
    return array.reshape(len(array), -1)


def tucker(core: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Returns the matrix (O, I k) of a 1x1, a k and a 1x1 convolution in sequence (arXiv:2309.14859, sec. 3.1).

    Args:
      core: (r, s, k, k).
      up: (O, r).
      down: (s, I), or (s, I, 1, 1).
    """
    rows = np.einsum("rs...,si->ri...", core, matrix(down))
    return up @ matrix(rows)


def lora(arrays: Arrays) -> np.ndarray:
    """Returns up @ down."""
    if "mid" in arrays:
        return tucker(arrays["mid"], matrix(arrays["up"]), matrix(arrays["down"]))
    return matrix(arrays["up"]) @ matrix(arrays["down"])


def loha(arrays: Arrays) -> np.ndarray:
    """Returns (w1_a @ w1_b) * (w2_a @ w2_b); with cores t1 and t2, `a` is (r, O) and `b` (r, I)."""
    if "hada_t1" in arrays:
        first, second = (tucker(arrays[f"hada_t{n}"], arrays[f"hada_w{n}_a"].T, arrays[f"hada_w{n}_b"]) for n in (1, 2))
    else:
        first, second = (matrix(arrays[f"hada_w{n}_a"]) @ matrix(arrays[f"hada_w{n}_b"]) for n in (1, 2))
    first *= second
    return first


def lokr(arrays: Arrays) -> np.ndarray:
    """Returns the Kronecker product of w1 (a, c) and w2 (b, d k), where O = a b and I = c d."""
    if "lokr_t2" in arrays:
        second = tucker(arrays["lokr_t2"], arrays["lokr_w2_a"].T, arrays["lokr_w2_b"])
    else:
        second = _half(arrays, "lokr_w2")
    return np.kron(_half(arrays, "lokr_w1"), second)


def _half(arrays: Arrays, name: str) -> np.ndarray:
    if name in arrays:
        return matrix(arrays[name])
    return matrix(arrays[f"{name}_a"]) @ matrix(arrays[f"{name}_b"])


def glora(arrays: Arrays, weight: np.ndarray) -> np.ndarray:
    """Returns weight @ A + B along the inputs, each of A and B of low rank."""
    a1, a2, b1, b2 = (matrix(arrays[name]) for name in ("a1", "a2", "b1", "b2"))
    if _glora_is_old({name: array.shape for name, array in arrays.items()}):
        a1, a2, b1, b2 = a2, a1, b2, b1
    added = tucker(arrays["bm"], b1, b2) if "bm" in arrays else b1 @ b2
    inputs = np.einsum("oi...,ij->oj...", weight, a1)
    return added + matrix(np.einsum("oj...,ji->oi...", inputs, a2))


def _glora_is_old(shapes: Mapping[str, Shape]) -> bool:
    """Tells whether the names 1 and 2 are exchanged, as in the first files; the smaller of two ranks counts."""
    sizes = {name: _flat(shapes[name]) for name in ("a1", "a2", "b1", "b2")}
    ranks = {sizes["a1"][1], sizes["a2"][0], sizes["b1"][1], sizes["b2"][0]}
    old_ranks = {sizes["a1"][0], sizes["a2"][1], sizes["b1"][0], sizes["b2"][1]}
    return len(old_ranks) == 1 and (len(ranks) > 1 or min(old_ranks) < min(ranks))


def ia3(arrays: Arrays, weight: np.ndarray) -> np.ndarray:
    """Returns weight * factor, per output or per input.

    LyCORIS's factors are 0 if they change nothing; PEFT's (`ia3_in`, `ia3_out`) are 1, and also change a bias (O,).
    """
    if "ia3" in arrays:
        factor, axis = arrays["ia3"], int(bool(arrays["on_input"].reshape(-1)[0]))
    else:
        ((role, factor),) = arrays.items()
        factor, axis = factor - np.float32(1), int(role == "ia3_in")
    shape = [1] * weight.ndim
    shape[axis] = -1
    return weight * factor.reshape(shape)


def decomposed(weight: np.ndarray, difference: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """Returns what DoRA adds to a weight: the sum of both, rescaled to a stored magnitude, minus the weight.

    Args:
      magnitude: the norms of the rows (O, 1, ...), or those of the columns (1, I, ...).
    """
    direction = weight + difference
    axes = tuple(axis for axis, size in enumerate(magnitude.shape) if size == 1)
    norms = np.sqrt(np.square(direction, dtype=np.float64).sum(axis=axes, keepdims=True))
    scale = magnitude / (norms + np.finfo(np.float32).eps)
    return (direction * scale - weight).astype(np.float32)


def magnitude_shape(role: str, shape: Shape, layer: Shape) -> Shape | None:
    """Returns the shape in which a stored magnitude multiplies a layer; None if it does not fit.

    PEFT stores the norms of the rows, whatever their shape. LyCORIS stores those of the rows (O, 1, ...), or those of
    the columns (1, I, ...).
    """
    rows, columns = (layer[0], *[1] * (len(layer) - 1)), (1, layer[1], *[1] * (len(layer) - 2))
    size = math.prod(shape)
    if role == "magnitude":
        return rows if size == layer[0] else None
    if len(shape) < 2:  # Other tools would multiply the columns by it.
        return None
    if shape[0] == layer[0] and size == layer[0]:
        return rows
    return columns if shape[0] == 1 and size == layer[1] else None


def rank(kind: str, shapes: Mapping[str, Shape]) -> int | None:
    """Returns the rank of a layer's factors, by which alpha is divided; None if they have none."""
    if kind == "GLoRA":
        return _flat(shapes["b1"])[0 if _glora_is_old(shapes) else 1]
    names = {"LoRA": ["down"], "LoHa": ["hada_w1_b"], "LoKr": ["lokr_w2_b", "lokr_w1_b"]}.get(kind, [])
    return next((shapes[name][0] for name in names if name in shapes), None)


def fits(kind: str, shapes: Mapping[str, Shape], layer: Shape) -> bool:
    """Tells whether factors of these shapes give a difference of a layer's shape."""
    if any(not shape or 0 in shape for role, shape in shapes.items() if role != "on_input") or not layer:
        return False
    if kind == "full difference":
        (shape,) = shapes.values()
        return shape[0] == layer[0] and _has_columns(shape, layer[1:])
    if len(layer) not in (2, 4):
        return False
    return _FITS[kind](shapes, layer)


def _flat(shape: Shape) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if shape else (0, 0)


def _trimmed(shape: Shape) -> Shape:
    """Returns a shape without the ones at its end."""
    count = len(shape)
    while count and shape[count - 1] == 1:
        count -= 1
    return tuple(shape[:count])


def _has_columns(shape: Shape, columns: Shape) -> bool:
    """Tells whether an array (rows, ...) has columns such as (I, k, k), or (I k k), in this order."""
    return _trimmed(shape[1:]) in (_trimmed(columns), _trimmed((math.prod(columns),)))


def _pair(up: Shape, down: Shape, layer: Shape) -> bool:
    return up[0] == layer[0] and _has_columns(up, down[:1]) and _has_columns(down, layer[1:])


def _core(core: Shape, up: Shape, down: Shape, out: int, into: int, kernel: Shape) -> bool:
    """Tells whether a core (r, s, kernel) joins factors (out, r) and (s, into)."""
    sizes_fit = up[0] == out and _has_columns(up, core[:1]) and _has_columns(down, (into,))
    return sizes_fit and tuple(core) == (core[0], down[0], *kernel)


def _lora_fits(shapes, layer) -> bool:
    if "mid" in shapes:
        return len(layer) == 4 and _core(shapes["mid"], shapes["up"], shapes["down"], *layer[:2], layer[2:])
    return _pair(shapes["up"], shapes["down"], layer)


def _loha_fits(shapes, layer) -> bool:
    halves = [{role: shapes.get(f"hada_{name}") for role, name in half.items()} for half in (
        {"a": "w1_a", "b": "w1_b", "t": "t1"}, {"a": "w2_a", "b": "w2_b", "t": "t2"},
    )]  # fmt: skip
    if halves[0]["t"]:
        return all(
            len(layer) == 4 and len(h["a"]) == 2 and _core(h["t"], h["a"][::-1], h["b"], *layer[:2], layer[2:])
            for h in halves
        )
    return all(_pair(half["a"], half["b"], layer) for half in halves)


def _lokr_fits(shapes, layer) -> bool:
    rows, columns = (shapes[name] for name in (["lokr_w1"] * 2 if "lokr_w1" in shapes else ["lokr_w1_a", "lokr_w1_b"]))
    first = rows[0], math.prod(columns[1:])
    if layer[0] % first[0] or layer[1] % first[1]:
        return False
    second = (layer[0] // first[0], layer[1] // first[1], *layer[2:])
    return all(_half_fits(name, shapes, half) for name, half in (("lokr_w1", first), ("lokr_w2", second)))


def _half_fits(name: str, shapes: Mapping[str, Shape], half: Shape) -> bool:
    """Tells whether a half of LoKr, whole or in factors, has the shape `half`."""
    if name in shapes:
        return shapes[name][0] == half[0] and _has_columns(shapes[name], half[1:])
    up, down = shapes[f"{name}_a"], shapes[f"{name}_b"]
    if name == "lokr_w2" and "lokr_t2" in shapes:
        return len(half) == 4 and len(up) == 2 and _core(shapes["lokr_t2"], up[::-1], down, *half[:2], half[2:])
    return _pair(up, down, half)


def _glora_fits(shapes, layer) -> bool:
    names = ("a1", "a2", "b1", "b2")
    a1, a2, b1, b2 = (shapes[name] for name in names)
    if _glora_is_old(shapes):
        a1, a2, b1, b2 = a2, a1, b2, b1
    square = (layer[1], layer[1])
    if not _pair(a1, a2, square):
        return False
    if "bm" in shapes:
        return len(layer) == 4 and _core(shapes["bm"], b1, b2, *layer[:2], layer[2:])
    return _pair(b1, b2, layer)


def _ia3_fits(shapes, layer) -> bool:
    if "on_input" in shapes:
        return math.prod(shapes["on_input"]) == 1 and math.prod(shapes["ia3"]) in layer[:2]
    ((role, shape),) = shapes.items()
    return math.prod(shape) == layer[int(role == "ia3_in")]


_FITS = {"LoRA": _lora_fits, "LoHa": _loha_fits, "LoKr": _lokr_fits, "GLoRA": _glora_fits, "IA3": _ia3_fits}
DIFFERENCES = {"LoRA": lora, "LoHa": loha, "LoKr": lokr}  # Kinds that do not depend on the base's weight.
OF_WEIGHT = {"GLoRA": glora, "IA3": ia3}  # Kinds that do.
