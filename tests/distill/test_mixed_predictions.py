"""Teachers that predict noise and teachers that predict velocity, in one merge."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax.checkpoints.compare import check_mergeable
from dmm_jax.checkpoints.inspect import inspect
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.diffusion.prediction import converted, velocity
from dmm_jax.diffusion.schedule import NoiseSchedule, add_noise
from dmm_jax.distill import objective as module
from dmm_jax.distill.teachers import Teachers
from dmm_jax.distillation import Distillation
from dmm_jax.evaluation.compared_models import ComparedModels
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime import sharding
from dmm_jax.runtime.errors import UserError
from dmm_jax.world.architecture import SCHEDULER_CONFIG

ONE_DEVICE = sharding.make_mesh(devices=jax.devices()[:1])
ALPHAS = NoiseSchedule.from_config(SCHEDULER_CONFIG).alphas_cumprod


def predicting(path, copy, prediction_type, **fields):
    """Copies a diffusers folder and changes its scheduler."""
    shutil.copytree(path, copy)
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": prediction_type, **fields}))
    return copy


@pytest.fixture(scope="module")
def mixed(tiny, tmp_path_factory):
    """A config whose teacher `left` predicts noise and whose teacher `right` predicts velocity."""
    folder = tmp_path_factory.mktemp("mixed")
    config = tiny[1].copy_and_resolve_references()
    right = predicting(tiny[0]["right"], folder / "right", "v_prediction")
    config.teachers = (("left", str(tiny[0]["left"])), ("right", str(right)))
    return config


def test_noise_and_velocity_convert_into_one_another_at_every_timestep():
    rng = np.random.default_rng(0)
    latents, noise = (jnp.asarray(rng.standard_normal((1000, 2, 2, 4)), jnp.float32) for _ in range(2))
    timesteps, alphas = jnp.arange(1000), jnp.asarray(ALPHAS, jnp.float32)
    noisy, alpha_bar = add_noise(latents, noise, timesteps, alphas), alphas[timesteps]
    v = velocity(latents, noise, alpha_bar)
    assert jnp.abs(converted(v, noisy, alpha_bar, "epsilon") - noise).max() < 1e-5
    assert jnp.abs(converted(noise, noisy, alpha_bar, "v_prediction") - v).max() < 1e-4  # 1 / signal is up to 15.


def test_velocity_gives_the_noise_even_without_any_signal():
    noise = jnp.ones((1, 2, 2, 4))
    assert (converted(jnp.zeros_like(noise), noise, jnp.zeros(1), "epsilon") == noise).all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_teacher_in_the_other_type_in_closed_form_gives_the_same_losses(tiny, monkeypatch, prediction_type):
    config = tiny[1].copy_and_resolve_references()
    config.feature_loss_weight = 0.0
    run = Distillation(config, mesh=ONE_DEVICE)
    trained, batch = run.unpack(run.init()).trained, next(run.batches())
    inputs = jax.vmap(lambda *row: module.draw_inputs(run.objective, jax.random.key(0), *row))(
        jnp.arange(8).reshape(2, 4), run.teachers.styles, batch
    )
    objective = dataclasses.replace(run.objective, prediction_type=prediction_type)
    predict = module.predict_teachers

    def errors(teachers):
        compute = jax.jit(module.sample_errors, static_argnums=(0, 1))
        return compute(run.networks, objective, trained, teachers, run.frozen, inputs)["score"]

    def in_closed_form(networks, objective, teachers, inputs, noisy, text):
        """Returns the prediction in the other type for the second teacher, and as it is for the first."""
        output = predict(networks, objective, teachers, inputs, noisy, text)
        alpha_bar = jnp.asarray(objective.alphas_cumprod)[inputs.timesteps[1]]
        other = {"epsilon": "v_prediction", "v_prediction": "epsilon"}[prediction_type]
        changed = converted(output.sample[1], noisy[1], alpha_bar, other)
        return output._replace(sample=output.sample.at[1].set(changed))

    expected = errors(run.teachers)
    monkeypatch.setattr(module, "predict_teachers", in_closed_form)
    jax.clear_caches()
    both = errors(run.teachers._replace(is_converted=jnp.array([False, True])))
    assert np.allclose(both, expected, rtol=2e-4) and (both[0] == expected[0]).all()
    without = errors(run.teachers)
    assert not np.allclose(without[1], expected[1], rtol=0.1)


def test_equal_predictions_leave_the_step_as_it_is(tiny):
    teachers = Distillation(tiny[1], mesh=ONE_DEVICE).teachers
    assert teachers.is_converted is None
    others = Teachers(*teachers[:5])
    assert jax.tree.structure(teachers) == jax.tree.structure(others)


def test_a_mixed_run_trains_and_its_student_states_what_it_predicts(mixed, tmp_path):
    for name, starts_from in (("epsilon", "left"), ("v_prediction", "right")):
        config = mixed.copy_and_resolve_references()
        config.student_prediction = name
        run = Distillation(config, mesh=ONE_DEVICE)
        assert run.teachers.is_converted.tolist() == [name != "epsilon", name == "epsilon"]
        assert any(f"predictions are converted to {name}" in line for line in run.notes)
        state = run.init()
        start = open_checkpoint(dict(config.teachers)[starts_from]).params("unet")["conv_in"]["bias"]
        assert np.array_equal(run.unpack(state).student.params["conv_in"]["bias"], start)
        state, metrics = run.step(state, next(run.batches()))
        own, other = (np.asarray(metrics["score"])[row] for row in np.argsort(run.teachers.is_converted))
        # It starts as the teacher of its own type, except for that teacher's text encoder.
        assert own < other / 10 and np.isfinite(other)
        assert metrics["feature"][np.argmax(run.teachers.is_converted)] == 0
        assert run.pipeline(state).schedule.prediction_type == name
        run.save(tmp_path / name, state)
        assert open_checkpoint(tmp_path / name).prediction_type == name
        assert Pipeline.from_pretrained(tmp_path / name).schedule.prediction_type == name
        models = ComparedModels(config, tmp_path / name)
        schedules = [
            pipe.schedule for pipe in (models.base, models.teacher("left"), models.teacher("right"), models.student)
        ]
        types = ["epsilon", "epsilon", "v_prediction", name]
        assert [schedule.prediction_type for schedule in schedules] == types


def test_conversion_is_refused_at_zero_terminal_snr(tiny, tmp_path):
    zero = {"rescale_betas_zero_snr": True, "_class_name": "DDIMScheduler"}
    config = tiny[1].copy_and_resolve_references()
    config.base = str(predicting(tiny[0]["base"], tmp_path / "base", "v_prediction", **zero))
    teacher = predicting(tiny[0]["right"], tmp_path / "right", "epsilon", **zero)
    config.teachers, config.batch_size = (("right", str(teacher)),), 4
    for prediction_type in ("", "v_prediction"):
        config.student_prediction = prediction_type
        with pytest.raises(UserError, match="right: noise and velocity do not convert"):
            Distillation(config, mesh=ONE_DEVICE)


def test_only_distillation_merges_both_types(mixed, tiny):
    base, right = (open_checkpoint(path) for path in (mixed.base, dict(mixed.teachers)["right"]))
    check_mergeable(base, {"right": right}, by_distillation=True)
    with pytest.raises(ValueError, match="their weights have different meanings"):
        check_mergeable(base, {"right": right})
    assert inspect([mixed.base, dict(mixed.teachers)["right"]])["mergeable"]
