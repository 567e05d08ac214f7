"""The step: one drop mask for student and teacher, no dependence on micro-batches, step 0 equal to the base."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.config import options
from dmm_jax.data.batches import Batch
from dmm_jax.distill import clipping, teachers
from dmm_jax.distill.objective import draw_inputs
from dmm_jax.distill.optimizer import make_optimizers
from dmm_jax.distill.state import all_finite, init_state
from dmm_jax.distill.step import build_step, build_update
from dmm_jax.distillation import Distillation
from dmm_jax.runtime import sharding
from tests import worlds

ONE_STYLE = jnp.array([0, 1])  # The first style, and how many.
ONE_DEVICE = sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def run(tiny):
    """A run of two teachers on one device that starts from the base."""
    config = tiny[1].copy_and_resolve_references()
    config.student_init = "base"
    return Distillation(config, mesh=ONE_DEVICE)


@pytest.fixture(scope="module")
def arguments(run):
    """What the gradients are computed from: trained parameters, teachers, frozen networks, a batch, the step."""
    return run.unpack(run.init()).trained, run.teachers, run.frozen, next(run.batches()), jnp.int32(3)


@pytest.fixture(scope="module")
def gradients(run, arguments):
    return jax.jit(run.gradients(arguments[0]))  # Compiled once, by the first test that calls it.


def test_micro_batches_do_not_change_the_gradient(run, arguments, gradients):
    expected, errors = gradients(*arguments)
    config = run.config.copy_and_resolve_references()
    config.gradient_accumulation = 2
    in_two = Distillation(config, mesh=ONE_DEVICE)
    summed, errors_in_two = jax.jit(in_two.gradients(arguments[0]))(*arguments)
    assert worlds.differing(expected, summed) < 1e-5
    assert worlds.differing(errors, errors_in_two) < 1e-5


def test_a_student_equal_to_its_teacher_has_no_error_and_no_gradient(arguments, gradients):
    trained, frozen_teachers, frozen, batch, step = arguments
    unet = {name: leaf for name, leaf in trained["student"].items() if name not in ("model_embedding", "add_embedding")}
    unets = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], 2, 0), unet)
    same = frozen_teachers._replace(unet=unets, encoder=jnp.array([-1, -1]))
    grads, errors = gradients(trained, same, frozen, batch, step)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(errors)) < 1e-9
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads)) < 1e-4


def test_teachers_together_equal_each_teacher_alone(arguments, gradients):
    """A vmap over convolutions, divided by the partitioner, broke this law."""
    trained, frozen_teachers, frozen, batch, step = arguments
    _, together = gradients(*arguments)
    stacked = frozen_teachers._replace(unet=jax.jit(teachers.stacked)(frozen_teachers.unet))
    for row in range(2):
        alone = jax.tree.map(lambda leaf, row=row: leaf[jnp.array([row, row])], stacked)
        alone = alone._replace(batch_row=jnp.arange(2))
        _, errors = gradients(trained, alone, frozen, batch, step)
        assert np.allclose(errors["score"][row], together["score"][row], rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_noticed_in_any_network(bad):
    trained = {"student": {"a": jnp.ones(3), "b": jnp.ones((2, 2))}, "discriminator": {"c": jnp.ones(2)}}
    assert all_finite(trained)
    assert not all_finite(trained | {"student": {"a": jnp.ones(3), "b": jnp.ones((2, 2)).at[1, 0].set(bad)}})
    assert not all_finite(trained | {"discriminator": {"c": jnp.array([1, bad])}})


def test_random_numbers_follow_from_seed_step_and_sample(run, arguments):
    batch = jax.tree.map(lambda leaf: leaf[0], arguments[3])
    key, styles = jax.random.key(1), jnp.array([3, 5])
    everything = draw_inputs(run.objective, key, jnp.arange(4), styles, batch)
    part = draw_inputs(run.objective, key, jnp.arange(2, 4), styles, jax.tree.map(lambda leaf: leaf[2:], batch))
    for name in ("noise", "timesteps", "input_ids", "style_ids"):
        assert np.array_equal(getattr(everything, name)[2:], getattr(part, name))
    assert len(set(everything.timesteps.tolist())) > 1


def drawn_timesteps(run, batch, **changes):
    """Returns the timesteps of 500 samples, as shares of all timesteps."""
    objective = dataclasses.replace(run.objective, **changes)
    batch = jax.tree.map(lambda leaf: jnp.repeat(leaf[0][:1], 500, 0), batch)
    timesteps = draw_inputs(objective, jax.random.key(2), jnp.arange(500), ONE_STYLE, batch).timesteps
    return np.asarray(timesteps) / len(objective.alphas_cumprod)


def test_a_power_of_two_prefers_low_noise(run, arguments):
    shares = drawn_timesteps(run, arguments[3], timestep_power=2.0)
    assert shares.mean() == pytest.approx(1 / 3, abs=0.04) and shares.max() < 1
    assert (shares < 0.25).mean() == pytest.approx(0.5, abs=0.06)


def test_spread_timesteps_cover_every_part_of_a_batch_evenly(run, arguments):
    shares = drawn_timesteps(run, arguments[3], timestep_draw="spread")
    for first in (0, 100, 377):
        gaps = np.diff(np.sort(shares[first : first + 30]), prepend=0, append=1)
        assert gaps.max() < 2.7 / 30  # Of 30 independent samples, the largest gap is about 4 / 30.
    assert len(set(drawn_timesteps(run, arguments[3], timestep_draw="spread", timestep_power=2.0).tolist())) > 100


def drawn_ids(objective, input_ids):
    """Returns the token ids of a batch after prompts were dropped."""
    batch = Batch(jnp.zeros((len(input_ids), 1, 1, 4)), input_ids, jnp.zeros((len(input_ids), 6)))
    return np.asarray(draw_inputs(objective, jax.random.key(0), jnp.arange(len(input_ids)), ONE_STYLE, batch).input_ids)


def test_prompts_are_dropped_at_the_rate_of_the_config(run, arguments):
    input_ids = drawn_ids(run.objective, jnp.repeat(arguments[3].input_ids[0][:1], 2000, 0))
    empty = np.all(input_ids == np.asarray(run.objective.empty_ids), axis=1)
    assert empty.mean() == pytest.approx(run.objective.prompt_dropout, abs=0.02)


def test_dropped_prompts_become_each_empty_row_equally_often(run):
    objective = dataclasses.replace(run.objective, empty_ids=((7, 7), (-1, -1)), prompt_dropout=0.4)
    input_ids = drawn_ids(objective, jnp.full((4000, 2), 3))
    assert {tuple(row) for row in input_ids.tolist()} == {(3, 3), (7, 7), (-1, -1)}
    assert [(input_ids[:, 0] == token).mean() for token in (7, -1)] == pytest.approx([0.2, 0.2], abs=0.02)


def test_a_teacher_shares_text_encoders_equal_to_the_base(run):
    checkpoints = [row.teacher for row in run.rows]
    rows, owners = teachers.encoder_rows(run.base, checkpoints, 1)
    assert rows == [-1, 0]  # The first teacher has no encoder of its own; the second's differs.
    assert [owner.name for owner in owners] == ["right"]


class Encoded(Checkpoint):
    """A checkpoint that knows the digest of its text encoders, and nothing else."""

    def __init__(self, digest):
        object.__setattr__(self, "digest", digest)

    def text_digest(self, base=None):
        return self.digest


@pytest.mark.parametrize(
    "digests, shards, num_rows",
    [("xbxybbbx", 1, 2), ("xbxybbbx", 2, 2), ("xbxybbbx", 4, 2), ("xbxybbbx", 8, 1), ("bbbb", 2, 0), ("xyzw", 4, 1)],
)
def test_a_shard_holds_each_text_encoder_of_its_teachers_once(digests, shards, num_rows):
    rows, owners = teachers.encoder_rows(Encoded("b"), [Encoded(digest) for digest in digests], shards)
    assert len(owners) == shards * num_rows
    for number, (digest, row) in enumerate(zip(digests, rows, strict=True)):
        first = number * shards // len(digests) * num_rows
        assert digest == ("b" if row == -1 else owners[first:][:num_rows][row].digest)


def test_a_teacher_without_text_encoders_is_named(run):
    named = {row.name: row.teacher for row in run.rows}
    assert teachers.missing_text_encoders(run.base, named) == [
        "Teacher 'left' has no text_encoder: it uses the base's."
    ]


def toy_steps(grad_at, numbers):
    """Runs updates of one vector with gradient `grad_at(number)` times it; returns the states and the metrics."""
    config = options.get_config()
    config.learning_rate, config.warmup_steps = 0.1, 2
    optimizers = make_optimizers(config)
    state = init_state({"student": {"w": jnp.arange(3.0)}}, optimizers, ONE_DEVICE, keeps_average=True)

    def gradients(trained, teachers, frozen, batch, step):
        errors = {"score": jnp.ones(2), "feature": jnp.where(batch == 7, jnp.inf, jnp.ones(2))}
        return {"student": {"w": trained["student"]["w"] * grad_at(batch)}}, errors

    norms = clipping.build_norm(ONE_DEVICE, {"student": {"w": sharding.COPY}})
    step = jax.jit(build_step(gradients, build_update(norms, optimizers, optax.constant_schedule(0.5))))
    states, logged = [], []
    for number in numbers:
        state, metrics = step(state, None, None, jnp.float32(number))
        states.append(state)
        logged.append(metrics)
    return states, logged


@pytest.mark.parametrize("max_norm", [3.0, 3000.0])  # Below and above the gradient's norm.
def test_the_norm_and_the_clip_equal_those_of_optax(max_norm):
    rng, shapes = np.random.default_rng(0), {"a": (), "b": (700,), "c": (30, 40), "d": (3, 3, 20, 5), "e": (5,)}
    grads = {
        "student": {name: jnp.asarray(50 * rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    }
    specs = jax.tree.map(lambda leaf: sharding.COPY, grads)
    norm = jax.jit(clipping.build_norm(ONE_DEVICE, specs))(grads)["student"]
    assert 3 < norm < 3000 and float(norm) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-6)

    clip, reference = clipping.clip_by_norm(max_norm), optax.clip_by_global_norm(max_norm)
    state = reference.init(grads)
    assert clip.init(grads) == state  # Checkpoints hold the same state.
    (clipped, _), (expected, _) = clip.update(grads, state, norm=norm), reference.update(grads, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), clipped, expected)


@pytest.mark.parametrize("bad", [4.0, 7.0])  # A gradient, or a loss alone, that is not finite.
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(bad):
    def grad_at(number):
        return jnp.where(number == 4.0, jnp.nan, number)

    states, logged = toy_steps(grad_at, [1.0, bad, bad, 2.0, bad, 3.0])
    expected, _ = toy_steps(grad_at, [1.0, 2.0, 3.0])
    for name in ("student", "ema"):
        pairs = zip(*(jax.tree.leaves(getattr(it[-1], name)) for it in (states, expected)), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
    assert [int(state.step) for state in states] == [1, 2, 3, 4, 5, 6]
    assert [int(metrics["skipped_steps"]) for metrics in logged] == [0, 1, 2, 2, 3, 3]
    assert [int(metrics["skipped_in_a_row"]) for metrics in logged] == [0, 1, 2, 0, 1, 0]


def test_the_average_equals_its_closed_form():
    states, _ = toy_steps(lambda number: number, [1.0, 2.0, 3.0])
    values = [jnp.arange(3.0), *(state.student.params["w"] for state in states)]
    expected = sum(weight * value for weight, value in zip([0.125, 0.125, 0.25, 0.5], values, strict=True))
    np.testing.assert_allclose(states[-1].ema["w"], expected, rtol=1e-6)
    assert np.abs(expected - values[-1]).max() > 1e-3


def test_a_state_survives_its_form_in_checkpoints():
    (state, *_), _ = toy_steps(lambda number: number, [1.0])
    back = type(state).from_dict(state.as_dict())
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert state.as_dict().keys() == {"params", "opt_state", "ema", "step", "skipped_steps", "skipped_in_a_row"}
