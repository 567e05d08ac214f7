"""Suggestions for a wrong name."""

import pytest

from dmm_jax.runtime.errors import meant


@pytest.mark.parametrize(
    "name, end",
    [
        ("tensorbord", "; did you mean tensorboard?"),
        ("Single_File", "; did you mean single-file?"),
        ("style_lora", "; did you mean style-lora?"),
        ("zzzz", "."),
        ("", "."),
    ],
)
def test_only_names_that_are_near_are_suggested(name, end):
    assert meant(name, ["tensorboard", "single-file", "style-lora", "wandb"]) == end
