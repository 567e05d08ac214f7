"""Disk: the checkpoints that Orbax keeps, counted without writing one."""

import jax.numpy as jnp
import pytest

from dmm_jax.checkpoints.states import StateStore
from dmm_jax.config.options import get_config
from dmm_jax.planning import disk


def config_of(num_steps, every, num_recent, kept_every):
    config = get_config()
    config.num_steps, config.checkpoint_every = num_steps, every
    config.checkpoints_kept, config.checkpoints_kept_every = num_recent, kept_every
    return config


@pytest.mark.parametrize(
    "config, steps",
    [
        (config_of(100, 10, 2, 0), [80, 90, 100]),  # Two complete ones, and the one that is written.
        (config_of(100, 10, 0, 0), range(10, 101, 10)),
        (config_of(100, 10, 0, 50), range(10, 101, 10)),
        (config_of(100, 10, 2, 50), [50, 80, 90, 100]),
        (config_of(105, 10, 1, 30), [30, 60, 90, 100, 105]),
        (config_of(100, 0, 2, 0), [100]),
    ],
)
def test_kept_checkpoints_and_the_unfinished_one_are_counted(config, steps):
    assert disk.checkpoints(config) == list(steps)


def test_a_finished_run_keeps_one_checkpoint_less_than_counted(tmp_path):
    config = config_of(9, 1, 2, 3)
    with StateStore(tmp_path, keep_last=config.checkpoints_kept, keep_every=config.checkpoints_kept_every) as store:
        for step in range(1, config.num_steps + 1):
            store.save(step, {"step": jnp.int32(step)})
    on_disk = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert set(disk.checkpoints(config)) - on_disk == {config.num_steps - config.checkpoints_kept}
    assert on_disk < set(disk.checkpoints(config))
