"""Laws of noise schedules: published constants, diffusers' tables, and round trips of scheduler_config.json."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax.diffusion.schedule import BETA_SCHEDULES, SPACING_FIELDS, NoiseSchedule, add_noise

PNDM = {  # Stable Diffusion 1.5's scheduler_config.json.
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip


def test_stable_diffusions_table_has_the_published_constants():
    table = NoiseSchedule.from_config(PNDM).alphas_cumprod
    assert table.dtype == np.float32 and table.shape == (1000,)
    np.testing.assert_allclose(table[[0, 1, 999]], [0.99914998, 0.9982960, 0.00466010], rtol=1e-6)
    np.testing.assert_allclose(NoiseSchedule().sigmas[[0, -1]], [0.02916753, 14.6146469], rtol=2e-5)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_tables_are_those_of_diffusers(beta_schedule, rescale):
    diffusers = pytest.importorskip("diffusers")
    config = dict(beta_schedule=beta_schedule, beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=rescale)
    expected = diffusers.DDIMScheduler(**config).alphas_cumprod.numpy()
    np.testing.assert_allclose(NoiseSchedule(**config).alphas_cumprod, expected, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("diffusers_in_double")
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_float64_tables_are_those_of_diffusers_in_float64(beta_schedule, rescale):
    import diffusers

    config = dict(beta_schedule=beta_schedule, beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=rescale)
    schedule, euler = NoiseSchedule(**config), diffusers.EulerDiscreteScheduler(**config)
    np.testing.assert_allclose(schedule.sigmas, euler.sigmas.numpy()[-2::-1].astype(np.float64), rtol=1e-9)
    np.testing.assert_allclose(schedule.alpha_bars, diffusers.DDIMScheduler(**config).alphas_cumprod.numpy(), rtol=1e-9)


def test_zero_terminal_snr_ends_without_signal():
    rescaled, plain = NoiseSchedule(rescale_betas_zero_snr=True), NoiseSchedule()
    assert rescaled.alphas_cumprod[-1] == 0.0 and rescaled.sigmas[-1] == pytest.approx(4096.0, rel=1e-6)
    assert rescaled.alphas_cumprod[0] == pytest.approx(plain.alphas_cumprod[0], rel=1e-6)
    assert np.all(np.diff(rescaled.alphas_cumprod) < 0.0)


def test_add_noise_is_that_of_diffusers():
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    random, timesteps = np.random.default_rng(0), np.asarray([0, 1, 500, 999])
    latents, noise = random.standard_normal((2, 4, 2, 2, 4)).astype(np.float32)
    expected = diffusers.DDPMScheduler.from_config(PNDM).add_noise(*map(torch.tensor, (latents, noise, timesteps)))
    table = jnp.asarray(NoiseSchedule.from_config(PNDM).alphas_cumprod)
    noisy = add_noise(jnp.asarray(latents), jnp.asarray(noise), jnp.asarray(timesteps), table)
    np.testing.assert_allclose(noisy, expected.numpy(), rtol=0, atol=2e-6)


def test_add_noise_keeps_the_variance_and_no_signal_at_zero_snr():
    latents, noise = np.random.default_rng(0).standard_normal((2, 2, 32, 32, 4)).astype(np.float32)
    schedule = NoiseSchedule(rescale_betas_zero_snr=True)
    noisy = add_noise(*map(jnp.asarray, (latents, noise, np.asarray([400, 999]), schedule.alphas_cumprod)))
    np.testing.assert_allclose(noisy.std(axis=(1, 2, 3)), 1.0, atol=0.05)
    np.testing.assert_array_equal(noisy[1], noise[1])


def test_bfloat16_latents_are_diffused_by_a_float32_table():
    latents = jnp.zeros((1, 1, 1, 4), jnp.bfloat16)
    table = jnp.asarray(NoiseSchedule().alphas_cumprod)
    noisy = add_noise(latents, jnp.ones_like(latents), jnp.asarray([1]), table)
    np.testing.assert_allclose(noisy, np.sqrt(1.0 - table[1]), rtol=1e-6)


@pytest.mark.parametrize("saved_by", ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "DDPMScheduler"])
def test_defaults_of_the_saving_scheduler_do_not_count(saved_by):
    # diffusers' rule: the file counts, not the class that read it; else DPM-Solver++ would run PNDM's "leading".
    diffusers = pytest.importorskip("diffusers")
    config = {key: value for key, value in PNDM.items() if key != "_class_name"}
    scheduler = getattr(diffusers, saved_by).from_config(config)
    for solver in ("DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "DDIMScheduler"):
        expected = getattr(diffusers, solver).from_config(scheduler.config).config.timestep_spacing
        spacing = NoiseSchedule.from_config(scheduler.config).timestep_spacing
        assert (spacing or {"DDIMScheduler": "leading"}.get(solver, "linspace")) == expected
    written = json.loads(scheduler.to_json_string())
    assert NoiseSchedule.from_config(written).timestep_spacing == written["timestep_spacing"]


def test_absent_fields_mean_diffusers_defaults():
    diffusers = pytest.importorskip("diffusers")
    defaults, schedule = diffusers.DDIMScheduler().config, NoiseSchedule.from_config({})
    for field in dataclasses.fields(NoiseSchedule):
        if field.name not in ("source", "timestep_spacing", "clip_sample", *SPACING_FIELDS):
            assert getattr(schedule, field.name) == defaults[field.name], field.name


def test_a_config_is_written_as_it_was_read():
    config = PNDM | {"a_field_of_tomorrow": 3}
    assert NoiseSchedule.from_config(config).to_config() == config


def test_replaced_fields_are_written_and_read_again():
    schedule = dataclasses.replace(NoiseSchedule.from_config(PNDM), prediction_type="v_prediction", steps_offset=0)
    assert schedule.to_config() == PNDM | {"prediction_type": "v_prediction", "steps_offset": 0}
    assert NoiseSchedule.from_config(schedule.to_config()) == schedule


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule(),
        NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        dataclasses.replace(NoiseSchedule.from_config(PNDM), rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    ],
)
def test_stock_diffusers_opens_written_configs(schedule):
    diffusers = pytest.importorskip("diffusers")
    config = json.loads(json.dumps(schedule.to_config()))
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    np.testing.assert_allclose(schedule.alphas_cumprod, scheduler.alphas_cumprod.numpy(), rtol=0, atol=1e-6)
    assert scheduler.config.prediction_type == schedule.prediction_type
    assert scheduler.config.timestep_spacing == (schedule.timestep_spacing or "leading")
    assert NoiseSchedule.from_config(config) == schedule


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"beta_schedule": "exp"}, "beta_schedule must be one of scaled_linear.*got 'exp'"),
        ({"prediction_type": "sample"}, "prediction_type must be one of epsilon, v_prediction; got 'sample'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing must be one of"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        (
            {"thresholding": True, "sigma_max": 80.0},
            "sigma_max=80.0, thresholding=True",
        ),
        ({"final_sigmas_type": "sigma_min"}, "final_sigmas_type='sigma_min'"),
        ({"beta_end": 0.0001}, "beta_start <= beta_end"),
        ({"beta_end": "0.02"}, "beta_start <= beta_end"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps must be a whole number; got '1000'"),
        ({"steps_offset": -1}, "steps_offset must be from 0"),
        ({"timestep_spacing": True}, "timestep_spacing must be one of"),
        ({"clip_sample": "false"}, "clip_sample must be true or false; got 'false'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler does not diffuse"),
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler does not diffuse"),
    ],
)
def test_unsupported_fields_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_config(PNDM | fields)


def test_schedules_are_hashable_constants():
    assert hash(NoiseSchedule.from_config(PNDM)) == hash(NoiseSchedule.from_config(dict(PNDM)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        NoiseSchedule().steps_offset = 1
