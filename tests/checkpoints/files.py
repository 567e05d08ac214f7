"""Edits checkpoints on disk for tests, and compares opened ones."""

import json

import jax
import numpy as np

from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, save

COMPONENTS = ("unet", "vae", "text_encoder")


def rewrite(path, change, metadata=None):
    """Saves a safetensors file again after `change(tensors)` has edited them; None keeps the metadata."""
    file = TensorFile(path)
    tensors = {key: np.array(array) for key, array in file.items()}
    change(tensors)
    save(path, tensors, dict(file.metadata) if metadata is None else metadata)


def rewrite_json(path, **fields):
    """Saves a JSON object again with some fields replaced."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_same_networks(first, second):
    """Asserts that two opened checkpoints have bit-identical networks."""
    for component in COMPONENTS:
        equal = jax.tree.map(np.array_equal, first.params(component), second.params(component))
        assert all(jax.tree.leaves(equal))
