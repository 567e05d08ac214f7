"""Laws of the solvers: diffusers' schedulers step by step, a closed-form ODE, and the tables."""

import dataclasses
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax.diffusion import solvers
from dmm_jax.diffusion.schedule import NoiseSchedule

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD15 = BETAS | {
    "_class_name": "PNDMScheduler", "steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True,
    "clip_sample": False, "prediction_type": "epsilon",
}  # fmt: skip
SDXL = BETAS | {
    "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "steps_offset": 1,
    "prediction_type": "epsilon", "use_karras_sigmas": False, "interpolation_type": "linear", "clip_sample": False,
    "set_alpha_to_one": False, "skip_prk_steps": True, "sample_max_value": 1.0,
}  # fmt: skip
ZERO_SNR = BETAS | {
    "_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "steps_offset": 1, "set_alpha_to_one": False,
    "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "clip_sample": False,
}  # fmt: skip
CONFIGS = {
    "sd15": SD15,
    "sdxl": SDXL,
    "zero_snr": ZERO_SNR,
    "v": SD15 | {"prediction_type": "v_prediction", "timestep_spacing": "linspace"},
    "linear_trailing": SD15 | {"beta_schedule": "linear", "timestep_spacing": "trailing", "set_alpha_to_one": True},
    "cosine": SD15 | {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "leading"},
}
SHAPE = (2, 4, 4, 4)
# Solvers compared here in float32; test_solver_tables.py compares all others in float64.
CLASSIC = [
    name + suffix for name in ("ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m") for suffix in ("", "_karras")
]
KEYS = jax.vmap(jax.random.key)(jnp.arange(2, dtype=jnp.uint32))


def toy(latents, timestep, xp):
    """Stands for a network: bounded, not linear, mixes channels, depends on the timestep."""
    mixed = xp.roll(latents, 1, -1)
    return 0.8 * latents + 0.3 * xp.sin(2.0 * mixed + timestep / 300.0) + 0.1 * xp.cos(timestep / 50.0)


def unit_noise():
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def schedule_of(config):
    return NoiseSchedule.from_config(CONFIGS[config])


INPUTS = []


@jax.jit
def run_toy(plan, noise):
    """Samples with the toy network, and appends its inputs to INPUTS."""

    def denoise(latents, timestep):
        jax.debug.callback(lambda x: INPUTS.append(np.array(x)), latents, ordered=True)
        return toy(latents, timestep, jnp)

    return solvers.sample(plan, denoise, noise, KEYS if plan.stochastic else None)


def trajectory(plan):
    """Returns the network's input at every evaluation, and the result."""
    INPUTS.clear()
    result = np.asarray(run_toy(plan, jnp.asarray(unit_noise())))
    jax.effects_barrier()
    return [*INPUTS, result]


def inject_noise(monkeypatch):
    """Makes diffusers' ancestral scheduler draw our noise, from the first step on."""
    import torch
    from diffusers.schedulers import scheduling_euler_ancestral_discrete as ancestral

    numbers = itertools.count()

    def noise_of_step(*_, dtype, **__):
        return torch.from_numpy(np.array(solvers.step_noise(KEYS, next(numbers), SHAPE[1:]))).to(dtype)

    monkeypatch.setattr(ancestral, "randn_tensor", noise_of_step)


def diffusers_scheduler(solver, config, num_steps):
    """Makes the scheduler of a user of diffusers; for ddim_karras, euler_ancestral_karras and heun, a substitute."""
    import diffusers

    config = dict(CONFIGS[config])
    base, karras = solver.removesuffix("_karras"), solver.endswith("_karras")
    if base == "ddim" and not karras:
        scheduler = diffusers.DDIMScheduler.from_config(config)
    elif base in ("ddim", "dpmpp_2m"):  # DDIM on Karras levels: DPM-Solver++ of first order.
        order = 1 if base == "ddim" else 2
        make = diffusers.DPMSolverMultistepScheduler.from_config
        scheduler = make(config, use_karras_sigmas=karras, solver_order=order, algorithm_type="dpmsolver++")
    elif base == "euler":
        scheduler = diffusers.EulerDiscreteScheduler.from_config(config, use_karras_sigmas=karras)
    elif base == "heun":  # Its own table ignores zero terminal SNR.
        scheduler = diffusers.HeunDiscreteScheduler.from_config(config, use_karras_sigmas=karras)
        scheduler.alphas_cumprod = diffusers.EulerDiscreteScheduler.from_config(config).alphas_cumprod
    else:
        scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(num_steps)
    if solver == "euler_ancestral_karras":  # As in k-diffusion: Euler's levels.
        euler = diffusers.EulerDiscreteScheduler.from_config(config, use_karras_sigmas=True)
        euler.set_timesteps(num_steps)
        scheduler.sigmas, scheduler.timesteps = euler.sigmas, euler.timesteps
    if hasattr(scheduler, "set_begin_index"):  # Else it begins one level late if the first timestep comes twice.
        scheduler.set_begin_index(0)
    return scheduler


def diffusers_trajectory(scheduler, timesteps, dtype):
    """Runs a scheduler on the toy network at our timesteps; another test compares the scheduler's own."""
    import torch

    latents = torch.from_numpy(unit_noise()).to(dtype) * scheduler.init_noise_sigma
    inputs = []
    for own_timestep, timestep in zip(scheduler.timesteps, timesteps, strict=True):
        scaled = scheduler.scale_model_input(latents, own_timestep)
        inputs.append(scaled.numpy())
        latents = scheduler.step(toy(scaled, torch.tensor(timestep), torch), own_timestep, latents).prev_sample
    return [*inputs, latents.numpy()]


def largest_distance(steps, expected):
    """Returns the largest distance of any step, relative to the step's largest latent."""
    return np.max([np.abs(a - b).max() / np.abs(b).max() for a, b in zip(steps, expected, strict=True)])


@pytest.mark.usefixtures("diffusers_in_double")
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("solver", CLASSIC)
def test_every_step_is_that_of_diffusers(solver, config, monkeypatch):
    import torch

    # Reached: 5.6e-6; Heun, which subtracts slopes, 1.3e-5 from a sigma of 4096.
    tolerance = 2e-5 if solver.startswith("heun") and config == "zero_snr" else 1e-5
    for num_steps in (1, 2, 5, 10, 25):
        inject_noise(monkeypatch)
        plan = solvers.plan(solver, schedule_of(config), num_steps)
        scheduler = diffusers_scheduler(solver, config, num_steps)
        if scheduler.timesteps[0] < 500:  # diffusers starts a single step of some spacings at the lowest noise.
            continue
        expected = diffusers_trajectory(scheduler, plan.timesteps, torch.float64)
        assert largest_distance(trajectory(plan), expected) < tolerance, num_steps


@pytest.mark.parametrize("config", ["sd15", "sdxl", "v", "zero_snr"])
@pytest.mark.parametrize("solver", CLASSIC)
def test_25_steps_are_those_of_untouched_diffusers(solver, config, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    if solver.startswith("heun") and config == "zero_snr":
        pytest.skip("diffusers' Heun ignores zero terminal SNR")
    inject_noise(monkeypatch)
    plan = solvers.plan(solver, schedule_of(config), 25)
    expected = diffusers_trajectory(diffusers_scheduler(solver, config, 25), plan.timesteps, torch.float32)
    assert largest_distance(trajectory(plan), expected) < 1e-5  # Reached: 5.1e-6.


def assert_same_timesteps(solver, config, tolerance):
    for num_steps in (1, 2, 3, 5, 7, 10, 16, 25, 48, 50):
        plan = solvers.plan(solver, schedule_of(config), num_steps)
        scheduler = diffusers_scheduler(solver, config, num_steps)
        if scheduler.timesteps[0] < 500:  # diffusers starts a single step of some spacings at the lowest noise.
            continue
        assert plan.timesteps.dtype == np.float32
        np.testing.assert_allclose(plan.timesteps, scheduler.timesteps.numpy(), rtol=0, atol=tolerance)
        assert plan.init_noise_sigma == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-6)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("solver", ["ddim", "ddim_karras", "dpmpp_2m", "dpmpp_2m_karras"])
def test_whole_timesteps_are_those_of_untouched_diffusers(solver, config):
    pytest.importorskip("diffusers")
    truncated = config == "cosine" and solver.endswith("_karras")  # diffusers makes 998 of 998.99999.
    assert_same_timesteps(solver, config, tolerance=1 if truncated else 0)


@pytest.mark.usefixtures("diffusers_in_double")  # In float32 their logarithms lose 5e-3 of a timestep.
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("solver", [name for name in CLASSIC if name.startswith(("euler", "heun"))])
def test_fractional_timesteps_and_first_levels_are_those_of_diffusers(solver, config):
    assert_same_timesteps(solver, config, tolerance=1e-4)


KARRAS_25 = [
    999, 970, 938, 905, 868, 829, 786, 739, 687, 630, 568, 500, 427, 352, 278, 207, 146, 96, 59, 34, 18, 9, 4, 1, 0,
]  # fmt: skip
TRAILING_25 = [999 - 40 * step for step in range(25)]
LEADING = {"timestep_spacing": "leading"}
TRAILING = {"timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    "solver, config, expected",
    [
        ("ddim", SD15, [961 - 40 * step for step in range(25)]),
        ("ddim", SD15 | TRAILING, TRAILING_25),
        ("euler", SD15 | TRAILING, TRAILING_25),
        ("dpmpp_2m", SD15, [*range(999, 500, -40), *range(480, 0, -40)]),
        ("dpmpp_2m", SD15 | LEADING, [951 - 38 * step for step in range(25)]),
        ("dpmpp_2m_karras", SD15, KARRAS_25),
        ("dpmpp_2m_karras", SDXL, KARRAS_25),
        ("euler", SD15, [999 - 41.625 * step for step in range(25)]),
        ("euler", SDXL, [961 - 40 * step for step in range(25)]),
    ],
)
def test_25_steps_visit_the_published_timesteps(solver, config, expected):
    plan = solvers.plan(solver, NoiseSchedule.from_config(config), 25)
    np.testing.assert_array_equal(plan.timesteps, np.asarray(expected, np.float32))


@pytest.mark.parametrize(
    "solver, config, init, sigmas",
    [
        ("dpmpp_2m", SD15, 1.0, {0: 14.6146, 1: 11.5428, -1: 0.19906}),
        ("dpmpp_2m_karras", SD15, 1.0, {0: 14.6146, 1: 12.2830, -1: 0.0291675}),
        ("dpmpp_2m", SD15 | LEADING, 1.0, {0: 11.0283, -1: 0.196303}),
        ("euler", SD15, 14.6146, {0: 14.6146, -1: 0.0291675}),
        ("euler", SDXL, 11.71879, {0: 11.67605, -1: 0.0413145}),
        ("euler_karras", SD15, 14.6146, {0: 14.6146, -1: 0.0291675}),
    ],
)
def test_25_steps_pass_the_published_noise_levels(solver, config, init, sigmas):
    plan = solvers.plan(solver, NoiseSchedule.from_config(config), 25)
    np.testing.assert_allclose(plan.init_noise_sigma, init, rtol=3e-5)
    np.testing.assert_allclose(sigmas_of(plan)[list(sigmas)], list(sigmas.values()), rtol=3e-5)


def test_euler_on_karras_levels_keeps_the_fractions_of_timesteps():
    timesteps = solvers.plan("euler_karras", schedule_of("sd15"), 25).timesteps
    np.testing.assert_allclose(timesteps[[0, 1, 2, -2, -1]], [999, 969.761, 938.449, 1.2795, 0], rtol=0, atol=5e-3)


def sigmas_of(plan):
    """Returns the noise level of each evaluation of a plan for epsilon prediction: x0 = x - sigma epsilon."""
    return -plan.c_out


def with_sigmas_as_timesteps(plan):
    """Returns the plan whose "timesteps" are noise levels, for networks in closed form."""
    return dataclasses.replace(plan, timesteps=sigmas_of(plan))


@pytest.mark.parametrize(
    "solver, order",
    [("ddim", 1), ("ddim_karras", 1), ("euler_karras", 1), ("heun_karras", 2), ("dpmpp_2m_karras", 2)],
)
def test_error_falls_at_the_solvers_order(solver, order):
    # Gaussian data of standard deviation c: D(x; sigma) = x c^2 / (c^2 + sigma^2), and the ODE has a closed form.
    c = 0.5

    def epsilon(latents, sigma):
        return latents * jnp.sqrt(sigma**2 + 1.0) * sigma / (c**2 + sigma**2)

    def error(num_steps):
        """Returns the relative error at the last level: the step from it to 0 is of first order and never shortens."""
        plan = with_sigmas_as_timesteps(solvers.plan(solver, NoiseSchedule(), num_steps))
        first, last = sigmas_of(plan)[[0, -1]].astype(np.float64)
        exact = plan.init_noise_sigma * np.sqrt((c**2 + last**2) / (c**2 + first**2))
        if plan.init_noise_sigma == 1.0:  # Latents are x0 + sigma noise, scaled to the variance of the noise.
            exact *= np.sqrt((first**2 + 1.0) / (last**2 + 1.0))
        plan = jax.tree.map(lambda column: column[:-1] if column.ndim else column, plan)
        return abs(float(solvers.sample(plan, epsilon, jnp.ones((1, 1, 1, 1)))[0, 0, 0, 0]) / exact - 1.0)

    assert error(40) / error(80) == pytest.approx(2**order, rel=0.1)


IMAGE = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)


@jax.jit
def run_informed(plan, noise):
    def epsilon(latents, sigma):
        return (latents * jnp.sqrt(sigma**2 + 1.0) - IMAGE) / sigma

    return solvers.sample(plan, epsilon, noise, KEYS)


@pytest.mark.parametrize("solver", [*CLASSIC, "dpmpp_2m_sde", "dpmpp_sde_karras", "unipc_beta"])
def test_a_perfect_network_leads_every_solver_to_the_image(solver):
    for num_steps in (1, 2, 7):
        plan = with_sigmas_as_timesteps(solvers.plan(solver, NoiseSchedule(), num_steps))
        result = run_informed(plan, jnp.asarray(unit_noise()))
        np.testing.assert_allclose(result, IMAGE, rtol=0, atol=5e-6)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_no_coefficient_is_infinite(solver):
    for config, num_steps in itertools.product(CONFIGS, (1, 2, 3, 50 if solver == "lcm" else 499)):
        plan = solvers.plan(solver, schedule_of(config), num_steps)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(plan))
        doubled = solver.startswith(("heun", "dpmpp_sde"))
        assert len(plan.timesteps) == (2 * num_steps - 1 if doubled else num_steps)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_a_single_step_does_not_start_at_low_noise(solver, config):
    assert solvers.plan(solver, schedule_of(config), 1).timesteps[0] > 499


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_no_solver_takes_an_unknown_prediction_type_for_another(solver):
    schedule = NoiseSchedule()
    object.__setattr__(schedule, "prediction_type", "sample")
    with pytest.raises(AssertionError, match="sample"):
        solvers.plan(solver, schedule, 5)


def test_solvers_of_one_kind_share_a_compilation():
    traces = []

    @jax.jit
    def run(plan, noise):
        traces.append(plan.stochastic)
        return solvers.sample(plan, lambda x, t: toy(x, t, jnp), noise, KEYS)

    for config in ("sd15", "zero_snr"):
        for solver in ("ddim", "ddim_karras", "euler", "euler_karras", "dpmpp_2m", "dpmpp_2m_karras"):
            run(solvers.plan(solver, schedule_of(config), 5), jnp.asarray(unit_noise()))
        run(solvers.plan("heun", schedule_of(config), 3), jnp.asarray(unit_noise()))  # Five evaluations as well.
        run(solvers.plan("euler_ancestral", schedule_of(config), 5), jnp.asarray(unit_noise()))
    assert traces == [False, True]


def test_plans_pass_through_tree_functions():
    plan = solvers.plan("heun", NoiseSchedule(), 3)
    shapes = jax.tree.map(jnp.shape, plan)
    assert shapes.timesteps == (5,) and shapes.init_noise_sigma == ()
    assert jax.eval_shape(lambda plan: plan, plan).c_in.shape == (5,)


def test_an_images_noise_does_not_depend_on_its_batch():
    plan, noise = solvers.plan("euler_ancestral", NoiseSchedule(), 5), jnp.asarray(unit_noise())
    together = solvers.sample(plan, lambda x, t: 0.8 * x, noise, KEYS)
    alone = solvers.sample(plan, lambda x, t: 0.8 * x, noise[1:], KEYS[1:])
    np.testing.assert_allclose(together[1:], alone, rtol=0, atol=1e-6)
    equal_starts = jnp.stack([noise[0], noise[0]])
    first, second = solvers.sample(plan, lambda x, t: 0.8 * x, equal_starts, KEYS)
    assert not np.allclose(first, second, atol=1e-2)  # Each image draws its own noise.


def test_fresh_noise_is_unit_and_independent():
    start = jax.vmap(lambda key: jax.random.normal(key, (16, 16, 4)))(KEYS)
    rows = jnp.concatenate([start, *(solvers.step_noise(KEYS, number, (16, 16, 4)) for number in range(3))])
    covariance = np.cov(np.asarray(rows).reshape(len(rows), -1))
    np.testing.assert_allclose(covariance, np.eye(len(rows)), rtol=0, atol=0.2)


def test_bfloat16_predictions_leave_the_latents_float32():
    plan = solvers.plan("dpmpp_2m", NoiseSchedule(), 3)
    noise = jnp.asarray(unit_noise())
    assert solvers.sample(plan, lambda x, t: x.astype(jnp.bfloat16), noise).dtype == jnp.float32


@pytest.mark.parametrize(
    "wrong, meant",
    [("dpmpp3m", "dpmpp_2m"), ("dpm++_2m_caras", "dpmpp_2m_karras"), ("Eular", "euler"), ("DDIMM", "ddim")],
)
def test_unknown_solvers_name_the_nearest(wrong, meant):
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        solvers.plan(wrong, NoiseSchedule(), 5)


@pytest.mark.parametrize("other", ["DPM2 a", "LMS", "PLMS", "Restart"])
def test_solvers_without_a_similar_name_get_the_list_alone(other):
    with pytest.raises(ValueError, match="no solver") as error:
        solvers.canonical(other)
    text = str(error.value)
    assert "did you mean" not in text and "dpmpp_2m (DPM++ 2M)" in text and "_karras (Karras)" in text


@pytest.mark.parametrize(
    "name, solver",
    [
        ("Euler a", "euler_ancestral"),
        ("DPM++ 2M SDE Karras", "dpmpp_2m_sde_karras"),
        ("dpm++ 2m", "dpmpp_2m"),
        ("UniPC Automatic", "unipc"),
        ("Heun SGM Uniform", "heun_sgm_uniform"),
        ("DPM++ SDE Align Your Steps", "dpmpp_sde_ays"),
    ],
)
def test_a1111s_names_are_accepted(name, solver):
    assert solvers.canonical(name) == solver == solvers.canonical(solvers.a1111_name(solver))


@pytest.mark.parametrize(
    "solver, schedule, num_steps, message",
    [
        ("euler", NoiseSchedule(), 0, "1 to 1000; got 0"),
        ("euler", NoiseSchedule(), 1001, "1 to 1000; got 1001"),
        ("ddim", NoiseSchedule(steps_offset=1), 1000, "begin at timestep 1000"),
        ("dpmpp_2m", NoiseSchedule(), 1000, "take fewer steps"),
        ("ddim", NoiseSchedule(rescale_betas_zero_snr=True, timestep_spacing="trailing"), 5, "must predict v"),
        ("ddim", NoiseSchedule(clip_sample=True), 5, "clip_sample"),
        ("heun_karras", NoiseSchedule(clip_sample=True), 5, "clip_sample"),
        ("lcm", NoiseSchedule(), 51, "1 to 50 steps; got 51"),
    ],
)
def test_unfit_schedules_and_steps_are_refused(solver, schedule, num_steps, message):
    with pytest.raises(ValueError, match=message):
        solvers.plan(solver, schedule, num_steps)


def test_a_stochastic_solver_without_keys_is_refused():
    with pytest.raises(ValueError, match="keys"):
        solvers.sample(solvers.plan("euler_ancestral", NoiseSchedule(), 2), lambda x, t: x, jnp.zeros(SHAPE))


SCHEDULERS = {
    "euler": "EulerDiscreteScheduler", "heun": "HeunDiscreteScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler", "euler_ancestral": "EulerAncestralDiscreteScheduler", "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}  # fmt: skip


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("solver", SCHEDULERS)
def test_the_spacing_of_a_config_is_followed_where_diffusers_does(solver, spacing):
    scheduler = getattr(pytest.importorskip("diffusers"), SCHEDULERS[solver])
    followed = f"use_{spacing}_sigmas" in inspect.signature(scheduler.__init__).parameters
    plan = solvers.plan(solver, NoiseSchedule(**{f"use_{spacing}_sigmas": True}), 7)
    expected = solvers.plan(f"{solver}_{spacing}" if followed else solver, NoiseSchedule(), 7)
    assert jax.tree.all(jax.tree.map(np.array_equal, plan, expected))
