"""A config of the tiny world, and its plan."""

import pytest

from dmm_jax.planning import plan


def tiny_config(tiny):
    """Returns a config of two teachers of the tiny world, 32 images per step."""
    _, shared = tiny
    config = shared.copy_and_resolve_references()
    config.validation_size = 0
    config.batch_size = 32
    return config


@pytest.fixture
def config(tiny):
    return tiny_config(tiny)


@pytest.fixture(scope="session")
def plan_of_one(tiny):
    """The plan of the unchanged config on one large GPU."""
    return plan.plan(tiny_config(tiny), "gpu:1x80GB")
