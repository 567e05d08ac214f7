"""The step: one mask for both, no dependence on micro-batches, and step 0 equal to the base."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax import sharding, train
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.data.cache import LatentCache
from dmm_jax.data.pipeline import batches
from dmm_jax.distill import step as distill_step
from dmm_jax.distill import student, teachers
from dmm_jax.tokenizer import Tokenizer
from tests import worlds


@pytest.fixture(scope="module")
def run(tiny):
    """Everything that a step needs, on one device."""
    paths, config = tiny
    base = open_checkpoint(paths["base"])
    others = [open_checkpoint(paths[name]) for name in worlds.NAMES]
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    frozen, encoders = teachers.put_teachers(base, others, mesh, jnp.float32)
    networks, student_config = train.define_networks(config, base, 2)
    style = student.style_params(student_config, "zero", 0)
    params = student.put_student([base.params("unet")], style, student_config, mesh)
    objective = train.define_objective(config, base, Tokenizer.from_folder(base.tokenizer_folder))
    batch = batches(LatentCache(config.data.cache), 0, 2, 8)[0]
    specs = sharding.state_specs(params, mesh)
    build = functools.partial(
        distill_step.build_loss_and_grads, networks, objective, mesh, specs, dtype=jnp.float32, seed=0
    )
    return {"build": build, "args": (params, frozen, encoders, batch, jnp.int32(3)), "networks": networks,
            "objective": objective, "base": base, "others": others}  # fmt: skip


def test_micro_batches_do_not_change_the_gradient(run):
    whole, errors = jax.jit(run["build"](gradient_accumulation=1))(*run["args"])
    parts, again = jax.jit(run["build"](gradient_accumulation=2))(*run["args"])
    assert worlds.differing(whole, parts) < 1e-5
    assert worlds.differing(errors, again) < 1e-5


def test_a_student_that_starts_as_its_only_teacher_has_no_error_and_no_gradient(run):
    params, frozen, encoders, batch, step = run["args"]
    same = {"unet": jax.tree.map(lambda leaf: jnp.repeat(leaf[None], 2, 0), {k: v for k, v in params.items()
            if k not in ("model_embedding", "add_embedding")}), "encoder": jnp.array([-1, -1])}  # fmt: skip
    grads, errors = jax.jit(run["build"](gradient_accumulation=1))(params, same, encoders, batch, step)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(errors)) < 1e-9
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads)) < 1e-4


def test_teachers_on_the_mesh_equal_teachers_alone(run):
    """The law that a partitioned vmap over convolutions broke: each teacher's error is what it is by itself."""
    params, frozen, encoders, batch, step = run["args"]
    _, both = jax.jit(run["build"](gradient_accumulation=1))(*run["args"])
    for row in range(2):
        alone = {
            "unet": jax.tree.map(lambda leaf, row=row: leaf[jnp.array([row, row])], frozen["unet"]),
            "encoder": frozen["encoder"][jnp.array([row, row])],
        }
        _, errors = jax.jit(run["build"](gradient_accumulation=1))(params, alone, encoders, batch, step)
        assert np.allclose(errors["score"][row], both["score"][row], rtol=1e-5)


def test_noise_timesteps_and_drops_are_functions_of_seed_step_and_sample_alone(run):
    objective, (_, _, _, batch, _) = run["objective"], run["args"]
    one = {name: leaf[0] for name, leaf in batch.items()}
    key = jax.random.key(1)
    whole = distill_step.draw(objective, key, jnp.arange(4), one)
    part = distill_step.draw(objective, key, jnp.arange(2, 4), jax.tree.map(lambda leaf: leaf[2:], one))
    for name in ("noise", "timesteps", "input_ids"):
        assert np.array_equal(whole[name][2:], part[name])
    assert len({int(t) for t in whole["timesteps"]}) > 1


def test_dropped_prompts_become_the_empty_one_at_the_rate_asked_for(run):
    objective, (_, _, _, batch, _) = run["objective"], run["args"]
    many = {"latents": jnp.zeros((2000, 1, 1, 4)), "input_ids": jnp.repeat(batch["input_ids"][0][:1], 2000, 0)}
    drawn = distill_step.draw(objective, jax.random.key(0), jnp.arange(2000), many)
    empty = np.all(np.asarray(drawn["input_ids"]) == np.asarray(objective.empty_ids), axis=1)
    assert empty.mean() == pytest.approx(objective.prompt_dropout, abs=0.02)


def test_encoders_equal_to_the_base_are_shared(run):
    rows, distinct = teachers.encoder_rows(run["base"], run["others"])
    assert rows == [-1, 0]  # The first teacher has none of its own; the second's differs.
    assert [one.name for one in distinct] == ["right"]
