"""Makes a LoRA of the difference between two checkpoints: a truncated singular value decomposition of every layer.

W' - W = U S V^T, and the best matrix of rank r keeps the r largest singular values (Eckart and Young, 1936). The
randomised algorithm is that of Halko, Martinsson and Tropp (arXiv:0909.4061, algorithm 4.4); the exact one takes
the eigenvectors of the Gram matrix in float64. Both report the share of the difference that they keep exactly.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.architecture import SDXL
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import single_file
from dmm_jax.checkpoints.formats.adapter_kinds import matrix
from dmm_jax.checkpoints.formats.lora_tools import DIFFUSERS
from dmm_jax.checkpoints.formats.safetensors_io import Tensors
from dmm_jax.runtime.errors import UserError

AUTO = "auto:"
OVERSAMPLES, POWER_ITERATIONS = 8, 2  # The randomised algorithm's.
FIRST_RANK = 16  # Where the search for a share's rank begins.
NEGLIGIBLE = 1e-6  # Singular values below this part of the largest are rounding of float32, and are left out.
EMBEDDINGS = ("token_embedding", "position_embedding")  # Tools apply no LoRA to these.
TEXT_PREFIXES = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}  # Kohya's, for Stable Diffusion XL.


class Rank(NamedTuple):
    """The rank of every layer, or else the share of each layer's squared difference that its rank must keep."""

    rank: int = 0
    share: float = 0.0


class Difference(NamedTuple):
    """A tensor of two checkpoints."""

    network: str
    key: str
    new: Tensors
    old: Tensors


class Factors(NamedTuple):
    """A layer's difference as up @ down: (O, r) and (r, I k)."""

    up: np.ndarray
    down: np.ndarray


@dataclasses.dataclass
class Extraction:
    """The difference between two checkpoints; keys are (network, key of its state dict)."""

    factors: dict[tuple[str, str], Factors]
    vectors: dict[tuple[str, str], np.ndarray]  # Differences of biases and norms, which are kept whole.
    # (I,) or (I, k, k) of every layer that is a matrix or a convolution.
    inputs: dict[tuple[str, str], tuple[int, ...]]
    squared: float = 0.0  # The sum of the squares of all differences.
    kept_squared: float = 0.0  # The part of it that the LoRA holds.
    left_out: list[str] = dataclasses.field(default_factory=list)  # Tensors that differ and that no LoRA can change.

    @property
    def share(self) -> float:
        """The kept part of the squared difference; 1 if there is none."""
        return self.kept_squared / self.squared if self.squared else 1.0


def parse_rank(text: str) -> Rank:
    """Returns the rank of "32", or of "auto:0.98", by which each layer keeps at least that share.

    Raises:
      UserError: the text has neither form.
    """
    number = text.removeprefix(AUTO)
    try:
        rank = Rank(share=float(number)) if number != text else Rank(rank=int(number))
    except ValueError:
        rank = Rank()
    if not (0 < rank.share <= 1 or rank.rank > 0):
        raise UserError(f"--rank takes a whole number above 0, or auto:SHARE such as auto:0.98; got {text!r}.")
    return rank


def low_rank(difference: Float[np.ndarray, "O n"], rank: Rank, exact: bool = False, seed: int = 0) -> tuple:
    """Returns (factors, kept sum of squares) of a matrix; factors of rank 0 if it is zero."""
    squared = float(np.square(difference, dtype=np.float64).sum())
    smaller = min(difference.shape)
    if not squared:
        return Factors(difference[:, :0], difference[:0]), 0.0
    if exact or rank.rank > smaller // 2:
        return _truncated(*_exact(difference), squared, rank)
    if rank.rank:
        return _truncated(*_randomised(difference, rank.rank, seed), squared, rank)
    width = FIRST_RANK
    while width <= smaller // 2:
        basis, rows, values = _randomised(difference, width, seed)
        if np.square(values[:width]).sum() >= rank.share * squared:
            return _truncated(basis, rows, values, squared, rank)
        width *= 2
    return _truncated(*_exact(difference), squared, rank)


def _exact(difference) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (U, U^T D, singular values), the largest first."""
    is_wide = difference.shape[0] <= difference.shape[1]
    sides = (difference if is_wide else difference.T).astype(np.float64)
    values, vectors = np.linalg.eigh(sides @ sides.T)
    values, vectors = np.sqrt(np.maximum(values[::-1], 0.0)), vectors[:, ::-1]
    if is_wide:
        return vectors, vectors.T @ sides, values
    with np.errstate(divide="ignore", invalid="ignore"):
        outer = np.where(values > 0, (sides.T @ vectors) / values, 0.0)
    return outer, values[:, None] * vectors.T, values


def _randomised(difference, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    width = min(rank + OVERSAMPLES, *difference.shape)
    rng = np.random.default_rng(seed)
    basis = _orthonormal(difference @ rng.standard_normal((difference.shape[1], width), np.float32))
    for _ in range(POWER_ITERATIONS):
        basis = _orthonormal(difference @ _orthonormal(difference.T @ basis))
    rows = basis.T @ difference
    squares, vectors = np.linalg.eigh(rows.astype(np.float64) @ rows.T.astype(np.float64))
    vectors = vectors[:, ::-1].astype(np.float32)
    return basis @ vectors, vectors.T @ rows, np.sqrt(np.maximum(squares[::-1], 0.0))


def _orthonormal(matrix) -> np.ndarray:
    return np.linalg.qr(matrix)[0]


def _truncated(basis, rows, values, squared: float, rank: Rank) -> tuple[Factors, float]:
    """Returns the factors of the largest singular values, their scale divided equally, and the kept sum of squares."""
    count = int((values > NEGLIGIBLE * values[0]).sum())
    if rank.rank:
        count = min(count, rank.rank)
    else:
        sums = np.cumsum(np.square(values[:count]))
        count = min(count, 1 + int(np.searchsorted(sums, rank.share * squared * (1 - 1e-9))))
    root = np.sqrt(values[:count])
    factors = Factors((basis[:, :count] * root).astype(np.float32), (rows[:count] / root[:, None]).astype(np.float32))
    return factors, min(float(np.square(values[:count]).sum()), squared)


def extract(
    changed: Checkpoint,
    base: Checkpoint,
    rank: Rank,
    dtype=np.float16,
    exact: bool = False,
    progress: Callable[[Sequence], Sequence] = lambda keys: keys,
) -> Extraction:
    """Returns the difference between a checkpoint and its base, read one tensor at a time.

    Args:
      changed: a stock checkpoint of the base's shapes; a text encoder that it lacks has no difference. Its own factors,
        if it has some, become the LoRA's unless their rank is larger.
      dtype: of the factors and vectors.
      progress: wraps the sequence of keys, for a progress bar.

    Raises:
      CheckpointError: the shapes differ, a tensor is missing or damaged, or nothing differs.
    """
    result = Extraction({}, {}, {})
    own = changed.factors() if changed.factors else {}
    for name, key, new, old in progress(differences(changed, base)):
        if len(new.shape(key)) > 1:
            result.inputs[name, key] = new.shape(key)[1:]
        difference = np.asarray(new[key], np.float32) - np.asarray(old[key], np.float32)
        _add(result, name, key, difference, rank, np.dtype(dtype), exact, own.get(key) if name == "unet" else None)
    if not result.squared:
        raise CheckpointError(f"{changed.path} equals its base {base.path}: there is no difference to export.")
    return result


def differences(changed: Checkpoint, base: Checkpoint) -> list[Difference]:
    """Returns the tensors of all networks that a LoRA can change and that both checkpoints hold; reads none.

    Raises:
      CheckpointError: the shapes differ, or a tensor is missing.
    """
    pairs = []
    for name in ("unet", *base.text_encoders):
        if not (changed.has(name) and base.has(name)) or changed.components[name] is base.components[name]:
            continue
        if changed.shapes(name) != base.shapes(name):
            raise CheckpointError(f"{name} of {changed.path} and of {base.path} have other shapes: no LoRA joins them.")
        tensors = [naming.checked_tensors(it.shapes(name), it.tensors(name), it.where(name)) for it in (changed, base)]
        pairs += [Difference(name, key, *tensors) for key in tensors[0]]
    return pairs


def stored(array: np.ndarray, dtype, where: str) -> np.ndarray:
    """Returns a difference in the dtype of a file.

    Raises:
      CheckpointError: a value is too large for the dtype.
    """
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if not naming.is_finite(result):
        raise CheckpointError(
            f"the difference of {naming.printable(where)} has values beyond {np.dtype(dtype).name}'s largest. "
            "Export in bfloat16 or float32."
        )
    return result


def _add(result: Extraction, name: str, key: str, difference, rank: Rank, dtype, exact: bool, own=None) -> None:
    squared = float(np.square(difference, dtype=np.float64).sum())
    if not squared:
        return
    result.squared += squared
    if difference.ndim == 1:
        result.vectors[name, key] = stored(difference, dtype, f"{name}.{key}")
        result.kept_squared += squared
    elif any(f".{part}." in f".{key}" for part in EMBEDDINGS):
        result.left_out.append(f"{name}.{key}")
    else:
        if own and rank.rank >= len(own[1]):
            factors, part = Factors(*map(matrix, own)), squared
        else:
            factors, part = low_rank(matrix(difference), rank, exact)
        kernel = difference.shape[2:]
        up = factors.up.reshape(*factors.up.shape, *[1] * len(kernel))
        down = factors.down.reshape(len(factors.down), difference.shape[1], *kernel)
        result.factors[name, key] = Factors(*(stored(it, dtype, f"{name}.{key}") for it in (up, down)))
        result.kept_squared += part


def tensors_of(
    result: Extraction, spelling: str, family: str, unet_config: Mapping, matrices: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Returns the tensors of a LoRA file.

    Args:
      spelling: "kohya"; "diffusers", which has no keys for differences of norms.
      matrices: layers of the UNet whose difference kohya's spelling stores as a matrix.
    """
    tensors = {}
    for name, layer in sorted({(name, key.rpartition(".")[0]) for name, key in (*result.factors, *result.vectors)}):
        if spelling == DIFFUSERS:
            tensors |= _diffusers(result, name, layer)
        else:
            prefix = _kohya_name(name, layer, family, unet_config)
            roles = _kohya(result, name, layer, name == "unet" and layer in matrices)
            tensors |= {f"{prefix}.{role}": array for role, array in roles.items()}
    return tensors


def _kohya_name(name: str, layer: str, family: str, unet_config: Mapping) -> str:
    if name == "unet":  # kohya names XL's layers as its single file does.
        own = single_file.unet_key(f"{layer}.weight", unet_config).removesuffix(".weight") if family == SDXL else layer
        return "lora_unet_" + own.replace(".", "_")
    full = layer if layer.startswith("text_model.") or layer == "text_projection" else f"text_model.{layer}"
    return (TEXT_PREFIXES[name] if family == SDXL else "lora_te_") + full.replace(".", "_")


def _kohya(result: Extraction, name: str, layer: str, is_matrix: bool) -> dict[str, np.ndarray]:
    weight, bias = (name, f"{layer}.weight"), (name, f"{layer}.bias")
    if weight not in result.inputs:  # A norm. ComfyUI reads b_norm only next to w_norm.
        of_norm = {role: result.vectors.get(key) for role, key in (("w_norm", weight), ("b_norm", bias))}
        zeros = np.zeros_like(next(vector for vector in of_norm.values() if vector is not None))
        return {role: zeros if vector is None else vector for role, vector in of_norm.items()}
    roles = {"diff_b": result.vectors[bias]} if bias in result.vectors else {}
    if is_matrix:
        up, down = _factors(result, name, layer)
        return roles | {"diff": stored(up.astype(np.float32) @ down.astype(np.float32), up.dtype, f"{name}.{layer}")}
    if weight in result.factors:
        up, down = result.factors[weight]
        roles |= {"lora_up.weight": up, "lora_down.weight": down, "alpha": np.asarray(len(down), np.float32)}
    return roles


def _factors(result: Extraction, name: str, layer: str) -> Factors:
    """Returns a layer's factors; zeros of rank 1 if only its bias differs."""
    weight = name, f"{layer}.weight"
    if weight in result.factors:
        return result.factors[weight]
    bias = result.vectors[name, f"{layer}.bias"]
    inputs = result.inputs[weight]
    up, down = (len(bias), 1, *[1] * (len(inputs) - 1)), (1, *inputs)
    return Factors(np.zeros(up, bias.dtype), np.zeros(down, bias.dtype))


def _diffusers(result: Extraction, name: str, layer: str) -> dict[str, np.ndarray]:
    weight, bias = (name, f"{layer}.weight"), (name, f"{layer}.bias")
    if weight not in result.inputs:
        return {}
    up, down = _factors(result, name, layer)
    tensors = {f"{name}.{layer}.lora_A.weight": down, f"{name}.{layer}.lora_B.weight": up}
    if any(network == name for network, _ in result.vectors):  # PEFT expects all layers of a network to have one then.
        zeros = np.zeros(len(up), up.dtype)
        tensors[f"{name}.{layer}.lora_B.bias"] = result.vectors.get(bias, zeros)
    return tensors


def with_vector(result: Extraction, key: tuple[str, str], difference: np.ndarray) -> Extraction:
    """Returns a copy with another difference of one bias; the rest is shared, and the sums follow."""
    vectors = dict(result.vectors)
    old = np.asarray(vectors.pop(key, 0.0), np.float64)
    change = float(np.square(difference, dtype=np.float64).sum() - np.square(old).sum())
    if np.any(difference):
        dtype = next(iter([*result.vectors.values(), *_ups(result)])).dtype
        vectors[key] = stored(difference, dtype, ".".join(key))
    return dataclasses.replace(
        result, vectors=vectors, squared=result.squared + change, kept_squared=result.kept_squared + change
    )


def unread_biases(result: Extraction, matrices: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the differences of biases that A1111 does not read: it takes `diff_b` only next to a whole `diff`.

    Args:
      matrices: layers of the UNet whose difference is stored whole.
    """
    layers = {(name, key.rpartition(".")[0]) for name, key in result.inputs} - {("unet", it) for it in matrices}
    return [it for it in result.vectors if (it[0], it[1].rpartition(".")[0]) in layers]


def without_norms(result: Extraction) -> Extraction:
    """Returns a copy without differences of norms, for which diffusers has no keys; the kept share follows."""
    layers = {(name, key.rpartition(".")[0]) for name, key in result.inputs}
    norms = {it: vector for it, vector in result.vectors.items() if (it[0], it[1].rpartition(".")[0]) not in layers}
    lost = math.fsum(float(np.square(vector, dtype=np.float64).sum()) for vector in norms.values())
    return dataclasses.replace(
        result,
        vectors={it: vector for it, vector in result.vectors.items() if it not in norms},
        kept_squared=max(result.kept_squared - lost, 0.0),
        left_out=[*result.left_out, *(".".join(it) for it in norms)],
    )


def _ups(result: Extraction) -> list[np.ndarray]:
    return [factors.up for factors in result.factors.values()]


def described(result: Extraction) -> str:
    """Returns a sentence about what a LoRA keeps."""
    ranks = sorted(len(factors.down) for factors in result.factors.values())
    rank = f"rank {ranks[0]} to {ranks[-1]}, {math.fsum(ranks) / len(ranks):.0f} on average" if ranks else "no rank"
    lines = f"{len(result.factors)} layers ({rank}) and {len(result.vectors)} biases and norms"
    text = f"the LoRA keeps {100 * result.share:.2f} % of the squared difference: {lines}"
    if result.left_out:
        names = ", ".join(result.left_out[:2])
        text += f"; the differences of {len(result.left_out)} tensors have no keys in it, such as {names}"
    return text
