"""Disk: the checkpoints that Orbax keeps, counted without writing one."""

import jax.numpy as jnp
import pytest

from dmm_jax.checkpoints.states import StateStore
from dmm_jax.config import options as config_lib
from dmm_jax.planning import disk


def config_of(num_steps, every, kept, kept_every):
    config = config_lib.get_config()
    config.num_steps, config.checkpoint_every = num_steps, every
    config.checkpoints_kept, config.checkpoints_kept_every = kept, kept_every
    return config


@pytest.mark.parametrize(
    "config, steps",
    [
        (config_of(100, 10, 2, 0), [80, 90, 100]),  # The one being written, and two.
        (config_of(100, 10, 0, 0), range(10, 101, 10)),
        (config_of(100, 10, 0, 50), range(10, 101, 10)),
        (config_of(100, 10, 2, 50), [50, 80, 90, 100]),
        (config_of(105, 10, 1, 30), [30, 60, 90, 100, 105]),
        (config_of(100, 0, 2, 0), [100]),
    ],
)
def test_all_that_are_kept_are_counted_and_the_one_being_written(config, steps):
    assert disk.checkpoints(config) == list(steps)


def test_it_is_what_is_left_on_disk_and_one_more(tmp_path):
    config = config_of(9, 1, 2, 3)
    with StateStore(tmp_path, keep_last=config.checkpoints_kept, keep_every=config.checkpoints_kept_every) as store:
        for step in range(1, config.num_steps + 1):
            store.save(step, {"step": jnp.int32(step)})
    left = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert set(disk.checkpoints(config)) - set(left) == {config.num_steps - config.checkpoints_kept}
    assert set(left) < set(disk.checkpoints(config))
