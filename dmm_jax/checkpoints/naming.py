"""The naming rule between our parameters and PyTorch's state dicts: the path, joined by dots, is the key.

`kernel` becomes `weight` with output and input axes first; `scale` and `embedding` become `weight`; other leaves keep
their names. One loop over the model's own parameters drives both directions. Two other spellings exist: old VAEs name
their attention `query, key, value, proj_attn`, and a text encoder's keys may lack the prefix `text_model.`.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.safetensors_io import Computed, Tensors, dtype_of, shape_of

LEAVES = {
    "kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias",
    "running_mean": "running_mean", "running_var": "running_var", "class_embedding": "class_embedding",
}  # fmt: skip
POSITION_IDS = "position_ids"  # A buffer of old text encoders, 0 to 76, which merging often damages.
IGNORED = (POSITION_IDS, "num_batches_tracked")  # The second counts the training steps of a batch norm.
MAX_LISTED = 20

Path = tuple[str | int, ...]


def flat(params: Mapping, prefix: Path = ()) -> Iterator[tuple[Path, object]]:
    """Yields (path, leaf) of nested parameters, in the order of the tree."""
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from flat(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def torch_key(path: Path) -> str:
    """Returns the state-dict key of a parameter."""
    return ".".join(map(str, (*path[:-1], LEAVES[path[-1]])))


def torch_layout(path: Path, array):
    """Moves a kernel's output and input axes to the front (IO to OI, HWIO to OIHW); other leaves stay. A view."""
    return np.moveaxis(array, (-1, -2), (0, 1)) if path[-1] == "kernel" else array


def our_layout(path: Path, array):
    """Undoes `torch_layout`. A view."""
    return np.moveaxis(array, (0, 1), (-1, -2)) if path[-1] == "kernel" else array


def torch_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape that a parameter of `shape` has in a state dict."""
    return (shape[-1], shape[-2], *shape[:-2]) if path[-1] == "kernel" else tuple(shape)


def torch_shapes(abstract: Mapping) -> dict[str, tuple[int, ...]]:
    """Returns the state dict's keys and shapes of a network, from its parameters or their shapes."""
    return {torch_key(path): torch_shape(path, tuple(leaf.shape)) for path, leaf in flat(abstract)}


def to_torch(params: Mapping) -> dict[str, np.ndarray]:
    """Returns a state dict: host arrays in PyTorch's layout, dtypes unchanged; views of parameters on the host."""
    return {torch_key(path): torch_layout(path, np.asarray(leaf)) for path, leaf in flat(params)}


def from_torch(
    abstract: Mapping, tensors: Mapping, dtype=None, where: str = "this checkpoint", check_finite: bool = True
) -> dict:
    """Returns nested parameters of host arrays from a state dict; views of it where dtypes agree.

    Args:
      abstract: the network's parameters, or their shapes.
      tensors: key to array, as a dict or a `TensorFile`; read one at a time.
      dtype: the dtype of the result; None keeps each tensor's own.
      where: the name of the state dict in errors.
      check_finite: also check every value.

    Raises:
      CheckpointError: names every missing, unexpected and misshapen key at once, or every tensor with NaN or infinity.
    """
    names = spellings(tensors)
    shapes = torch_shapes(abstract)
    check_keys(shapes, tensors, where)
    params, infinite, computed = {}, [], getattr(tensors, "computed", ())
    for path, _ in flat(abstract):
        key = torch_key(path)
        read = functools.partial(_read, tensors, names[key], path, shapes[key], dtype)
        stored = np.asarray(tensors[names[key]]).reshape(shapes[key])
        array = _in_our_layout(path, stored, dtype)
        # Without a conversion the stored array is checked: checking it in our layout would copy it first.
        if check_finite and not is_finite(stored if dtype is None else array):
            infinite.append(names[key])
        insert(params, path, ComputedArray(read, array.shape, array.dtype) if names[key] in computed else array)
    if infinite:
        raise CheckpointError(_not_finite(where, infinite))
    return params


def _read(tensors, name, path, shape, dtype):
    return _in_our_layout(path, np.asarray(tensors[name]).reshape(shape), dtype)


def _in_our_layout(path, stored, dtype):
    array = our_layout(path, stored)
    return array if dtype is None else array.astype(dtype, copy=False)


class ComputedArray:
    """A host array that is computed each time it is read, and takes no memory in between."""

    def __init__(self, read: Callable[[], np.ndarray], shape: tuple[int, ...], dtype: np.dtype):
        """Takes the function that computes the array, and its shape and dtype."""
        self._read, self.shape, self.dtype = read, shape, dtype
        self.ndim, self.size = len(shape), math.prod(shape)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self._read().astype(dtype or self.dtype, copy=False)

    def __getitem__(self, index) -> np.ndarray:
        return self._read()[index]


def checked_tensors(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping, where: str) -> Tensors:
    """Returns a network's state dict under today's keys; each tensor is checked for NaN and infinity when it is read.

    Args:
      shapes: {key: shape} of the network.
      tensors: key to array, as a dict or a `TensorFile`.
      where: the name of the state dict in errors.

    Raises:
      CheckpointError: names every missing, unexpected and misshapen key at once; on reading, a tensor with NaN or
        infinity.
    """
    check_keys(shapes, tensors, where)
    names = spellings(tensors)

    def read(key):
        array = np.asarray(tensors[names[key]]).reshape(shapes[key])
        if not is_finite(array):
            raise CheckpointError(_not_finite(where, [names[key]]))
        return array

    return Tensors(
        {
            key: Computed(shape, dtype_of(tensors, names[key]), functools.partial(read, key))
            for key, shape in shapes.items()
        }
    )


def _not_finite(where, keys):
    return f"{where}: NaN or infinity in {listed(keys)}. The weights are damaged: take a sound copy, or leave it out."


def differences(expected: Mapping, tensors: Mapping) -> dict[str, list[str]]:
    """Returns {"missing", "unexpected", "misshapen", "quantised": keys as messages show them}.

    Args:
      expected: {key: shape} of the network.
      tensors: a state dict; only shapes are read.
    """
    names = spellings(tensors)
    shapes = {key: shape_of(tensors, names[key]) for key in expected if key in names}
    return {
        "missing": [key for key in expected if key not in shapes],
        "unexpected": sorted(original for key, original in names.items() if key not in expected),
        "misshapen": [
            f"{key} (expected {expected[key]}, found {shape})"
            for key, shape in shapes.items()
            if not _same_shape(key, expected[key], shape)
        ],
        "quantised": [
            f"{key} ({dtype_of(tensors, names[key])})"
            for key in shapes
            if not jnp.issubdtype(dtype_of(tensors, names[key]), jnp.floating)
        ],
    }


def check_keys(expected: Mapping, tensors: Mapping, where: str) -> None:
    """Raises CheckpointError that lists all keys that `differences` returns, if there are any."""
    problems = differences(expected, tensors)
    lines = [f"  {len(keys)} {kind}: {listed(keys)}" for kind, keys in problems.items() if keys]
    if lines:
        raise CheckpointError(f"{where} does not fit the architecture:\n" + "\n".join(lines))


def _same_shape(key, expected, shape) -> bool:
    # Old VAEs hold the attention's dense layers as 1x1 convolutions: the same numbers.
    is_conv = key.rpartition(".")[0].endswith(tuple(OLD_ATTENTION.values())) and tuple(shape) == (*expected, 1, 1)
    return tuple(expected) == tuple(shape) or is_conv


def listed(keys: list[str]) -> str:
    """Joins keys for a message, the first twenty of them, control characters made visible."""
    shown = ", ".join(printable(key) for key in keys[:MAX_LISTED])
    return shown + (f" and {len(keys) - MAX_LISTED} more" if len(keys) > MAX_LISTED else "")


def printable(text: str, length: int = 200) -> str:
    """Returns text from a file that is safe for a terminal: at most `length` characters, none of them control ones."""
    return "".join(symbol if symbol.isprintable() else "?" for symbol in text[:length])


def is_finite(array: np.ndarray) -> bool:
    """Tells whether every value is finite in float32. It works block by block, without a copy of the array.

    It checks the bits of the exponent: all are set in infinity and in NaN, and in no other value.
    """
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return True
    values, step = array.reshape(-1), 1 << 18
    dtype = np.float32 if array.itemsize > 4 else array.dtype
    exponent = np.array(np.inf, dtype).view(f"u{np.dtype(dtype).itemsize}")
    blocks = (values[start : start + step] for start in range(0, values.size, step))
    with np.errstate(over="ignore"):
        bits = (block.astype(dtype, copy=False).view(exponent.dtype) for block in blocks)
        return all((block & exponent).max() != exponent for block in bits)


# {old spelling: today's} in a VAE's attention. The UNet's attention is below `transformer_blocks`, so no key matches.
OLD_ATTENTION = {
    f".mid_block.attentions.0.{old}": f".mid_block.attentions.0.{new}"
    for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items()
}


def spellings(tensors: Mapping) -> dict[str, str]:
    """Returns {key in today's spelling: its spelling in the file}, without buffers that are not parameters.

    A tensor that has both spellings keeps both, so that the old one is reported and not dropped.
    """
    keys = {key: None for key in tensors if key.rsplit(".", 1)[-1] not in IGNORED}
    bare_text = any(key.startswith("embeddings.token_embedding") for key in keys)
    today = {key: _today(key, bare_text) for key in keys}
    return {key if today[key] in keys else today[key]: key for key in keys}


def _today(key, bare_text):
    if bare_text and key.partition(".")[0] in ("embeddings", "encoder", "final_layer_norm"):
        return "text_model." + key
    module, _, leaf = key.rpartition(".")
    for old, new in OLD_ATTENTION.items():
        if module.endswith(old):
            return f"{module.removesuffix(old)}{new}.{leaf}"
    return key


def insert(tree: dict, path: Path, leaf) -> None:
    """Sets a leaf of a nested dictionary."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf


def count(abstract) -> int:
    """Returns the number of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract))
