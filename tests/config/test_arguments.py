"""What a caller of the pipeline gives: the wrong type and the wrong value are both told by name, as ValueErrors."""

import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax.config import arguments


@pytest.mark.parametrize("value", [1.5, "3", None, True, 0, float("nan"), [1]])
def test_values_that_are_not_whole_numbers_in_bounds_are_refused(value):
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1; got"):
        arguments.whole_number("steps", value, 1)


@pytest.mark.parametrize("value", [-1, 2**32])
def test_seeds_do_not_wrap(value):
    with pytest.raises(ValueError, match="from 0 to 4294967295"):
        arguments.whole_number("a seed", value, 0, arguments.MAX_SEED)
    assert arguments.whole_number("a seed", arguments.MAX_SEED, 0, arguments.MAX_SEED) == arguments.MAX_SEED


@pytest.mark.parametrize("value", [7, np.int64(7), np.uint32(7), jnp.int32(7)])
def test_numbers_of_numpy_and_jax_are_numbers(value):
    assert arguments.whole_number("steps", value, 1) == 7 and arguments.number("scale", value) == 7.0
    assert arguments.number("scale", np.float32(0.5)) == arguments.number("scale", jnp.float32(0.5)) == 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "7", None, [7.0]])
def test_values_that_are_not_finite_numbers_are_refused(value):
    with pytest.raises(ValueError, match="scale must be a finite number"):
        arguments.number("scale", value)


@pytest.mark.parametrize(
    "value, message", [("64", "whole"), (-64, "whole"), (2 * 10**7, "whole"), (7, "Use 8"), (63, "Use 56")]
)
def test_values_that_are_not_sizes_are_refused(value, message):
    with pytest.raises(ValueError, match=f"height must be .*{message}"):
        arguments.pixels("height", value, 8)


@pytest.mark.parametrize(
    "values, message", [(3, "must be a sequence"), ("ab", "must be a sequence"), ([1.0], "has 1 entries")]
)
def test_values_that_are_not_one_per_prompt_are_refused(values, message):
    with pytest.raises(ValueError, match=f"seeds {message}"):
        arguments.per_prompt("seeds", values, 2)


@pytest.mark.parametrize("values, message", [(3, "must be texts"), ([3], "must be texts"), ([], "is empty")])
def test_values_that_are_not_texts_are_refused(values, message):
    with pytest.raises(ValueError, match=f"prompts {message}"):
        arguments.texts("prompts", values)
    assert arguments.texts("prompts", "one") == ["one"] and arguments.texts("prompts", ("a", None)) == ["a", None]


@pytest.mark.parametrize("value", [3, "64", (64,), (64, 1.5), (64, -1)])
def test_values_that_are_not_pairs_of_pixels_are_refused(value):
    with pytest.raises(ValueError, match="target_size must be"):
        arguments.pixel_pair("target_size", value)
