"""Experiment files for the command line."""

import pathlib

import ml_collections

from dmm_jax.config.serialization import to_json


def write_experiment(path: pathlib.Path, config: ml_collections.ConfigDict) -> pathlib.Path:
    """Writes a file whose `get_config()` returns the config; returns its path."""
    text = to_json(config)
    path.write_text(
        f"from dmm_jax.config.serialization import from_json\n\n\ndef get_config():\n    return from_json({text!r})\n"
    )
    return path
