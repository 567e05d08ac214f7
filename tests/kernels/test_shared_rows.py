"""Laws of rows that several prompts share: adjacent repetition, and none without need."""

import jax.numpy as jnp

from dmm_jax.kernels.shared_rows import per_prompt


def test_rows_repeat_for_adjacent_prompts():
    rows = jnp.array([[1, 2], [3, 4]])
    assert per_prompt(rows, 4).tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]
    assert per_prompt(rows, 2) is rows
