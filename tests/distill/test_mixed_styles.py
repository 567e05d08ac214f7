"""Mixes that train: style and target are the same weighted mean, of the image's own teacher and of a second one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax.distill import mixed_styles
from dmm_jax.distill import objective as module
from dmm_jax.distill.mixed_styles import Mix
from dmm_jax.distillation import Distillation
from dmm_jax.runtime import sharding

ONE_DEVICE = sharding.make_mesh(devices=jax.devices()[:1])
SAMPLE_IDS = jnp.arange(24).reshape(4, 6)  # Four teachers, six images of each.


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("every", [1, 2, 3])
def test_style_and_target_are_the_same_mean_of_two_teachers(seed, every):
    mix = mixed_styles.draw_mix(jax.random.key(seed), module.SHIFT_ID, SAMPLE_IDS, every)
    assert 1 <= mix.shift <= 3 and mix.own_share.shape == (4, 6 // every)
    style_ids = jnp.arange(4)[:, None] + jnp.zeros((4, 6), int)
    images = jnp.arange(1.0, 25).reshape(4, 6)
    asked, styles = mixed_styles.with_second_rows(images, mix), mixed_styles.own_styles(style_ids, mix)
    predictions = jnp.array([1.0, 10.0, 100.0, 1000.0])[styles] * asked  # Each teacher has a factor of its own.
    targets = mixed_styles.mean_of_both({"a": predictions}, mix)["a"]
    weights = mixed_styles.style_weights(style_ids, 4, mix)
    np.testing.assert_allclose(targets, images * (weights @ jnp.array([1.0, 10.0, 100.0, 1000.0])), rtol=1e-5)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-6)
    is_mixed = np.asarray((weights > 0).sum(-1) == 2)
    assert is_mixed[:, ::every].all() and is_mixed.sum() == 4 * (6 // every)


def test_the_mix_of_a_sample_does_not_depend_on_the_devices():
    key = jax.random.key(1)
    whole, part = (mixed_styles.draw_mix(key, module.SHIFT_ID, ids, 2) for ids in (SAMPLE_IDS, SAMPLE_IDS[:, 2:]))
    assert whole.shift == part.shift
    np.testing.assert_array_equal(whole.own_share[:, 1:], part.own_share)
    assert len(np.unique(whole.own_share)) == whole.own_share.size
    other = mixed_styles.draw_mix(jax.random.key(2), module.SHIFT_ID, SAMPLE_IDS, 2)
    assert not np.array_equal(whole.own_share, other.own_share)


def test_a_property_of_one_teacher_holds_for_the_images_that_it_is_asked():
    mix = Mix(jnp.int32(1), jnp.full((3, 2), 0.5))
    either = mixed_styles.of_either(jnp.array([False, True, False]), 4, mix)
    assert either.tolist() == [[True, False, True, False], [True] * 4, [False] * 4]


@pytest.fixture(scope="module")
def run(tiny):
    """Two teachers, whose every second image is mixed; the style path is random."""
    config = tiny[1].copy_and_resolve_references()
    config.style_init, config.mix_every = "paper", 2
    return Distillation(config, mesh=ONE_DEVICE)


@pytest.fixture(scope="module")
def errors_of(run):
    trained, compute = run.unpack(run.init()).trained, jax.jit(module.sample_errors, static_argnums=(0, 1))
    return lambda inputs: compute(run.networks, run.objective, trained, run.teachers, run.frozen, inputs)


def test_a_share_of_one_is_the_own_teacher_and_zero_is_the_second(run, errors_of):
    batch = next(run.batches())
    draw = jax.vmap(lambda *row: module.draw_inputs(run.objective, jax.random.key(0), *row))
    inputs = draw(jnp.arange(8).reshape(2, 4), run.teachers.styles, batch)
    alone = errors_of(inputs)
    own = errors_of(inputs._replace(mix=Mix(jnp.int32(1), jnp.ones((2, 2)))))
    second = errors_of(inputs._replace(mix=Mix(jnp.int32(1), jnp.zeros((2, 2)))))
    swapped = errors_of(jax.tree.map(lambda leaf: leaf[::-1], inputs)._replace(style_ids=inputs.style_ids))
    for name in ("score", "feature"):
        np.testing.assert_allclose(own[name], alone[name], rtol=1e-4)
        np.testing.assert_allclose(second[name][:, 1::2], alone[name][:, 1::2], rtol=1e-4)
        np.testing.assert_allclose(second[name][:, ::2], swapped[name][::-1, ::2], rtol=1e-4)
        assert not np.allclose(second[name][:, ::2], alone[name][:, ::2], rtol=0.01)


def test_a_step_draws_the_mixes_of_its_number(run, errors_of):
    batch, trained = next(run.batches()), run.unpack(run.init()).trained
    _, errors = jax.jit(run.gradients(trained))(trained, run.teachers, run.frozen, batch, jnp.int32(3))
    key, ids = jax.random.fold_in(jax.random.key(run.config.seed), 3), jnp.arange(8).reshape(2, 4)
    inputs = jax.vmap(lambda *row: module.draw_inputs(run.objective, key, *row))(ids, run.teachers.styles, batch)
    expected = errors_of(inputs._replace(mix=mixed_styles.draw_mix(key, module.SHIFT_ID, ids, 2)))
    np.testing.assert_allclose(errors["score"], expected["score"].mean(1), rtol=1e-4)
