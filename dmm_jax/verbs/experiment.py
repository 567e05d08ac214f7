"""What verbs that take a config share: reading it, and keeping compiled programs."""

from dmm_jax.config.files import read_config
from dmm_jax.runtime import compilation


def read(path, overrides):
    """Reads a config as `config.files.read_config` does, and keeps compiled programs in the folder that it names."""
    config = read_config(path, overrides)
    compilation.keep(config.compilation_cache)
    return config
