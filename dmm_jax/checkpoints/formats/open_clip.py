"""OpenCLIP's own layout of a text encoder, as in single files of Stable Diffusion 2 and XL.

One tensor stacks query, key and value by rows, and the projection is transposed.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from dmm_jax.checkpoints.formats.safetensors_io import Computed, Tensors, dtype_of, shape_of

_TOP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
_STACKED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # In this order, by rows, in `in_proj`.
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.")
OPEN_CLIP_H_LAYERS = 24  # Stable Diffusion 2 uses the first 23.


class OpenClipKey(NamedTuple):
    """The source of a tensor in OpenCLIP's layout: a tensor's name, perhaps a third of its rows, perhaps transposed."""

    name: str
    third: int | None = None  # 0, 1 or 2 of a stack; None: all rows.
    transposed: bool = False

    def as_dense(self) -> "OpenClipKey":
        """Returns the source of a projection that is stored as a dense layer's weight, not transposed."""
        return OpenClipKey("text_projection.weight") if self.name == "text_projection" else self


def open_clip_key(key: str) -> OpenClipKey:
    """Returns the source of a text encoder's tensor in OpenCLIP's layout, without the prefix."""
    if key in _TOP:
        return OpenClipKey(_TOP[key], transposed=key == "text_projection.weight")
    layer, _, module = key.removeprefix("text_model.encoder.layers.").partition(".")
    module, _, leaf = module.rpartition(".")
    place = f"transformer.resblocks.{layer}"
    if module in _STACKED:
        return OpenClipKey(f"{place}.attn.in_proj_{leaf}", _STACKED.index(module))
    return OpenClipKey(f"{place}.{_LAYER[module]}.{leaf}")


def to_open_clip(tensors: Mapping) -> Tensors:
    """Returns a text encoder's state dict in OpenCLIP's layout, without the prefix; converts each tensor when read."""
    parts = {}
    for key in tensors:
        source = open_clip_key(key)
        parts.setdefault(source.name, {})[source.third or 0] = (key, source.transposed)

    def read(name):
        keys = [parts[name][third] for third in sorted(parts[name])]
        arrays = [tensors[key].T if transposed else tensors[key] for key, transposed in keys]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def computed(name):
        key, transposed = parts[name][0]
        rows, *rest = shape_of(tensors, key)
        shape = (*rest[::-1], rows) if transposed else (rows * len(parts[name]), *rest)
        return Computed(shape, dtype_of(tensors, key), functools.partial(read, name))

    return Tensors({name: computed(name) for name in parts})


def drop_unused_layer(names: Iterable[str]) -> list[str]:
    """Returns the keys of Stable Diffusion 2's text encoder that condition the UNet: the layers before the last one.

    A complete OpenCLIP encoder (with its projection, or with all 24 layers) loses its last layer and the projection. An
    encoder that was saved without them stays as it is.
    """
    names = list(names)
    layers = {int(match.group(1)) for match in map(_BLOCK.match, names) if match}
    projects = any(name.startswith("text_projection") for name in names)
    if not projects and len(layers) != OPEN_CLIP_H_LAYERS:
        return names
    unused = ("text_projection", f"transformer.resblocks.{max(layers, default=0)}.")
    return [name for name in names if not name.startswith(unused)]
