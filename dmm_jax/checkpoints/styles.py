"""Operations on the styles of a merged checkpoint: choosing rows of its style table, and folding a mix in."""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.architecture import MERGED
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.safetensors_io import Computed, Tensors, dtype_of, shape_of
from dmm_jax.models.unet_config import style_mlp_name
from dmm_jax.runtime.errors import meant

TABLE = "model_embedding.weight"
BIAS = "time_embedding.linear_2.bias"  # The bias that a fixed style is folded into.


def select_styles(student: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """Returns a merged checkpoint with some of a student's styles. Everything else is unchanged, and nothing is read.

    Args:
      names: {new name: its name in the student}, in row order.

    Raises:
      CheckpointError: the student is a stock checkpoint, or has no such style (suggests the nearest name).
    """
    if not student.styles:
        raise CheckpointError(f"{student.path} is a stock checkpoint: it has no styles to choose from.")
    own_names = list(student.styles)
    for name in names.values():
        if name not in own_names:
            raise CheckpointError(
                f"{student.path} has no style {name!r}{meant(name, own_names, repr)} It has: {', '.join(own_names)}."
            )
    if not names:
        raise CheckpointError(f"no style of {student.path} is kept; name at least one of {', '.join(own_names)}.")
    rows = [own_names.index(name) for name in names.values()]
    component = student.components["unet"]

    def load():
        tensors = component.tensors
        entries = {
            key: Computed(shape_of(tensors, key), dtype_of(tensors, key), functools.partial(tensors.__getitem__, key))
            for key in tensors
        }
        shape, read = (len(rows), *entries[TABLE].shape[1:]), entries[TABLE].read
        return Tensors(entries | {TABLE: Computed(shape, entries[TABLE].dtype, lambda: read()[rows])})

    unet = Component(component.config | {"num_models": len(rows)}, load)
    return dataclasses.replace(student, components={**student.components, "unet": unet}, styles=tuple(names))


def fold_style(student: Checkpoint, weights: Float[np.ndarray, " N"]) -> Checkpoint:
    """Returns the stock checkpoint that computes what a merged one computes at a fixed mix of its styles.

    The vector of a fixed mix is a constant that is added to the time embedding, so it moves into the bias of
    `time_embedding.linear_2`. The sum is float32. It reads the style table and its MLP; other tensors when asked for.

    Raises:
      CheckpointError: the student has no styles, or their number is not that of the weights.
    """
    config = student.unet_config
    if config.get("addition_embed_type") not in MERGED:
        raise CheckpointError(f"{student.path} has no styles to fold in: it is a stock checkpoint already.")
    if len(weights) != config["num_models"]:
        raise CheckpointError(f"{student.path} has {config['num_models']} styles; got {len(weights)} weights.")
    tensors = naming.checked_tensors(student.shapes("unet"), student.tensors("unet"), f"unet of {student.path}")
    mlp = style_mlp_name(config)
    vector = style_vector(tensors, mlp, weights)
    stock = {
        key: Computed(tensors.shape(key), tensors.dtype(key), functools.partial(tensors.__getitem__, key))
        for key in tensors
        if not key.startswith(("model_embedding.", f"{mlp}."))
    }
    stock[BIAS] = Computed(vector.shape, np.dtype(np.float32), lambda: tensors[BIAS].astype(np.float32) + vector)
    kind = {"model_merge": None, "model_merge_xl": "text_time"}[config["addition_embed_type"]]
    config = {name: value for name, value in config.items() if name != "num_models"} | {"addition_embed_type": kind}
    components = {**student.components, "unet": Component(config, lambda: Tensors(stock))}
    return dataclasses.replace(student, components=components, styles=None)


def style_vector(
    tensors: Mapping[str, np.ndarray], mlp: str, weights: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " E"]:
    """Returns the vector that a mix adds to the time embedding, float32: the MLP of the mixed row of the style table.

    Source: DMM, arXiv:2504.12364, A.1 and 4.5. `mlp` is the name of the MLP in the state dict.
    """

    def linear(layer, x):
        weight, bias = (np.asarray(tensors[f"{mlp}.{layer}.{leaf}"], np.float32) for leaf in ("weight", "bias"))
        return weight @ x + bias

    row = np.asarray(weights, np.float32) @ np.asarray(tensors[TABLE], np.float32)
    hidden = linear("linear_1", row)
    return linear("linear_2", hidden / (1.0 + np.exp(-hidden)))
