"""The mathematics of LoRA: adds low-rank updates to the tensors of a state dict, each when it is read.

W + weight * (alpha / rank) * up @ down (LoRA, arXiv:2106.09685, eq. 3), computed in float32 since float16 would round
small updates away. Tensors without an update stay as stored.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, dtype_of, shape_of


class Update(NamedTuple):
    """The low-rank update of one layer; its factors stay in the file until `delta` reads them."""

    file: TensorFile
    factors: Mapping[str, str]  # {"up", "down" and for Tucker "mid": key in the file}
    alpha: float | None  # None if no file states it: alpha / rank is then 1.

    @property
    def rank(self) -> int:
        """The number of rows of `down`."""
        return self.file.shape(self.factors["down"])[0]

    def delta(self, weight: float) -> np.ndarray:
        """Returns weight * (alpha / rank) * up @ down in float32, of shape (output, input * kernel)."""
        arrays = {role: self.file[key].astype(np.float32) for role, key in self.factors.items()}
        up, down = arrays["up"], arrays["down"]
        if "mid" in arrays:  # Tucker: a 1x1, a kxk and a 1x1 convolution (LyCORIS, arXiv:2309.14859, sec. 3.1).
            down = np.einsum("rskl,si->rikl", arrays["mid"], down.reshape(down.shape[:2]))
        scale = np.float32(weight * (1.0 if self.alpha is None else self.alpha / self.rank))
        # Scaling the small factor avoids a second array of the product's size.
        return (scale * up.reshape(len(up), -1)) @ down.reshape(len(down), -1)


class Folded(Mapping):
    """A state dict with low-rank updates added to some tensors; each tensor is computed whenever it is read."""

    def __init__(self, tensors: Mapping, updates: Mapping[str, Sequence[tuple[float, Update]]], expected: Mapping):
        """Takes the base's tensors, {our key: (weight, update) of each LoRA} and the network's {our key: shape}."""
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
        return frozenset(self._updates)

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
        folded = np.array(array, np.float32)
        for weight, update in self._updates[key]:
            folded += update.delta(weight).reshape(folded.shape)
        return folded

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
