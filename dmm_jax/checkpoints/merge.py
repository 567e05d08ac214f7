"""Weight averages: what people merge checkpoints by today, tensor by tensor, with no training.

A difference, or delta, is a teacher's tensor minus the base's. All arithmetic is float32, one tensor in memory at a
time. These are baselines: one network that is a compromise, where distillation keeps the styles apart.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterable, Sequence

import numpy as np

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component
from dmm_jax.checkpoints.formats.safetensors_io import Computed, Tensors

# Methods, and what each takes beside weights, with its default. Without a validation set, TIES' paper (section 4) takes
# scale (its lambda) 1 and density (its k) 20 % for TIES, scale 0.4 for task arithmetic; 0.1 is DARE's drop rate of 0.9.
METHODS = {
    "average": {},
    "task_arithmetic": {"scale": 0.4},
    "ties": {"scale": 1.0, "density": 0.2},
    "dare": {"scale": 0.4, "density": 0.1, "seed": 0},
}


def average(tensors: Iterable[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Returns the weighted mean of the teachers' tensors (model soups, arXiv:2203.05482); the base does not count."""
    return weighted_sum(tensors, [weight / math.fsum(weights) for weight in weights])


def weighted_sum(tensors: Iterable[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Returns the sum of tensors times weights, float32."""
    return sum(np.float32(weight) * tensor for tensor, weight in zip(tensors, weights, strict=True))


def task_arithmetic(
    base: np.ndarray, deltas: Iterable[np.ndarray], weights: Sequence[float], scale: float
) -> np.ndarray:
    """Returns base + scale * sum(weight * delta) (task arithmetic, arXiv:2212.04089, section 2)."""
    return base + np.float32(scale) * weighted_sum(deltas, weights)


def ties(
    base: np.ndarray, deltas: Iterable[np.ndarray], weights: Sequence[float], scale: float, density: float
) -> np.ndarray:
    """Returns base + scale * merged delta (TIES, arXiv:2306.01708, algorithm 1): trim, elect a sign, disjoint mean.

    The sign of each entry is that of the weighted sum of the trimmed deltas; the mean is over the teachers whose
    trimmed delta has this sign, weighted too. The paper's own weights are 1.
    """
    trimmed = [trim(delta, density) for delta in deltas]
    elected = np.sign(weighted_sum(trimmed, weights))
    total, count = np.zeros(base.shape, np.float32), np.zeros(base.shape, np.float32)
    for delta, weight in zip(trimmed, weights, strict=True):
        agrees = delta * elected > 0
        np.add(total, np.float32(weight) * delta, out=total, where=agrees)
        np.add(count, np.float32(weight), out=count, where=agrees)
    return base + np.float32(scale) * np.divide(total, count, out=total, where=count > 0)


def trim(delta: np.ndarray, density: float) -> np.ndarray:
    """Returns a delta whose entries outside the largest `density` by magnitude are 0; equal magnitudes stay together.

    The paper trims over the whole model. Here each tensor is trimmed by itself: that needs one tensor in memory and
    one pass over the files, and small tensors (norms, biases), whose entries are small, do not vanish altogether.
    """
    kept = math.ceil(density * delta.size)
    if kept >= delta.size:
        return delta
    magnitudes = np.abs(delta)
    threshold = np.partition(magnitudes, delta.size - kept, axis=None)[delta.size - kept]
    return np.where(magnitudes >= threshold, delta, np.float32(0))


def drop(delta: np.ndarray, density: float, seed: int, teacher: str, key: str) -> np.ndarray:
    """Returns a delta whose entries are kept with probability `density` and divided by it (DARE, arXiv:2311.03099).

    Args:
      teacher: what the teacher is known by, a hash of its contents; with `seed` and `key` it decides the mask, so that
        neither the order of teachers and tensors nor the names of files do.
    """
    words = np.frombuffer(hashlib.sha256(f"{seed} {teacher} {key}".encode()).digest(), np.uint32)
    mask = np.random.default_rng(words).random(delta.shape, np.float32) < density
    return np.where(mask, delta / np.float32(density), np.float32(0))


@dataclasses.dataclass(frozen=True)
class Method:
    """How checkpoints are averaged."""

    name: str  # One of METHODS.
    weights: tuple[float, ...]  # Of the teachers.
    scale: float = 1.0  # Times the merged delta.
    density: float = 1.0  # The share of a delta's entries that is kept.
    seed: int = 0  # Of what DARE drops.

    def merge(self, base: np.ndarray, teachers: Iterable[np.ndarray], names: Sequence[str], key: str) -> np.ndarray:
        """Returns one merged tensor, float32.

        Args:
          base: the base's tensor, float32.
          teachers: theirs, float32, in the order of the weights; read one after the other.
          names: what each teacher is known by.
          key: of the tensor.
        """
        if self.name == "average":
            return average(teachers, self.weights)
        deltas = (teacher - base for teacher in teachers)
        if self.name == "ties":
            return ties(base, deltas, self.weights, self.scale, self.density)
        if self.name == "dare":
            named = zip(deltas, names, strict=True)
            deltas = (drop(delta, self.density, self.seed, name, key) for delta, name in named)
        return task_arithmetic(base, deltas, self.weights, self.scale)


def merged(
    base: Checkpoint, teachers: Sequence[Checkpoint], method: Method, components: Sequence[str] = ("unet",)
) -> Checkpoint:
    """Returns the base with a merged UNet (or other networks), each of whose tensors is computed when it is read.

    Teachers are summed in the order of their contents' hashes, so that the same ones in any order, under any name and
    in any file format give the same bits.

    Args:
      base: the common ancestor, of which everything else is kept.
      teachers: checkpoints that fit it.
      method: how; its weights are in the order of `teachers`.
      components: the networks that are merged; of a teacher without one, the base's counts.
    """
    pairs = sorted(zip(teachers, method.weights, strict=True), key=lambda pair: (pair[0].digest("unet"), pair[1]))
    names = [teacher.digest("unet") for teacher, _ in pairs]
    method = dataclasses.replace(method, weights=tuple(weight for _, weight in pairs))
    ordered = [teacher for teacher, _ in pairs]
    found = {name: _merged_network(name, base, ordered, names, method) for name in components}
    return dataclasses.replace(base, components={**base.components, **found})


def _merged_network(component, base, teachers, names, method) -> Component:
    shapes, owners = base.shapes(component), (base, *(teacher.lent(component, base) for teacher in teachers))
    ours, *theirs = (naming.checked(shapes, one.tensors(component), f"{component} of {one.path}") for one in owners)

    def read(key):
        tensors = (np.asarray(network[key], np.float32) for network in theirs)
        return method.merge(np.asarray(ours[key], np.float32), tensors, names, key)

    entries = {
        key: Computed(shape, np.dtype(np.float32), functools.partial(read, key)) for key, shape in shapes.items()
    }
    return Component(base.config(component), lambda: Tensors(entries))
