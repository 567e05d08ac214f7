"""The losses, against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax.distill import losses

KEYS = jax.random.split(jax.random.key(0), 4)


def test_score_error_is_the_mean_square_per_sample():
    a, b = (jax.random.normal(key, (3, 4, 4, 2)) for key in KEYS[:2])
    assert np.allclose(
        losses.score_error(a, b), [np.mean((np.asarray(x) - np.asarray(y)) ** 2) for x, y in zip(a, b, strict=True)]
    )


@pytest.mark.parametrize("kind", ["l2", "cosine"])
def test_equal_features_have_no_error(kind):
    maps = [jax.random.normal(KEYS[0], (2, 4, 4, 3)), jax.random.normal(KEYS[1], (2, 2, 2, 5))]
    assert np.allclose(losses.feature_error(maps, maps, kind), 0.0, atol=1e-6)


def test_feature_error_is_the_mean_over_blocks_not_over_values():
    small, large = jnp.ones((1, 1, 1, 1)), jnp.ones((1, 8, 8, 4))
    error = losses.feature_error([small, large], [2 * small, large], "l2")
    assert np.allclose(error, 0.5)  # 1 in the first block, 0 in the second, whatever their sizes.


def test_cosine_ignores_scale_and_l2_does_not():
    maps = [jax.random.normal(KEYS[2], (2, 4, 4, 3))]
    tripled = [3.0 * maps[0]]
    assert np.allclose(losses.feature_error(maps, tripled, "cosine"), 0.0, atol=1e-6)
    assert np.all(np.asarray(losses.feature_error(maps, tripled, "l2")) > 1.0)


def test_errors_are_computed_in_float32():
    a, b = jnp.full((1, 2, 2, 1), 256.0, jnp.bfloat16), jnp.full((1, 2, 2, 1), 257.0, jnp.float32)
    assert losses.score_error(a, b).dtype == jnp.float32
    assert np.allclose(losses.score_error(a, b), 1.0)


@pytest.mark.parametrize("kind", ["l2", "normalized", "cosine"])
def test_a_zero_feature_vector_has_a_finite_gradient(kind):
    zeros, ones = jnp.zeros((1, 2, 2, 3)), jnp.ones((1, 2, 2, 3))
    for student, teacher in ((zeros, ones), (ones, zeros), (zeros, zeros)):
        grad = jax.grad(lambda student, teacher=teacher: losses.feature_error([student], [teacher], kind).sum())(
            student
        )
        assert jnp.isfinite(grad).all()


def test_the_pseudo_huber_error_is_the_root_of_the_squared_error():
    student, teacher = jnp.full((2, 4, 4, 4), 3.0), jnp.zeros((2, 4, 4, 4))
    np.testing.assert_allclose(losses.pseudo_huber_error(student, teacher), 3.0, rtol=1e-3)
    gradient = jax.grad(lambda x: losses.pseudo_huber_error(x, teacher).sum())
    assert float(jnp.abs(gradient(teacher)).max()) == 0.0  # Finite where the root's own gradient is not.
    np.testing.assert_allclose(gradient(student), gradient(10 * student), rtol=1e-3)
