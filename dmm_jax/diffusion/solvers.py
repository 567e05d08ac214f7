"""Solvers of the sampling equation, all as one linear recurrence whose coefficients are tables.

Every solver here is linear in what it knows: the state x, the clean latents x0 that the network's output stands for, one
remembered array m, and fresh noise. One evaluation of the network is

    x0 = p x + q network(x / scale),    x' = a x + b x0 + c m + d noise,    m' = e x + f x0

so a solver is seven columns of numbers, made in float64 beforehand, and all of them share one compiled program. Steps,
spacings and rounding are those of diffusers' schedulers of the same name; the last step always lands on x0.
"""

import dataclasses
import difflib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from dmm_jax.diffusion.schedule import NoiseSchedule

BASES = ("ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m")
SOLVERS = tuple(name + suffix for name in BASES for suffix in ("", "_karras"))
KARRAS_RHO = 7.0
COLUMNS = ("timesteps", "input_scale", "p", "q", "a", "b", "c", "d", "e", "f")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """The tables of one solver on one schedule; a row per evaluation of the network. See the module's docstring."""

    timesteps: Float[Array, " S"]
    input_scale: Float[Array, " S"]
    p: Float[Array, " S"]
    q: Float[Array, " S"]
    a: Float[Array, " S"]
    b: Float[Array, " S"]
    c: Float[Array, " S"]
    d: Float[Array, " S"]
    e: Float[Array, " S"]
    f: Float[Array, " S"]
    init_noise_sigma: Float[Array, ""]
    stochastic: bool = dataclasses.field(metadata={"static": True})


def plan(solver: str, schedule: NoiseSchedule, num_inference_steps: int) -> SamplingPlan:
    """Makes the tables of `num_inference_steps` steps.

    Args:
      solver: ddim (arXiv:2010.02502), euler and heun (arXiv:2206.00364, alg. 1), euler_ancestral, dpmpp_2m
        (arXiv:2211.01095, alg. 2); with "_karras" on the noise levels of arXiv:2206.00364, eq. 5.

    Raises:
      ValueError: a solver that does not exist (the nearest is named), or a number of steps out of range.
    """
    if solver not in SOLVERS:
        near = difflib.get_close_matches(solver, SOLVERS, 1, 0.0)[0]
        raise ValueError(f"there is no solver {solver!r}; did you mean {near!r}? There are: {', '.join(SOLVERS)}.")
    if not 1 <= num_inference_steps <= schedule.num_train_timesteps:
        raise ValueError(f"num_inference_steps must lie in 1 to {schedule.num_train_timesteps}; got {num_inference_steps}.")
    base, karras = solver.removesuffix("_karras"), solver.endswith("_karras")
    if base == "ddim" and not karras:
        table = _ddim(schedule, num_inference_steps)
    elif base in ("ddim", "dpmpp_2m"):
        table = _dpmpp(schedule, num_inference_steps, karras, order=1 if base == "ddim" else 2)
    else:
        table = _euler_family(base, schedule, num_inference_steps, karras)
    columns = {name: np.asarray(table[name], np.float32) for name in COLUMNS}
    scale = np.float32(table["init_noise_sigma"])
    return SamplingPlan(**columns, init_noise_sigma=scale, stochastic=base == "euler_ancestral")


def sample(
    plan: SamplingPlan,
    denoise: Callable[[Array, Array], Array],
    noise: Float[Array, "B h w C"],
    keys: PRNGKeyArray | None = None,
) -> Float[Array, "B h w C"]:
    """Runs a solver from unit noise to clean latents; one `lax.scan`, one iteration an evaluation.

    Args:
      denoise: maps (latents scaled as the network expects them, timestep ()) to the network's prediction.
      noise: unit normal.
      keys: one PRNG key per image, for the stochastic solvers; an image's noise does not depend on its batch.

    Raises:
      ValueError: a stochastic solver without keys.
    """
    if plan.stochastic and keys is None:
        raise ValueError("euler_ancestral draws noise at every step: give one key per image.")

    def evaluate(carry, row):
        latents, memory = carry
        number, row = row
        prediction = denoise(latents * row["input_scale"], row["timesteps"])
        x0 = row["p"] * latents + row["q"] * prediction
        new = row["a"] * latents + row["b"] * x0 + row["c"] * memory
        if plan.stochastic:
            fresh = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), noise.shape[1:]))(keys)
            new = new + row["d"] * fresh
        return (new, row["e"] * latents + row["f"] * x0), None

    rows = {name: jnp.asarray(getattr(plan, name)) for name in COLUMNS}
    start = noise.astype(jnp.float32) * plan.init_noise_sigma
    (latents, _), _ = jax.lax.scan(evaluate, (start, jnp.zeros_like(start)), (jnp.arange(len(plan.timesteps)), rows))
    return latents


def _spaced(spacing: str, schedule: NoiseSchedule, num_steps: int) -> np.ndarray:
    """Returns descending timesteps (arXiv:2305.08891, table 2)."""
    n = schedule.num_train_timesteps
    if spacing == "linspace":
        return np.linspace(0, n - 1, num_steps)[::-1]
    if spacing == "leading":
        return np.arange(num_steps)[::-1] * (n // num_steps) + float(schedule.steps_offset)
    return np.round(np.arange(n, 0, -n / num_steps)) - 1.0


def _karras(low: float, high: float, num_steps: int) -> np.ndarray:
    ramp = np.linspace(0.0, 1.0, num_steps)
    return (high ** (1 / KARRAS_RHO) + ramp * (low ** (1 / KARRAS_RHO) - high ** (1 / KARRAS_RHO))) ** KARRAS_RHO


def _timesteps_of(sigmas: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Returns the fractional timesteps at noise levels, linear in the logarithm of sigma."""
    return np.interp(np.log(sigmas), np.log(table), np.arange(len(table)))


def _x0_columns(sigmas, prediction_type, state_scale):
    """Returns p and q for a state of `state_scale` times (clean + sigma noise)."""
    signal = 1.0 / np.sqrt(sigmas**2 + 1.0)
    if prediction_type == "epsilon":
        return 1.0 / state_scale, -sigmas
    return signal**2 / state_scale, -sigmas * signal


def _ddim(schedule, num_steps):
    spacing = schedule.timestep_spacing or "leading"
    timesteps = np.round(_spaced(spacing, schedule, num_steps)).astype(int)
    previous = timesteps - schedule.num_train_timesteps // num_steps
    table = schedule.alphas_cumprod.astype(np.float64)
    last = 1.0 if schedule.set_alpha_to_one else table[0]
    now, then = table[timesteps], np.where(previous >= 0, table[np.maximum(previous, 0)], last)
    if schedule.prediction_type == "epsilon":
        p, q = now**-0.5, -np.sqrt((1.0 - now) / now)
    else:
        p, q = np.sqrt(now), -np.sqrt(1.0 - now)
    a = np.sqrt((1.0 - then) / (1.0 - now))
    zeros = np.zeros(num_steps)
    return dict(
        timesteps=timesteps, input_scale=zeros + 1.0, p=p, q=q, a=a, b=np.sqrt(then) - a * np.sqrt(now), c=zeros, d=zeros,
        e=zeros, f=zeros, init_noise_sigma=1.0,
    )  # fmt: skip


def _dpmpp(schedule, num_steps, karras, order):
    table = schedule.sigmas
    if karras:
        sigmas = _karras(table[0], table[-1], num_steps)
        timesteps = _timesteps_of(sigmas, table)
        if schedule.beta_schedule != "squaredcos_cap_v2":
            timesteps = np.round(timesteps)
        timesteps = np.floor(timesteps)
    else:
        timesteps = _dpmpp_timesteps(schedule, num_steps)
        sigmas = np.interp(timesteps, np.arange(len(table)), table)
    signal = 1.0 / np.sqrt(sigmas**2 + 1.0)
    spread = sigmas * signal
    p, q = _x0_columns(sigmas, schedule.prediction_type, signal)
    # lambda = -log sigma; the last step goes to sigma 0, that is to x0, by first order.
    step = np.append(np.diff(-np.log(sigmas)), np.inf)
    a = np.append(spread[1:], 0.0) / spread
    k = np.append(signal[1:], 1.0) * -np.expm1(-step)
    second = np.zeros(num_steps)
    if order == 2:
        second[1:-1] = 0.5 * step[1:-1] / step[:-2]  # 1 / (2 r), r = the step before over this one.
    zeros = np.zeros(num_steps)
    return dict(
        timesteps=timesteps, input_scale=zeros + 1.0, p=p, q=q, a=a, b=k * (1.0 + second), c=-k * second, d=zeros, e=zeros,
        f=zeros + 1.0, init_noise_sigma=1.0,
    )  # fmt: skip


def _dpmpp_timesteps(schedule, num_steps):
    n = schedule.num_train_timesteps
    spacing = schedule.timestep_spacing or "linspace"
    if spacing == "linspace":
        return np.round(np.linspace(0, n - 1, num_steps + 1))[::-1][:-1]
    if spacing == "leading":
        return np.arange(num_steps + 1)[::-1][:-1] * (n // (num_steps + 1)) + float(schedule.steps_offset)
    return _spaced(spacing, schedule, num_steps)


def _euler_family(base, schedule, num_steps, karras):
    spacing, table = schedule.timestep_spacing or "linspace", schedule.sigmas
    timesteps = _spaced(spacing, schedule, num_steps)
    sigmas = np.interp(timesteps, np.arange(len(table)), table)
    if karras:
        sigmas = _karras(sigmas[-1], sigmas[0], num_steps)
        timesteps = _timesteps_of(sigmas, table)
    first = sigmas[0]
    init = first if spacing in ("linspace", "trailing") else np.sqrt(first**2 + 1.0)
    update = {"euler": _euler, "euler_ancestral": _euler_ancestral, "heun": _heun}[base]
    rows, columns = update(sigmas, np.append(sigmas[1:], 0.0))
    sigmas = sigmas[rows]
    p, q = _x0_columns(sigmas, schedule.prediction_type, np.ones(len(sigmas)))
    scale = 1.0 / np.sqrt(sigmas**2 + 1.0)
    zeros = {name: np.zeros(len(rows)) for name in "cdef"}
    return dict(timesteps=timesteps[rows], input_scale=scale, p=p, q=q, init_noise_sigma=init) | zeros | columns


def _euler(now, then):
    ratio = then / now
    return np.arange(len(now)), {"a": ratio, "b": 1.0 - ratio}


def _euler_ancestral(now, then):
    up = np.sqrt(then**2 * (now**2 - then**2) / now**2)
    ratio = np.sqrt(then**2 - up**2) / now
    return np.arange(len(now)), {"a": ratio, "b": 1.0 - ratio, "d": up}


def _heun(now, then):
    """Evaluates at `now`, then at `then`, and averages the slopes; to sigma 0 it is Euler's step."""
    steps = len(now)
    rows = np.concatenate([np.repeat(np.arange(steps), 2)[1:]])  # 0, 1, 1, 2, 2, ...: where each evaluation stands.
    first = np.arange(0, 2 * steps - 1, 2)
    second = np.arange(1, 2 * steps - 1, 2)
    columns = {name: np.zeros(2 * steps - 1) for name in "abcef"}
    slope = (then - now) / now
    columns["a"][first], columns["b"][first] = 1.0 + slope, -slope
    columns["e"][first], columns["f"][first] = 1.0 + 0.5 * slope, -0.5 * slope
    half = 0.5 * (then - now)[:-1] / then[:-1]
    columns["a"][second], columns["b"][second], columns["c"][second] = half, -half, 1.0
    return rows, columns
