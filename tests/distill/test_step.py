"""The step: one mask for both, no dependence on micro-batches, and step 0 equal to the base."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dmm_jax import distillation as definitions
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.config import options as config_lib
from dmm_jax.data.batches import batches
from dmm_jax.data.cache import LatentCache
from dmm_jax.distill import clipping, incremental, student, teachers
from dmm_jax.distill import step as distill_step
from dmm_jax.runtime import sharding
from dmm_jax.text.tokenizer import Tokenizers
from tests import worlds

ONE_STYLE = jnp.array([0, 1])  # The first, and how many.


@pytest.fixture(scope="module")
def run(tiny):
    """Everything that a step needs, on one device."""
    paths, config = tiny
    base = open_checkpoint(paths["base"])
    others = {name: open_checkpoint(paths[name]) for name in worlds.NAMES}
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    lessons = incremental.lessons(others, None, 0)
    frozen, encoders = teachers.put_teachers(base, lessons, base.unet_config, mesh, jnp.float32)
    networks, student_config = definitions.define_networks(config, base)
    style = student.style_params(student_config, "zero", 0)
    params = {"student": student.put_student([base.params("unet")], style, student_config, mesh)}
    objective = definitions.define_objective(config, base, Tokenizers.from_folders(base.tokenizer_folders))
    batch = batches(LatentCache(config.data.cache), 0, 2, 8)[0]
    specs = sharding.state_specs(params, mesh)
    build = functools.partial(
        distill_step.build_loss_and_grads, networks, objective, mesh, specs, dtype=jnp.float32, seed=0
    )
    whole = jax.jit(build(gradient_accumulation=1))  # Compiled once, by the first test that asks.
    return {"build": build, "whole": whole, "args": (params, frozen, encoders, batch, jnp.int32(3)),
            "networks": networks, "objective": objective, "base": base, "others": list(others.values())}  # fmt: skip


def test_micro_batches_do_not_change_the_gradient(run):
    whole, errors = run["whole"](*run["args"])
    parts, again = jax.jit(run["build"](gradient_accumulation=2))(*run["args"])
    assert worlds.differing(whole, parts) < 1e-5
    assert worlds.differing(errors, again) < 1e-5


def test_a_student_that_starts_as_its_only_teacher_has_no_error_and_no_gradient(run):
    params, frozen, encoders, batch, step = run["args"]
    own = {k: v for k, v in params["student"].items() if k not in ("model_embedding", "add_embedding")}
    same = frozen | {"unet": jax.tree.map(lambda leaf: jnp.repeat(leaf[None], 2, 0), own)}
    same["encoder"] = jnp.array([-1, -1])
    grads, errors = run["whole"](params, same, encoders, batch, step)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(errors)) < 1e-9
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads)) < 1e-4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_in_any_network_is_found(bad):
    state = {"params": {"a": jnp.ones(3), "b": jnp.ones((2, 2))}, "discriminator": {"params": {"c": jnp.ones(2)}}}
    assert distill_step.all_finite(state)
    assert not distill_step.all_finite(state | {"params": {"a": jnp.ones(3), "b": jnp.ones((2, 2)).at[1, 0].set(bad)}})
    assert not distill_step.all_finite(state | {"discriminator": {"params": {"c": jnp.array([1, bad])}}})


def test_teachers_on_the_mesh_equal_teachers_alone(run):
    """The law that a partitioned vmap over convolutions broke: each teacher's error is what it is by itself."""
    params, frozen, encoders, batch, step = run["args"]
    _, both = run["whole"](*run["args"])
    for row in range(2):
        alone = frozen | {"unet": jax.jit(teachers.stacked)(frozen["unet"])}
        alone = jax.tree.map(lambda leaf, row=row: leaf[jnp.array([row, row])], alone)
        _, errors = run["whole"](params, alone, encoders, batch, step)
        assert np.allclose(errors["score"][row], both["score"][row], rtol=1e-5)


def test_noise_timesteps_and_drops_are_functions_of_seed_step_and_sample_alone(run):
    objective, (_, _, _, batch, _) = run["objective"], run["args"]
    one = {name: leaf[0] for name, leaf in batch.items()}
    key = jax.random.key(1)
    styles = jnp.array([3, 5])
    whole = distill_step.draw(objective, key, jnp.arange(4), styles, one)
    part = distill_step.draw(objective, key, jnp.arange(2, 4), styles, jax.tree.map(lambda leaf: leaf[2:], one))
    for name in ("noise", "timesteps", "input_ids", "style_ids"):
        assert np.array_equal(whole[name][2:], part[name])
    assert len({int(t) for t in whole["timesteps"]}) > 1


def test_dropped_prompts_become_the_empty_one_at_the_rate_asked_for(run):
    objective, (_, _, _, batch, _) = run["objective"], run["args"]
    many = {"latents": jnp.zeros((2000, 1, 1, 4)), "input_ids": jnp.repeat(batch["input_ids"][0][:1], 2000, 0)}
    drawn = distill_step.draw(objective, jax.random.key(0), jnp.arange(2000), ONE_STYLE, many)
    empty = np.all(np.asarray(drawn["input_ids"]) == np.asarray(objective.empty_ids), axis=1)
    assert empty.mean() == pytest.approx(objective.prompt_dropout, abs=0.02)


def test_dropped_prompts_are_spread_evenly_over_what_stands_for_none(run):
    objective = dataclasses.replace(run["objective"], empty_ids=((7, 7), (-1, -1)), prompt_dropout=0.4)
    many = {"latents": jnp.zeros((4000, 1, 1, 4)), "input_ids": jnp.full((4000, 2), 3)}
    drawn = np.asarray(distill_step.draw(objective, jax.random.key(0), jnp.arange(4000), ONE_STYLE, many)["input_ids"])
    assert {tuple(row) for row in drawn.tolist()} == {(3, 3), (7, 7), (-1, -1)}
    shares = [(drawn[:, 0] == token).mean() for token in (7, -1)]
    assert shares == pytest.approx([0.2, 0.2], abs=0.02)


def test_encoders_equal_to_the_base_are_shared(run):
    rows, distinct = teachers.encoder_rows(run["base"], run["others"], 1)
    assert rows == [-1, 0]  # The first teacher has none of its own; the second's differs.
    assert [one.name for one in distinct] == ["right"]


class Encoded(Checkpoint):
    """All that is asked of a checkpoint where text encoders are told apart."""

    def __init__(self, digest):
        object.__setattr__(self, "digest", digest)

    def text_digest(self, base=None):
        return self.digest


@pytest.mark.parametrize(
    "digests, shards, rows_held",
    [("xbxybbbx", 1, 2), ("xbxybbbx", 2, 2), ("xbxybbbx", 4, 2), ("xbxybbbx", 8, 1), ("bbbb", 2, 0), ("xyzw", 4, 1)],
)
def test_a_shard_of_teachers_holds_the_encoders_of_its_own_and_each_once(digests, shards, rows_held):
    rows, held = teachers.encoder_rows(Encoded("b"), [Encoded(digest) for digest in digests], shards)
    assert len(held) == shards * rows_held
    for number, (digest, row) in enumerate(zip(digests, rows, strict=True)):
        first = number * shards // len(digests) * rows_held
        assert digest == ("b" if row == -1 else held[first:][:rows_held][row].digest)


def steps_with(grad_at, numbers):
    """Runs updates on a toy whose gradient at step k is `grad_at(k)`; returns the state after each of `numbers`."""
    config = config_lib.get_config()
    config.learning_rate, config.warmup_steps = 0.1, 2
    optimizers = student.make_optimizers(config)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    state = student.make_state({"student": {"w": jnp.arange(3.0)}}, optimizers, mesh, ema_decay=0.5)

    def loss_and_grads(params, teachers, encoders, batch, step):
        errors = {"score": jnp.ones(2), "feature": jnp.where(batch == 7, jnp.inf, jnp.ones(2))}
        return {"student": {"w": params["student"]["w"] * grad_at(batch)}}, errors

    norms = clipping.build_norm(mesh, {"student": {"w": sharding.COPY}})
    step = jax.jit(distill_step.build_step(loss_and_grads, norms, optimizers, ema_decay=0.5))
    states, logged = [], []
    for number in numbers:
        state, metrics = step(state, None, None, jnp.float32(number))
        states.append(state)
        logged.append(metrics)
    return states, logged


@pytest.mark.parametrize("longest", [3.0, 3000.0])  # Below and above the gradient's norm.
def test_the_norm_and_the_clip_are_those_of_optax(longest):
    rng, shapes = np.random.default_rng(0), {"a": (), "b": (700,), "c": (30, 40), "d": (3, 3, 20, 5), "e": (5,)}
    grads = {
        "student": {name: jnp.asarray(50 * rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    }
    specs = jax.tree.map(lambda leaf: sharding.COPY, grads)
    norm = jax.jit(clipping.build_norm(sharding.make_mesh(devices=jax.devices()[:1]), specs))(grads)["student"]
    assert 3 < norm < 3000 and float(norm) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-6)

    ours, theirs = clipping.clip_by_norm(longest), optax.clip_by_global_norm(longest)
    state = theirs.init(grads)
    assert ours.init(grads) == state  # Checkpoints from before stay readable.
    (found, _), (wanted, _) = ours.update(grads, state, norm=norm), theirs.update(grads, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, wanted)


@pytest.mark.parametrize("bad", [4.0, 7.0])  # A gradient, or a loss alone, that is not finite.
def test_a_step_without_finite_gradient_or_loss_changes_nothing_and_is_counted(bad):
    def grad_at(number):
        return jnp.where(number == 4.0, jnp.nan, number)

    states, logged = steps_with(grad_at, [1.0, bad, bad, 2.0, bad, 3.0])
    without, _ = steps_with(grad_at, [1.0, 2.0, 3.0])
    for name in ("params", "opt_state", "ema"):
        for found, wanted in zip(jax.tree.leaves(states[-1][name]), jax.tree.leaves(without[-1][name]), strict=True):
            assert np.array_equal(found, wanted)
    assert [int(state["step"]) for state in states] == [1, 2, 3, 4, 5, 6]
    assert [int(metrics["skipped_steps"]) for metrics in logged] == [0, 1, 2, 2, 3, 3]
    assert [int(metrics["skipped_in_a_row"]) for metrics in logged] == [0, 1, 2, 0, 1, 0]


def test_the_average_is_its_closed_form():
    states, _ = steps_with(lambda number: number, [1.0, 2.0, 3.0])
    ways = [jnp.arange(3.0), *(state["params"]["w"] for state in states)]
    wanted = sum(weight * way for weight, way in zip([0.125, 0.125, 0.25, 0.5], ways, strict=True))
    np.testing.assert_allclose(states[-1]["ema"]["w"], wanted, rtol=1e-6)
    assert np.abs(wanted - ways[-1]).max() > 1e-3


def test_what_the_base_lends_a_teacher_is_said(run):
    lines = teachers.lent_by_base(run["base"], dict(zip(worlds.NAMES, run["others"], strict=True)))
    assert lines == ["Teacher 'left' has no text_encoder: the base's is used."]
