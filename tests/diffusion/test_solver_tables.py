"""Solvers and spacings in float64 against diffusers, step by step; orders of convergence and moments of noise."""

import importlib
import itertools
import sys
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax.diffusion import solvers, spacing
from dmm_jax.diffusion.schedule import NoiseSchedule
from dmm_jax.diffusion.solver_tables import columns
from tests.diffusion.conftest import InDouble
from tests.diffusion.test_solvers import (
    CONFIGS,
    KEYS,
    SHAPE,
    diffusers_trajectory,
    largest_distance,
    schedule_of,
    toy,
    unit_noise,
)

TOLERANCE = 1e-6
NEW = ("dpmpp_2m_sde", "dpmpp_2m_sde_karras", "dpmpp_sde", "dpmpp_sde_karras", "unipc", "unipc_karras", "lcm")
NAMED = tuple(name for name in spacing.SPACINGS if name)


def noise_of_step(number):
    return np.random.default_rng([7, number]).standard_normal(SHAPE)


def run(table, denoise=lambda latents, timestep: toy(latents, timestep, np), start=None):
    """Runs the recurrence of `solvers` in NumPy; returns the network's inputs and the result."""
    count = len(table["timesteps"])
    table = {name: np.zeros(count) for name in (*solvers.COLUMNS, *solvers.Previous._fields)} | table
    latents = (unit_noise().astype(np.float64) if start is None else start) * table["init_noise_sigma"]
    memory = previous = np.zeros_like(latents)
    inputs = []
    for k in range(count):
        row = {name: column[k] for name, column in table.items() if np.ndim(column)}
        inputs.append(latents * row["c_in"])
        x0 = row["c_skip"] * latents + row["c_out"] * denoise(inputs[-1], row["timesteps"])
        stored = row["store_latents"] * latents + row["store_x0"] * x0
        stored += row["store_memory"] * memory + row["store_previous"] * previous
        latents = row["keep"] * latents + row["pull"] * x0 + row["recall"] * memory
        latents += row["recall_previous"] * previous + row["fresh"] * noise_of_step(k)
        memory, previous = stored, x0
    return [*inputs, latents]


def brownian():
    """Returns a noise sampler of DPM++ SDE: increments of one Brownian motion in sigma, as k-diffusion's tree draws."""
    steps = itertools.count()

    def sampler(sigma, sigma_next):
        import torch

        number = next(steps)
        noise = noise_of_step(number)
        if number % 2:  # The whole step; the evaluation before it drew the part to the middle.
            high, low = float(sigma), float(sigma_next)
            middle = (high * low) ** 0.5
            first, second = (part / (high - low) for part in (high - middle, middle - low))
            noise = first**0.5 * noise_of_step(number - 1) + second**0.5 * noise
        return torch.from_numpy(noise)

    return sampler


def diffusers_scheduler(solver, config, num_steps, monkeypatch):
    """Makes the scheduler that a user of diffusers would, in float64, with our noise."""
    import diffusers
    import torch

    numbers = itertools.count()

    def next_noise(*_, **__):
        return torch.from_numpy(noise_of_step(next(numbers)))

    base, levels = solvers.SOLVERS[solver]
    options = {f"use_{levels}_sigmas": True} if levels else {}
    config, files = dict(CONFIGS[config]), "diffusers.schedulers.scheduling_"
    if base == "dpmpp_sde":
        with mock.patch.dict(sys.modules, {"torchsde": mock.MagicMock()}):
            sde = importlib.import_module(files + "dpmsolver_sde")
        for name in ("torch", "np"):
            monkeypatch.setattr(sde, name, InDouble(getattr(sde, name)))
        scheduler = sde.DPMSolverSDEScheduler.from_config(config, **options)
        scheduler.alphas_cumprod = diffusers.EulerDiscreteScheduler.from_config(config).alphas_cumprod
        scheduler.set_timesteps(num_steps)
        scheduler.noise_sampler = brownian()
        return scheduler
    if base == "unipc":
        scheduler = diffusers.UniPCMultistepScheduler.from_config(config, **options)
    elif base == "lcm":
        scheduler = diffusers.LCMScheduler.from_config(config)
        monkeypatch.setattr(importlib.import_module(files + "lcm"), "randn_tensor", next_noise)
    else:
        kinds = {"algorithm_type": "sde-dpmsolver++" if base.endswith("_sde") else "dpmsolver++", **options}
        scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config, **kinds)
        monkeypatch.setattr(importlib.import_module(files + "dpmsolver_multistep"), "randn_tensor", next_noise)
    scheduler.set_timesteps(num_steps)
    scheduler.set_begin_index(0)
    return scheduler


@pytest.mark.usefixtures("diffusers_in_double")
@pytest.mark.parametrize("config", ["sd15", "sdxl", "v"])
@pytest.mark.parametrize("solver", NEW)
def test_every_step_is_that_of_diffusers(solver, config, monkeypatch):
    import torch

    for num_steps in (1, 2, 3, 10, 25):
        table = columns(*solvers.SOLVERS[solver], schedule_of(config), num_steps)
        scheduler = diffusers_scheduler(solver, config, num_steps, monkeypatch)
        if scheduler.timesteps[0] < 500:  # diffusers starts a single step of some spacings at the lowest noise.
            continue
        expected = diffusers_trajectory(scheduler, table["timesteps"], torch.float64)
        assert largest_distance(run(table), expected) < TOLERANCE, num_steps


@pytest.mark.usefixtures("diffusers_in_double")
@pytest.mark.parametrize("levels", ["exponential", "beta"])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc"])
def test_levels_of_named_spacings_are_those_of_diffusers(solver, levels, monkeypatch):
    import torch

    for num_steps in (1, 2, 10, 25):
        table = columns(solver, levels, schedule_of("sd15"), num_steps)
        scheduler = diffusers_scheduler(f"{solver}_{levels}", "sd15", num_steps, monkeypatch)
        np.testing.assert_array_equal(table["timesteps"], scheduler.timesteps.numpy())
        expected = diffusers_trajectory(scheduler, table["timesteps"], torch.float64)
        assert largest_distance(run(table), expected) < TOLERANCE


@pytest.mark.usefixtures("diffusers_in_double")
@pytest.mark.parametrize("levels", ["karras", "exponential", "beta"])
def test_fractional_levels_are_those_of_diffusers(levels):
    diffusers = pytest.importorskip("diffusers")
    for config, num_steps in itertools.product(("sd15", "sdxl"), (2, 10, 25)):
        timesteps, sigmas = spacing.fractional_levels(levels, schedule_of(config), num_steps)
        scheduler = diffusers.EulerDiscreteScheduler.from_config(CONFIGS[config], **{f"use_{levels}_sigmas": True})
        scheduler.set_timesteps(num_steps)
        np.testing.assert_allclose(sigmas, scheduler.sigmas.numpy()[:-1], rtol=TOLERANCE)
        np.testing.assert_allclose(timesteps, scheduler.timesteps.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("levels, name", [("ays", "StableDiffusion"), ("ays_xl", "StableDiffusionXL")])
def test_align_your_steps_has_the_published_levels(levels, name):
    published = pytest.importorskip("diffusers.schedulers.scheduling_utils").AysSchedules
    timesteps, sigmas = spacing.fractional_levels(levels, NoiseSchedule(), 10)
    np.testing.assert_allclose(sigmas, published[f"{name}Sigmas"][:-1], rtol=TOLERANCE)
    np.testing.assert_allclose(timesteps, published[f"{name}Timesteps"], rtol=0, atol=1.5)
    twenty = spacing.fractional_levels(levels, NoiseSchedule(), 20)[1]
    np.testing.assert_allclose(twenty[::2], sigmas, rtol=1e-12)


def test_sgm_uniform_divides_the_timesteps_equally():
    timesteps, _ = spacing.fractional_levels("sgm_uniform", schedule_of("sd15"), 25)
    np.testing.assert_allclose(timesteps, 999.0 * (1.0 - np.arange(25) / 25), rtol=0, atol=1e-9)


@pytest.mark.parametrize("levels", NAMED)
def test_levels_fall_and_stay_on_the_table(levels):
    for num_steps in (1, 2, 999):
        for make in (spacing.fractional_levels, spacing.whole_levels):
            timesteps, sigmas = make(levels, schedule_of("sdxl"), num_steps)
            assert len(sigmas) == num_steps and (np.diff(sigmas) < 0.0).all() and (np.diff(timesteps) <= 0.0).all()
            assert 0.0 <= timesteps[-1] <= timesteps[0] <= 999.0 and np.isfinite(sigmas).all()


def gaussian_error(solver, num_steps, c=0.5):
    """Returns the relative error of latents at the last level, for Gaussian data of standard deviation c."""
    table = columns(*solvers.SOLVERS[solver], NoiseSchedule(), num_steps)
    sigmas = -table["c_out"]
    table |= {"timesteps": sigmas}
    scaled = (sigmas[[0, -1]] ** 2 + c**2) / (sigmas[[0, -1]] ** 2 + 1.0)
    table = {name: column[:-1] if np.ndim(column) else column for name, column in table.items()}
    result = run(table, lambda x, s: x * np.sqrt(s**2 + 1.0) * s / (c**2 + s**2), np.ones(SHAPE))[-1]
    return abs(result.flat[0] / np.sqrt(scaled[1] / scaled[0]) - 1.0)


def test_unipcs_error_falls_at_order_3():
    """The corrector makes a predictor of order 2 one of order 3 (arXiv:2302.04867, theorem 3.1)."""
    assert gaussian_error("unipc_karras", 40) / gaussian_error("unipc_karras", 80) == pytest.approx(8.0, rel=0.1)


@pytest.mark.parametrize("solver", ["dpmpp_2m_sde_karras", "dpmpp_sde_karras"])
def test_stochastic_solvers_keep_the_variance_of_the_data(solver):
    """Gaussian data of standard deviation 0.5: the variance follows from the tables, without drawing."""
    table = columns(*solvers.SOLVERS[solver], NoiseSchedule(), 60)
    unscaled = table["init_noise_sigma"] != 1.0
    sigmas = -table["c_out"]
    gain = 0.25 / (0.25 + sigmas**2) * (1.0 if unscaled else np.sqrt(sigmas**2 + 1.0))
    state = np.zeros((2, len(sigmas) + 1))  # Latents and memory, as weights of the start and of every fresh noise.
    state[0, 0] = table["init_noise_sigma"]
    for k in range(len(sigmas)):
        row = {name: column[k] for name, column in table.items() if np.ndim(column)}
        x0 = gain[k] * state[0]
        stored = row.get("store_latents", 0.0) * state[0] + row["store_x0"] * x0
        state[0] = row["keep"] * state[0] + row["pull"] * x0 + row["recall"] * state[1]
        state[0, k + 1] += row["fresh"]
        state[1] = stored
    assert np.sqrt((state[0] ** 2).sum()) == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("solver", ["dpmpp_2m_sde", "dpmpp_sde_karras", "unipc_karras", "lcm"])
def test_sampling_is_the_recurrence_of_the_tables(solver, monkeypatch):
    noises = jnp.asarray(np.stack([noise_of_step(k) for k in range(9)]), jnp.float32)
    monkeypatch.setattr(solvers, "step_noise", lambda keys, number, shape: noises[number])
    plan = solvers.plan(solver, schedule_of("sd15"), 5)
    result = np.asarray(solvers.sample(plan, lambda x, t: toy(x, t, jnp), jnp.asarray(unit_noise()), KEYS))
    expected = run(columns(*solvers.SOLVERS[solver], schedule_of("sd15"), 5))[-1]
    assert np.abs(result - expected).max() < 1e-5 * np.abs(expected).max()
