"""A parent that cannot be opened is named by the option of the config that says where it is."""

import pytest

from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.parents import open_base, open_teachers
from dmm_jax.distill.incremental import resolved


def test_the_option_of_a_missing_parent_is_named(tiny):
    config = tiny[1].copy_and_resolve_references()
    config.teachers = (("left", str(tiny[0]["left"])), ("right", "nowhere"))
    assert open_base(config).has("unet")
    with pytest.raises(CheckpointError, match="^config.teachers, right: there is no checkpoint nowhere"):
        open_teachers(config)
    config.base, config.grow.student = "", "nowhere"
    with pytest.raises(CheckpointError, match="^config.base: no checkpoint is given"):
        open_base(config)
    with pytest.raises(CheckpointError, match="^config.grow.student: there is no checkpoint nowhere"):
        resolved(config)
