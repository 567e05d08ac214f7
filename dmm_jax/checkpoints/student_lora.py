"""A student that trains as a LoRA: what it starts from, and the checkpoint that start and factors are together.

A run saves its factors, style table and style MLP. Everything else is its start, which is read again from the files of
the base, or of the teachers whose mean it is.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component
from dmm_jax.checkpoints.formats.folding import Folded, Update
from dmm_jax.checkpoints.formats.safetensors_io import Computed, Tensors, dtype_of, raw_bytes, shape_of
from dmm_jax.models import lora
from dmm_jax.models.unet_config import style_mlp_name

START = "start"  # The note of a saved step that holds the digest of its start.
WEIGHT = ".weight"


def ranks(config) -> dict[str, int]:
    """Returns the options of the student's UNet that a run's config sets; {} for a student that trains whole."""
    return {"lora_rank": config.lora.rank, "lora_conv_rank": config.lora.conv_rank} if config.lora.rank else {}


def split(params: Mapping, unet_config: Mapping) -> tuple[dict, dict]:
    """Returns the trained and the frozen parameters, or their shapes, of a student with factors."""
    return lora.split(params, ("model_embedding", style_mlp_name(unet_config)))


def trained_shapes(unet_config: Mapping, options: Mapping) -> dict:
    """Returns the shapes of what a run trains and saves of its student.

    Args:
      options: `ranks` of its config.
    """
    shapes = abstract_params("unet", unet_config, **options)
    return split(shapes, unet_config)[0] if options else shapes


def first_factors(shapes: Mapping, seed: int) -> dict:
    """Draws the factors of a student: A with PyTorch's initial weights, and zeros for B, so that B A is zero.

    Args:
      shapes: of what the student trains; only factors are returned.
    """
    rng = np.random.default_rng([seed, 1])  # The style table has the seed alone.

    def draw(path, leaf):
        if lora.UP in path:
            return np.zeros(leaf.shape, np.float32)
        bound = np.prod(leaf.shape[:-1]) ** -0.5
        return rng.uniform(-bound, bound, leaf.shape).astype(np.float32)

    factors: dict = {}
    for path, leaf in naming.flat(shapes):
        if lora.is_factor(path):
            naming.insert(factors, path, draw(path, leaf))
    return factors


def start_sources(config, base: Checkpoint, teachers: Iterable[Checkpoint]) -> list[Checkpoint]:
    """Returns the checkpoints whose mean a student starts from: the base, or teachers that predict what it predicts."""
    prediction = config.student_prediction or base.prediction_type
    teachers = teachers if config.student_init == "average" else ()
    return [teacher for teacher in teachers if teacher.prediction_beside(base) == prediction] or [base]


def mean(base: Checkpoint, sources: Sequence[Checkpoint]) -> Checkpoint:
    """Returns the base with the mean of the UNets; each of its tensors is computed whenever it is read."""
    if len(sources) == 1:
        return sources[0]
    shapes = base.shapes("unet")
    unets = [naming.checked_tensors(shapes, it.tensors("unet"), f"unet of {it.path}") for it in sources]

    def read(key):
        return sum(np.asarray(unet[key], np.float32) for unet in unets) / np.float32(len(unets))

    entries = {key: _Mean(shape, np.dtype(np.float32), functools.partial(read, key)) for key, shape in shapes.items()}
    return dataclasses.replace(base, components={"unet": Component(base.unet_config, lambda: Tensors(entries))})


class _Mean(Computed):
    """A tensor that is computed again whenever it is read, so that no mean of whole networks is ever in memory."""

    computed = True


def digest(sources: Sequence[Checkpoint]) -> str:
    """Returns a hash that tells one start from another: of the vectors and first rows of its sources' UNets.

    Any training changes some of them, and they take a moment to read.
    """
    result = hashlib.sha256()
    for source in sources:
        tensors = source.tensors("unet")
        for key, name in sorted(naming.spellings(tensors).items()):
            array = np.asarray(tensors[name])
            rows = array if array.ndim < 2 else array[:1]
            result.update(f"{key} {array.shape}\n".encode() + raw_bytes(np.asarray(rows, np.float32)))
    return result.hexdigest()


def folded_tensors(start: Checkpoint, saved: Mapping) -> Mapping:
    """Returns the state dict of a student's UNet: its start with the factors folded in, and its style path.

    Args:
      saved: the state dict of what the student trains.
    """
    tensors = start.tensors("unet")
    updates = {key: [(1.0, Update(saved, "LoRA", names, 1.0))] for key, names in factor_keys(saved).items()}
    folded = Folded(tensors, updates, start.shapes("unet"))
    entries = {
        key: Computed(shape_of(folded, key), dtype_of(folded, key), functools.partial(folded.__getitem__, key))
        for key in folded
    }
    style = {key: array for key, array in saved.items() if not lora.is_factor(key.split("."))}
    return Tensors(
        entries | {key: Computed(array.shape, array.dtype, lambda array=array: array) for key, array in style.items()}
    )


def factors(saved: Callable[[], Mapping]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns {key of a layer's weight: (up, down)} from the function that reads what a student trains."""
    tensors = saved()
    return {key: (tensors[names["up"]], tensors[names["down"]]) for key, names in factor_keys(tensors).items()}


def factor_keys(saved: Iterable[str]) -> dict[str, dict[str, str]]:
    """Returns {key of a layer's weight: {"down": key of A, "up": key of B}}."""
    ends = {role: f".{name}{WEIGHT}" for role, name in (("down", lora.DOWN), ("up", lora.UP))}
    layers = [key.removesuffix(ends["down"]) for key in saved if key.endswith(ends["down"])]
    return {layer + WEIGHT: {role: layer + end for role, end in ends.items()} for layer in layers}


def stack(leaves: Sequence) -> naming.ComputedArray:
    """Returns equal host parameters of a loop's blocks as one, which is joined when it is read."""
    shape = (len(leaves), *leaves[0].shape)
    return naming.ComputedArray(lambda: np.stack([np.asarray(leaf) for leaf in leaves]), shape, leaves[0].dtype)
