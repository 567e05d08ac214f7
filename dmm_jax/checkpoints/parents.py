"""Opens the parents of a run, the base and the teachers, by the config that names them."""

from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.open import open_checkpoint, open_teacher
from dmm_jax.config.options import opening_options
from dmm_jax.runtime.errors import naming_option


def open_base(config) -> Checkpoint:
    """Opens the base of a config.

    Raises:
      CheckpointError: see `open_checkpoint`; the message names the option.
    """
    with naming_option("config.base"):
        return open_checkpoint(config.base, **opening_options(config, "base"))


def open_teachers(config) -> dict[str, Checkpoint]:
    """Opens the teachers of a config, by name.

    Raises:
      CheckpointError: see `open_checkpoint`; the message names the option and the teacher.
    """
    teachers = {}
    for name, path in config.teachers:
        with naming_option(f"config.teachers, {name}"):
            teachers[name] = open_teacher(path, config.base, **opening_options(config, name))
    return teachers
