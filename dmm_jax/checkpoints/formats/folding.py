"""Adds the differences of adapters to the tensors of a state dict, each when it is read.

Sums are float32, since float16 would round small differences away. Every adapter's difference is that from the base's
own tensor, whatever other adapters there are, so their order does not matter. Tensors without an update stay as stored.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.formats import adapter_kinds
from dmm_jax.checkpoints.formats.lora_keys import DORA
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, dtype_of, shape_of


class Update(NamedTuple):
    """The difference of one tensor; its factors stay in the file until `difference` reads them."""

    file: TensorFile
    kind: str  # A name of `lora_keys.KINDS`.
    factors: Mapping[str, str]  # {role: key in the file}
    scale: float  # alpha / rank, for example.

    @property
    def rank(self) -> int | None:
        """The rank of the factors; None if they have none."""
        return adapter_kinds.rank(self.kind, {role: self.file.shape(key) for role, key in self.factors.items()})

    def difference(self, base: np.ndarray) -> np.ndarray:
        """Returns the difference from a base's float32 tensor at weight 1, float32, of the tensor's size."""
        arrays = {role: self.file[key].astype(np.float32) for role, key in self.factors.items()}
        magnitudes = {role: arrays.pop(role) for role in DORA if role in arrays}
        if self.kind == "full difference":
            (result,) = arrays.values()
        elif self.kind in adapter_kinds.OF_WEIGHT:
            result = adapter_kinds.OF_WEIGHT[self.kind](arrays, base)
        else:
            result = adapter_kinds.DIFFERENCES[self.kind](arrays)
        result = result.reshape(base.shape)
        if self.scale != 1.0:
            result = result * np.float32(self.scale)
        for role, magnitude in magnitudes.items():
            shape = adapter_kinds.magnitude_shape(role, magnitude.shape, base.shape)
            result = adapter_kinds.decomposed(base, result, magnitude.reshape(shape))
        return result


class Folded(Mapping):
    """A state dict with the differences of adapters added; each tensor is computed whenever it is read."""

    def __init__(self, tensors: Mapping, updates: Mapping[str, Sequence[tuple[float, Update]]], expected: Mapping):
        """Takes the base's tensors, {our key: (weight, update) of each adapter} and the network's {our key: shape}."""
        names = naming.spellings(tensors)
        self._tensors = tensors
        # A base tensor of a wrong shape gets no update: loading the network reports its shape.
        self._updates = {
            names[key]: terms
            for key, terms in updates.items()
            if key in names and shape_of(tensors, names[key]) == tuple(expected[key])
        }

    @property
    def computed(self) -> frozenset[str]:
        """The keys whose tensors are computed when they are read."""
        return frozenset(self._updates) | frozenset(getattr(self._tensors, "computed", ()))

    def shape(self, key: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading it."""
        return shape_of(self._tensors, key)

    def dtype(self, key: str) -> np.dtype:
        """Returns a tensor's dtype without reading it."""
        return np.dtype(np.float32) if key in self._updates else dtype_of(self._tensors, key)

    def __getitem__(self, key: str) -> np.ndarray:
        array = self._tensors[key]
        if key not in self._updates:
            return array
        base = np.asarray(array, np.float32)
        folded = np.array(base)
        for weight, update in self._updates[key]:
            difference = update.difference(base)
            folded += difference if weight == 1.0 else np.float32(weight) * difference
        return folded

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
