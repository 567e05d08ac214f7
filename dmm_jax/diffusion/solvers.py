"""Solvers of the sampling equation, all as one linear recurrence whose coefficients are tables.

Every solver here is linear in the latents x, the clean latents x0 that the network's output F implies, one array m of
memory, and fresh noise n. One evaluation of the network (c_... as in arXiv:2206.00364, eq. 7) is

    x0 = c_skip x + c_out F(c_in x)
    x' = keep x + pull x0 + recall m + fresh n
    m' = store_latents x + store_x0 x0

so a solver is a few columns of numbers, computed in float64 before sampling, and all solvers share a compiled program.
Timesteps, noise levels and their rounding are those of diffusers' schedulers of the same name. No coefficient is
infinite: the step to sigma 0 is x' = x0.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Shaped

from dmm_jax.diffusion.schedule import NoiseSchedule
from dmm_jax.runtime.errors import UserError, nearest

BASES = ("ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m")
SOLVERS = tuple(name + suffix for name in BASES for suffix in ("", "_karras"))
STOCHASTIC = ("euler_ancestral", "euler_ancestral_karras")
KARRAS_RHO = 7.0
Column = Any  # Float[Array, " num_evaluations"], except that tree functions put shapes or shardings here.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """The tables of one solver on one schedule: one row per evaluation, for the recurrence at the top of this file.

    A pytree: pass it to `jit` as an argument. Plans of equally many evaluations share a compilation, whatever the
    solver; stochastic solvers have a second one.
    """

    timesteps: Column  # The network's argument; fractional for the Euler family.
    c_in: Column
    c_skip: Column
    c_out: Column
    keep: Column
    pull: Column
    recall: Column
    fresh: Column
    store_latents: Column
    store_x0: Column
    init_noise_sigma: Any  # Float[Array, ""]. The first latents are this times unit noise.
    stochastic: bool = dataclasses.field(metadata={"static": True})


COLUMNS = tuple(
    field.name for field in dataclasses.fields(SamplingPlan) if field.name not in ("init_noise_sigma", "stochastic")
)


def plan(solver: str, schedule: NoiseSchedule, num_inference_steps: int) -> SamplingPlan:
    """Makes the tables of `num_inference_steps` steps: one evaluation per step; heun takes two, and one for the last.

    Args:
      solver: ddim (arXiv:2010.02502), euler and heun (arXiv:2206.00364, alg. 1), euler_ancestral, dpmpp_2m
        (arXiv:2211.01095, alg. 2); with "_karras" on the noise levels of arXiv:2206.00364, eq. 5.

    Raises:
      UserError: an unknown solver (the nearest is named), more steps than noise levels, or a schedule that the solver
        cannot run on.
    """
    if solver not in SOLVERS:
        near = nearest(solver.lower(), SOLVERS)
        raise UserError(f"there is no solver {solver!r}; did you mean {near!r}? There are: {', '.join(SOLVERS)}.")
    if not 1 <= num_inference_steps <= schedule.num_train_timesteps:
        raise UserError(f"num_inference_steps must be 1 to {schedule.num_train_timesteps}; got {num_inference_steps}.")
    base, karras = solver.removesuffix("_karras"), solver.endswith("_karras")
    if schedule.clip_sample and base in ("ddim", "heun"):
        raise UserError(f"clip_sample is true: {solver} would clip latents to [-1, 1]. Set it to false in the config.")
    if base == "ddim" and not karras:
        table = _ddim(schedule, num_inference_steps)
    elif base in ("ddim", "dpmpp_2m"):
        table = _dpmpp(schedule, num_inference_steps, karras, order=1 if base == "ddim" else 2)
    else:
        table = _euler_family(base, schedule, num_inference_steps, karras)
    zeros = np.zeros(len(table["timesteps"]))
    columns = {name: np.asarray(table.get(name, zeros), np.float32) for name in COLUMNS}
    scale = np.asarray(table["init_noise_sigma"], np.float32)
    return SamplingPlan(**columns, init_noise_sigma=scale, stochastic=solver in STOCHASTIC)


def sample(
    plan: SamplingPlan,
    predict: Callable[..., Array],
    noise: Float[Array, "B h w C"],
    keys: Key[Array, " B"] | None = None,
    *extra_inputs: Shaped[Array | np.ndarray, "S ..."],
) -> Float[Array, "B h w C"]:
    """Runs a solver from unit noise to clean latents: one `lax.scan`, one iteration per evaluation.

    Args:
      predict: maps (latents scaled as the network expects them, timestep (), one row of each extra input) to
        the network's prediction.
      noise: unit normal.
      keys: one PRNG key per image, for the stochastic solvers; an image's noise does not depend on its batch.
      extra_inputs: further arguments of `predict`, one row per evaluation.

    Raises:
      UserError: a stochastic solver without keys.
    """
    if plan.stochastic and keys is None:
        raise UserError(f"{STOCHASTIC[0]} draws noise at every step: give `keys`, one per image.")

    def evaluate(carry, numbered_row):
        latents, memory = carry
        number, row, others = numbered_row
        prediction = predict(latents * row["c_in"], row["timesteps"], *others)
        x0 = row["c_skip"] * latents + row["c_out"] * prediction
        stepped = row["keep"] * latents + row["pull"] * x0 + row["recall"] * memory
        if plan.stochastic:
            stepped += row["fresh"] * step_noise(keys, number, noise.shape[1:])
        return (stepped, row["store_latents"] * latents + row["store_x0"] * x0), None

    rows = {name: jnp.asarray(getattr(plan, name)) for name in COLUMNS}
    start = noise.astype(jnp.float32) * plan.init_noise_sigma
    evaluations = (jnp.arange(len(plan.timesteps)), rows, extra_inputs)
    (latents, _), _ = jax.lax.scan(evaluate, (start, jnp.zeros_like(start)), evaluations)
    return latents


def step_noise(
    keys: Key[Array, " B"], number: Int[Array, ""] | int, shape: tuple[int, int, int]
) -> Float[Array, "B h w C"]:
    """Draws the fresh unit noise of evaluation `number`, for each image from its own key."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), shape))(keys)


def _ddim(schedule, num_steps):
    """Returns the columns of DDIM, eta 0. Without sigma, which is infinite at zero terminal SNR: it can start there."""
    timesteps = np.round(_spaced(schedule.timestep_spacing or "leading", schedule, num_steps)).astype(int)
    alpha_bar = schedule.alpha_bars[timesteps]
    following = timesteps - schedule.num_train_timesteps // num_steps
    last = 1.0 if schedule.set_alpha_to_one else schedule.alpha_bars[0]
    next_alpha_bar = np.where(following >= 0, schedule.alpha_bars[np.maximum(following, 0)], last)
    if schedule.prediction_type == "v_prediction":
        c_skip, c_out = np.sqrt(alpha_bar), -np.sqrt(1.0 - alpha_bar)
    elif alpha_bar[0] > 0.0:
        c_skip, c_out = alpha_bar**-0.5, -np.sqrt((1.0 - alpha_bar) / alpha_bar)
    else:
        raise UserError(
            "at zero terminal SNR a predicted noise does not determine the image, so ddim cannot start there: the "
            "model must predict v (prediction_type v_prediction); or use another solver."
        )
    keep = np.sqrt((1.0 - next_alpha_bar) / (1.0 - alpha_bar))
    return dict(
        timesteps=timesteps, c_in=np.ones(num_steps), c_skip=c_skip, c_out=c_out, keep=keep,
        pull=np.sqrt(next_alpha_bar) - keep * np.sqrt(alpha_bar), init_noise_sigma=1.0,
    )  # fmt: skip


def _dpmpp(schedule, num_steps, karras, order):
    """Returns the columns of DPM-Solver++ (midpoint, first order at both ends); order 1 is DDIM on these noise levels.

    With signal = alpha and noise = alpha sigma, and the previous x0 as memory:

        x' = (next noise / noise) x + x0_weight ((1 + extrapolation) x0 - extrapolation previous x0)
    """
    timesteps, sigmas = _dpmpp_karras(schedule, num_steps) if karras else _dpmpp_spaced(schedule, num_steps)
    signal = 1.0 / np.sqrt(sigmas**2 + 1.0)
    noise_scale = sigmas * signal
    c_skip, c_out = _x0_columns(sigmas, schedule.prediction_type, state_scale=signal)
    # The signal-to-noise ratio is 1 / sigma^2, so its half logarithm is -log(sigma). The last step leads to sigma 0.
    half_log_snr_steps = np.append(-np.diff(np.log(sigmas)), np.inf)
    x0_weight = np.append(signal[1:], 1.0) * -np.expm1(-half_log_snr_steps)
    extrapolation = np.zeros(num_steps)
    if order == 2:
        extrapolation[1:-1] = 0.5 * half_log_snr_steps[1:-1] / half_log_snr_steps[:-2]
    return dict(
        timesteps=timesteps, c_in=np.ones(num_steps), c_skip=c_skip, c_out=c_out,
        keep=np.append(noise_scale[1:], 0.0) / noise_scale, pull=x0_weight * (1.0 + extrapolation),
        recall=-x0_weight * extrapolation, store_x0=np.ones(num_steps), init_noise_sigma=1.0,
    )  # fmt: skip


def _euler_family(base, schedule, num_steps, karras):
    """Returns the columns of the solvers whose latents are x0 + sigma noise, unscaled."""
    spacing, all_sigmas = schedule.timestep_spacing or "linspace", schedule.sigmas
    # Timesteps are rounded before their noise levels are looked up, so that both belong together for the network.
    timesteps = _spaced(spacing, schedule, num_steps).astype(np.float32)
    sigmas = np.interp(timesteps, np.arange(len(all_sigmas)), all_sigmas)
    if karras:
        sigmas = _karras(sigmas[-1], sigmas[0], num_steps)
        timesteps = _timesteps_of(sigmas, all_sigmas)
    # diffusers adds the variance of the image to the noise's with "leading" alone.
    init_noise_sigma = np.sqrt(sigmas[0] ** 2 + 1.0) if spacing == "leading" else sigmas[0]
    make = {"euler": _euler, "euler_ancestral": _euler_ancestral, "heun": _heun}[base]
    rows, columns = make(sigmas, np.append(sigmas[1:], 0.0))
    sigmas = sigmas[rows]
    c_skip, c_out = _x0_columns(sigmas, schedule.prediction_type, state_scale=1.0)
    c_in = 1.0 / np.sqrt(sigmas**2 + 1.0)
    named = dict(timesteps=timesteps[rows], c_in=c_in, c_skip=c_skip, c_out=c_out, init_noise_sigma=init_noise_sigma)
    return named | columns


def _euler(sigmas, next_sigmas):
    ratio = next_sigmas / sigmas
    return np.arange(len(sigmas)), {"keep": ratio, "pull": 1.0 - ratio}


def _euler_ancestral(sigmas, next_sigmas):
    """Steps down to next_sigma^2 / sigma, and adds fresh noise up to next_sigma."""
    down = (next_sigmas / sigmas) ** 2
    return np.arange(len(sigmas)), {"keep": down, "pull": 1.0 - down, "fresh": next_sigmas * np.sqrt(1.0 - down)}


def _heun(sigmas, next_sigmas):
    """Averages the slopes at both ends of a step; the step to sigma 0 is Euler's.

    With slope(x, sigma) = (x - x0) / sigma:

        predict: x' = x + (next - sigma) slope(x, sigma);      m = x + (next - sigma) / 2 slope(x, sigma)
        correct: x'' = m + (next - sigma) / 2 slope(x', next)
    """
    num_steps, ratio = len(sigmas), next_sigmas / sigmas
    rows = np.repeat(np.arange(num_steps), 2)[1:]  # 0, 1, 1, 2, 2, ...: the noise level of each evaluation.
    predict, correct = slice(0, None, 2), slice(1, None, 2)
    columns = {name: np.zeros(2 * num_steps - 1) for name in ("keep", "pull", "recall", "store_latents", "store_x0")}
    columns["keep"][predict], columns["pull"][predict] = ratio, 1.0 - ratio
    columns["store_latents"][predict], columns["store_x0"][predict] = 0.5 + 0.5 * ratio, 0.5 - 0.5 * ratio
    half_step = 0.5 * (next_sigmas - sigmas)[:-1] / next_sigmas[:-1]
    columns["keep"][correct], columns["pull"][correct], columns["recall"][correct] = half_step, -half_step, 1.0
    return rows, columns


def _x0_columns(sigmas, prediction_type, state_scale):
    """Returns c_skip and c_out for latents that are `state_scale` times (x0 + sigma noise)."""
    if prediction_type == "epsilon":
        return np.ones_like(sigmas) / state_scale, -sigmas
    assert prediction_type == "v_prediction", prediction_type  # `NoiseSchedule` knows these two alone.
    signal = 1.0 / np.sqrt(sigmas**2 + 1.0)
    return signal**2 / state_scale, -sigmas * signal


def _dpmpp_spaced(schedule, num_steps):
    """Spaces one step more than the solver takes and drops the last, except for "trailing"."""
    spacing, all_sigmas = schedule.timestep_spacing or "linspace", schedule.sigmas
    if spacing == "trailing":
        timesteps = _spaced(spacing, schedule, num_steps)
    else:
        timesteps = np.round(_spaced(spacing, schedule, num_steps + 1))[:-1]
    if np.any(np.diff(timesteps) >= 0.0):
        raise UserError(f"dpmpp_2m has no {num_steps} different timesteps on this schedule: take fewer steps.")
    return timesteps, np.interp(timesteps, np.arange(len(all_sigmas)), all_sigmas)


def _dpmpp_karras(schedule, num_steps):
    """Spans all noise levels whatever the spacing; the network gets whole timesteps, so they may repeat."""
    sigmas = _karras(schedule.sigmas[0], schedule.sigmas[-1], num_steps)
    timesteps = _timesteps_of(sigmas, schedule.sigmas)
    # diffusers rounds the timesteps of cosine schedules down. The 1e-6 makes 998.9999999, an error of rounding, 999.
    return np.floor(timesteps + 1e-6) if schedule.beta_schedule == "squaredcos_cap_v2" else np.round(timesteps), sigmas


def _spaced(spacing, schedule, num_steps):
    """Returns descending timesteps (arXiv:2305.08891, table 2)."""
    n = schedule.num_train_timesteps
    if spacing == "linspace":
        return np.linspace(0, n - 1, num_steps)[::-1]
    if spacing == "trailing":
        # `arange` rounds ties as diffusers does; its length is off by one for some numbers of steps.
        return np.round(np.arange(n, 0, -n / num_steps))[:num_steps] - 1.0
    timesteps = np.arange(num_steps)[::-1] * float(n // num_steps) + schedule.steps_offset
    if timesteps[0] > n - 1:
        raise UserError(
            f"{num_steps} steps of spacing leading with steps_offset {schedule.steps_offset} begin at timestep "
            f"{timesteps[0]:.0f}, past the last, {n - 1}: take fewer steps."
        )
    return timesteps


def _karras(low, high, num_steps):
    """Returns descending noise levels, evenly spaced in sigma^(1/7)."""
    low, high = low ** (1.0 / KARRAS_RHO), high ** (1.0 / KARRAS_RHO)
    return (high + np.linspace(0.0, 1.0, num_steps) * (low - high)) ** KARRAS_RHO


def _timesteps_of(sigmas, all_sigmas):
    """Returns the fractional timesteps of noise levels, linear in the logarithm of sigma."""
    return np.interp(np.log(sigmas), np.log(all_sigmas), np.arange(len(all_sigmas)))
