"""Weight averages: the arithmetic by which people merge checkpoints without training, tensor by tensor.

A delta is a teacher's tensor minus the base's. All arithmetic is float32, with one tensor in memory at a time. The
methods are baselines: their result is a compromise between the styles; distillation keeps the styles apart.
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
from dmm_jax.runtime.errors import UserError, meant

# {method: {option: default}}; each also takes weights. Without a validation set, TIES' paper (section 4) recommends
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
    """Returns sum(weight * tensor), float32."""
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

    The sign of each entry is the sign of the weighted sum of the trimmed deltas. The weighted mean is over the teachers
    whose trimmed delta has this sign. In the paper all weights are 1.
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
    """Returns a delta whose entries are 0, except the share `density` of the largest magnitudes and their equals.

    The paper trims over the whole model. Here each tensor is trimmed by itself: this needs one tensor in memory and
    one pass over the files, and small tensors (norms, biases), whose entries are small, do not vanish completely.
    """
    size = math.ceil(density * delta.size)
    if size >= delta.size:
        return delta
    magnitudes = np.abs(delta)
    threshold = np.partition(magnitudes, delta.size - size, axis=None)[delta.size - size]
    return np.where(magnitudes >= threshold, delta, np.float32(0))


def drop(delta: np.ndarray, density: float, seed: int, teacher: str, key: str) -> np.ndarray:
    """Returns a delta whose entries are kept with probability `density` and divided by it (DARE, arXiv:2311.03099).

    Args:
      teacher: a hash of the teacher's contents. With `seed` and `key` it determines the mask, so the mask depends
        neither on the order of teachers and tensors nor on file names.
    """
    words = np.frombuffer(hashlib.sha256(f"{seed} {teacher} {key}".encode()).digest(), np.uint32)
    mask = np.random.default_rng(words).random(delta.shape, np.float32) < density
    return np.where(mask, delta / np.float32(density), np.float32(0))


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of averaging, with its weights and options."""

    name: str  # One of METHODS.
    weights: tuple[float, ...]  # One per teacher.
    scale: float = 1.0  # The factor of the merged delta.
    density: float = 1.0  # The share of a delta's entries that is kept.
    seed: int = 0  # Determines which entries DARE drops.

    def merge(self, base: np.ndarray, teachers: Iterable[np.ndarray], hashes: Sequence[str], key: str) -> np.ndarray:
        """Returns one merged tensor, float32.

        Args:
          base: the base's tensor, float32.
          teachers: the teachers' tensors, float32, in the order of the weights; read one after the other.
          hashes: a hash of each teacher's contents.
          key: the tensor's key.
        """
        if self.name == "average":
            return average(teachers, self.weights)
        deltas = (teacher - base for teacher in teachers)
        if self.name == "ties":
            return ties(base, deltas, self.weights, self.scale, self.density)
        if self.name == "dare":
            pairs = zip(deltas, hashes, strict=True)
            deltas = (drop(delta, self.density, self.seed, teacher, key) for delta, teacher in pairs)
        return task_arithmetic(base, deltas, self.weights, self.scale)


def parse_method(name: str, num_teachers: int, weights: Sequence[float] | None = None, **options) -> Method:
    """Returns a method with its weights and options, defaults filled in.

    Args:
      weights: one per teacher; None for equal weights.
      options: scale, density and seed; None for the method's default.

    Raises:
      UserError: the method or an option is unknown, or a number is out of range.
    """
    if name not in METHODS:
        raise UserError(f"there is no method {name!r}{meant(name, METHODS)} There are: {', '.join(METHODS)}.")
    options = {option: value for option, value in options.items() if value is not None}
    unused = sorted(set(options) - set(METHODS[name]))
    if unused:
        takes = ", ".join(METHODS[name]) or "weights alone"
        raise UserError(f"{name} does not take {', '.join(unused)}; it takes {takes}. Leave it out.")
    method = Method(name, _checked_weights(name, num_teachers, weights), **{**METHODS[name], **options})
    if not math.isfinite(method.scale):
        raise UserError(f"scale must be finite; got {method.scale}.")
    if not 0 < method.density <= 1:
        raise UserError(
            f"density must be above 0 and at most 1, the share of each difference that stays; got {method.density}."
        )
    return method


def _checked_weights(name, num_teachers, weights) -> tuple[float, ...]:
    weights = (1.0,) * num_teachers if weights is None else tuple(map(float, weights))
    if not num_teachers or len(weights) != num_teachers:
        raise UserError(f"give one weight per teacher; got {num_teachers} teachers, {len(weights)} weights.")
    if not all(map(math.isfinite, weights)):
        raise UserError(f"weights must be finite; got {weights}.")
    if name in ("average", "ties") and (min(weights) < 0 or not sum(weights)):
        raise UserError(f"{name} takes a mean: weights must not be negative, nor all 0; got {weights}.")
    return weights


def merge_networks(
    base: Checkpoint, teachers: Sequence[Checkpoint], method: Method, components: Sequence[str] = ("unet",)
) -> Checkpoint:
    """Returns the base with its UNet (or `components`) merged; each merged tensor is computed when it is read.

    Teachers are summed in the order of their contents' hashes. So the result has the same bits for any order, names and
    file formats of the teachers.

    Args:
      base: the common ancestor, which provides all other networks.
      teachers: checkpoints that fit the base.
      method: the method, its weights in the order of `teachers`.
      components: the networks to merge; a teacher that lacks one counts with the base's.
    """
    pairs = sorted(zip(teachers, method.weights, strict=True), key=lambda pair: (pair[0].digest("unet"), pair[1]))
    teachers = [teacher for teacher, _ in pairs]
    method = dataclasses.replace(method, weights=tuple(weight for _, weight in pairs))
    networks = {name: _merged_network(name, base, teachers, method) for name in components}
    return dataclasses.replace(base, components={**base.components, **networks})


def _merged_network(component, base, teachers, method) -> Component:
    shapes, hashes = base.shapes(component), [teacher.digest("unet") for teacher in teachers]
    providers = (base, *(teacher.provider(component, base) for teacher in teachers))
    base_tensors, *teacher_tensors = (
        naming.checked_tensors(shapes, provider.tensors(component), provider.where(component)) for provider in providers
    )

    def read(key):
        tensors = (np.asarray(network[key], np.float32) for network in teacher_tensors)
        return method.merge(np.asarray(base_tensors[key], np.float32), tensors, hashes, key)

    entries = {
        key: Computed(shape, np.dtype(np.float32), functools.partial(read, key)) for key, shape in shapes.items()
    }
    return Component(base.config(component), lambda: Tensors(entries))
