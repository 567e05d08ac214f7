"""The embedded world's distance is for checkpoints that draw that world, which their tokenizer identifies."""

import dataclasses

from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.evaluation.feature_networks import draws_shapes_world
from dmm_jax.world.tokenizer import write_tokenizer


def test_a_base_with_another_tokenizer_draws_another_world(tiny, tmp_path):
    write_tokenizer(tmp_path, pad_token="!")
    base = open_checkpoint(tiny[0]["base"])
    assert draws_shapes_world(base)
    assert not draws_shapes_world(dataclasses.replace(base, tokenizer_folder=tmp_path))
