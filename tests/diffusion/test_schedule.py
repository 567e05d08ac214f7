"""Noise schedules: known constants, diffusers' tables, and what survives of a scheduler_config.json."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax.diffusion.schedule import BETA_SCHEDULES, NoiseSchedule, add_noise

PNDM = {  # Stable Diffusion 1.5's scheduler_config.json.
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip


def test_stable_diffusions_table_has_the_known_constants():
    table = NoiseSchedule.from_config(PNDM).alphas_cumprod
    assert table.dtype == np.float32 and table.shape == (1000,)
    np.testing.assert_allclose(table[[0, 1, 999]], [0.99914998, 0.9982960, 0.00466010], rtol=1e-6)
    np.testing.assert_allclose(NoiseSchedule().sigmas[[0, -1]], [0.02916753, 14.6146469], rtol=2e-5)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_tables_are_those_of_diffusers(beta_schedule, rescale):
    diffusers = pytest.importorskip("diffusers")
    config = dict(beta_schedule=beta_schedule, beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=rescale)
    ours, theirs = NoiseSchedule(**config).alphas_cumprod, diffusers.DDIMScheduler(**config).alphas_cumprod
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("diffusers_in_double")
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_float64_tables_are_those_of_diffusers_in_float64(beta_schedule, rescale):
    import diffusers

    config = dict(beta_schedule=beta_schedule, beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=rescale)
    schedule, theirs = NoiseSchedule(**config), diffusers.EulerDiscreteScheduler(**config)
    np.testing.assert_allclose(schedule.sigmas, theirs.sigmas.numpy()[-2::-1].astype(np.float64), rtol=1e-9)
    np.testing.assert_allclose(schedule.alpha_bars, diffusers.DDIMScheduler(**config).alphas_cumprod.numpy(), rtol=1e-9)


def test_zero_terminal_snr_leaves_nothing_at_the_end_and_the_first_level_as_it_was():
    rescaled, plain = NoiseSchedule(rescale_betas_zero_snr=True), NoiseSchedule()
    assert rescaled.alphas_cumprod[-1] == 0.0 and rescaled.sigmas[-1] == pytest.approx(4096.0, rel=1e-6)
    assert rescaled.alphas_cumprod[0] == pytest.approx(plain.alphas_cumprod[0], rel=1e-6)
    assert np.all(np.diff(rescaled.alphas_cumprod) < 0.0)


def test_add_noise_is_diffusers():
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    random, timesteps = np.random.default_rng(0), np.asarray([0, 1, 500, 999])
    latents, noise = random.standard_normal((2, 4, 2, 2, 4)).astype(np.float32)
    expected = diffusers.DDPMScheduler.from_config(PNDM).add_noise(*map(torch.tensor, (latents, noise, timesteps)))
    table = jnp.asarray(NoiseSchedule.from_config(PNDM).alphas_cumprod)
    noisy = add_noise(jnp.asarray(latents), jnp.asarray(noise), jnp.asarray(timesteps), table)
    np.testing.assert_allclose(noisy, expected.numpy(), rtol=0, atol=2e-6)


def test_add_noise_keeps_the_variance_and_leaves_nothing_at_zero_snr():
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
def test_what_a_scheduler_only_defaulted_to_is_not_handed_on(saved_by):
    # diffusers' own rule: the file counts, not the class that read it; else DPM-Solver++ would run PNDM's "leading".
    diffusers = pytest.importorskip("diffusers")
    config = {key: value for key, value in PNDM.items() if key != "_class_name"}
    theirs = getattr(diffusers, saved_by).from_config(config)
    for solver in ("DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "DDIMScheduler"):
        expected = getattr(diffusers, solver).from_config(theirs.config).config.timestep_spacing
        ours = NoiseSchedule.from_config(theirs.config).timestep_spacing
        assert (ours or {"DDIMScheduler": "leading"}.get(solver, "linspace")) == expected
    written = json.loads(theirs.to_json_string())
    assert NoiseSchedule.from_config(written).timestep_spacing == written["timestep_spacing"]


def test_silent_files_mean_diffusers_defaults():
    diffusers = pytest.importorskip("diffusers")
    theirs, ours = diffusers.DDIMScheduler().config, NoiseSchedule.from_config({})
    for field in dataclasses.fields(NoiseSchedule):
        if field.name not in ("source", "timestep_spacing", "clip_sample"):
            assert getattr(ours, field.name) == theirs[field.name], field.name


def test_a_config_is_written_back_as_it_was_read():
    config = PNDM | {"a_field_of_tomorrow": 3}
    assert NoiseSchedule.from_config(config).to_config() == config


def test_what_was_replaced_is_written_and_read_again():
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
def test_stock_diffusers_opens_what_is_written(schedule):
    diffusers = pytest.importorskip("diffusers")
    config = json.loads(json.dumps(schedule.to_config()))
    theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=0, atol=1e-6)
    assert theirs.config.prediction_type == schedule.prediction_type
    assert theirs.config.timestep_spacing == (schedule.timestep_spacing or "leading")
    assert NoiseSchedule.from_config(config) == schedule


@pytest.mark.parametrize(
    "fields, said",
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
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler does not diffuse"),
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler does not diffuse"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields, said):
    with pytest.raises(ValueError, match=said):
        NoiseSchedule.from_config(PNDM | fields)


def test_schedules_are_constants():
    assert hash(NoiseSchedule.from_config(PNDM)) == hash(NoiseSchedule.from_config(dict(PNDM)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        NoiseSchedule().steps_offset = 1
