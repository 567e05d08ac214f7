"""Laws of reading a config.json: every field is computed, changes nothing, or is refused by name."""

import pytest

from dmm_jax.models import config_json


def build(widths, heads=2, *, dtype=None, rngs=None):
    """Takes the arguments of a network's constructor."""


def test_the_constructors_fields_pass_and_inert_ones_are_dropped():
    config = {"_class_name": "X", "widths": [1], "act": "silu", "absent": None, "off": False}
    assert config_json.constructor_arguments(build, config, {"act": ("silu",)}) == {"widths": [1]}


def test_every_field_that_would_change_the_result_is_named():
    config = {"widths": [1], "act": "relu", "dropout": 0.1, "rngs": 3}
    with pytest.raises(ValueError, match="act='relu', dropout=0.1, rngs=3"):
        config_json.constructor_arguments(build, config, {"act": ("silu",)})


def test_equal_configs_hash_equally_and_share_a_compilation():
    a, b = config_json.Config(widths=[1, 2], heads=8), config_json.Config(heads=8, widths=[1, 2])
    assert a == b and hash(a) == hash(b)
    assert hash(a) != hash(config_json.Config(widths=[1, 2], heads=4))
