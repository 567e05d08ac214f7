"""Textual inversion (arXiv:2208.01618): files of learned vectors that a prompt uses by name, like words.

Three forms are read: AUTOMATIC1111's (`emb_params`), the pair for Stable Diffusion XL's encoders (`clip_l`, `clip_g`),
and diffusers' (one tensor, whose key is the name, as "<cat-toy>").
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile

A1111_KEY = "emb_params"
XL_KEYS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}


class Embedding(NamedTuple):
    """Learned vectors (k, D) for each text encoder, by its name."""

    name: str
    vectors: Mapping[str, np.ndarray]

    @property
    def num_vectors(self) -> int:
        """Tokens that it takes in a prompt."""
        return len(next(iter(self.vectors.values())))


def read_embeddings(files: Sequence, widths: Mapping[str, int], room: int) -> list[Embedding]:
    """Reads embeddings for text encoders of these widths, {name: D}.

    Args:
      files: paths, or "NAME=PATH" to use another name in prompts than the file's.
      room: the tokens of a chunk; an embedding may have as many vectors.

    Raises:
      CheckpointError: a file is damaged, of another form or for other text encoders, or two have one name.
    """
    embeddings: dict[str, Embedding] = {}
    for file in files:
        embedding = _read(file, widths, room)
        if embedding.name.casefold() in embeddings:
            raise CheckpointError(f"two embeddings are called {embedding.name!r}: give one a name, NAME={file}.")
        embeddings[embedding.name.casefold()] = embedding
    return list(embeddings.values())


def _read(file, widths: Mapping[str, int], room: int) -> Embedding:
    name, _, path = str(file).rpartition("=") if not pathlib.Path(file).exists() else ("", "", str(file))
    tensors = TensorFile(path)
    keys = set(tensors)
    if keys == set(XL_KEYS):
        vectors = {encoder: tensors[key] for key, encoder in XL_KEYS.items()}
    elif len(keys) == 1:
        (key,) = keys
        vectors = {"text_encoder": tensors[key]}
        name = name or ("" if key == A1111_KEY else key)
    else:
        raise CheckpointError(
            f"{path} is not an embedding that is known: it holds {', '.join(sorted(keys)[:5])}; expected {A1111_KEY}, "
            f"{' and '.join(XL_KEYS)}, or one tensor named as in the prompt."
        )
    vectors = {encoder: np.atleast_2d(np.asarray(array, np.float32)) for encoder, array in vectors.items()}
    own = ", ".join(f"{array.shape[-1]}" for array in vectors.values())
    expected = ", ".join(map(str, widths.values()))
    if set(vectors) != set(widths) or own != expected or any(array.ndim != 2 for array in vectors.values()):
        raise CheckpointError(
            f"{path} has vectors of width {own}, and the text encoders of this checkpoint {expected}: it belongs to "
            "another family."
        )
    counts = {len(array) for array in vectors.values()}
    if len(counts) > 1 or not 1 <= max(counts) <= room:
        raise CheckpointError(f"{path} has {sorted(counts)} vectors; expected 1 to {room}, equally many per encoder.")
    if not all(np.isfinite(array).all() for array in vectors.values()):
        raise CheckpointError(f"{path} holds NaN or infinity. Fetch it again.")
    name = name or pathlib.Path(path).stem
    if not name.isprintable() or set(name) & set("()[]:\\"):
        raise CheckpointError(f"{path}: a prompt cannot hold the name {name!r}. Give another: NAME={path}.")
    return Embedding(name, vectors)
