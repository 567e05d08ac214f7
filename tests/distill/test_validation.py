"""Laws of the validation set's errors by timestep."""

import numpy as np

from dmm_jax.distill.validation import by_bin


def test_a_bin_without_an_image_is_none_and_shifts_no_other():
    errors = np.array([[1.0, 2.0, 4.0], [3.0, 5.0, 8.0]])
    assert by_bin(errors, ["a", "b"], np.array([10, 990, 760]), 1000) == {
        "a": [1.0, None, None, 3.0], "b": [3.0, None, None, 6.5],
    }  # fmt: skip
