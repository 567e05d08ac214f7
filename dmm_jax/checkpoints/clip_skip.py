"""Clip skip: text encoders that end some layers early, as many fine-tunes of Stable Diffusion 1 are trained and used.

A layer without output weights passes its input on to the last bit. So a skipped layer is a layer whose two output
projections are 0, and every other part of the package, and every stock tool, needs to know nothing about it.
"""

import dataclasses
import functools

import numpy as np

from dmm_jax.checkpoints.architecture import SD1
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.safetensors_io import Computed, Tensors, dtype_of, shape_of

METADATA_KEY = "dmm_jax.clip_skip"
NETWORK = "text_encoder"
OUTPUTS = ("self_attn.out_proj", "mlp.fc2")


def with_clip_skip(checkpoint: Checkpoint, clip_skip: int) -> Checkpoint:
    """Returns a checkpoint whose text encoder ends `clip_skip` - 1 layers early; its final norm stays.

    Raises:
      CheckpointError: the family has its layer built in, or the text encoder is missing or has too few layers.
    """
    if checkpoint.architecture != SD1:
        raise CheckpointError(
            f"clip_skip {clip_skip} means nothing for {checkpoint.path}: {checkpoint.architecture} always reads the "
            "same layer of its text encoders. Leave it out."
        )
    num_layers = checkpoint.config(NETWORK)["num_hidden_layers"]
    if not 1 <= clip_skip <= num_layers:
        raise CheckpointError(f"clip_skip must be 1 (the last layer) to {num_layers}; got {clip_skip}.")
    component, skipped = checkpoint.components[NETWORK], range(num_layers - clip_skip + 1, num_layers)
    if clip_skip == 1:
        return checkpoint
    prefixes = tuple(f"encoder.layers.{layer}.{output}." for layer in skipped for output in OUTPUTS)

    def load():
        tensors, entries = component.tensors, {}
        for key in tensors:
            shape, dtype = shape_of(tensors, key), dtype_of(tensors, key)
            is_output = key.removeprefix("text_model.").startswith(prefixes)
            read = functools.partial(np.zeros, shape, dtype) if is_output else functools.partial(tensors.get, key)
            entries[key] = Computed(shape, dtype, read)
        return Tensors(entries)

    components = {**checkpoint.components, NETWORK: Component(component.config, load)}
    return dataclasses.replace(checkpoint, components=components, clip_skip=clip_skip)
