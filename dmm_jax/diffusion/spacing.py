"""Spacings of samplers: the timesteps and noise levels that a solver passes, on a schedule.

The plain spacing is a scheduler_config.json's (linspace, leading or trailing timesteps); a spacing with a name replaces
it. Timesteps, noise levels and their rounding are those of diffusers' schedulers.
"""

import numpy as np
from jaxtyping import Float
from scipy.special import betaincinv

from dmm_jax.diffusion.schedule import NoiseSchedule
from dmm_jax.runtime.errors import UserError

# {spacing: its name in AUTOMATIC1111's web UI}; "" is the schedule's own.
SPACINGS = {
    "": "",
    "karras": "Karras",  # arXiv:2206.00364, eq. 5.
    "exponential": "Exponential",
    "sgm_uniform": "SGM Uniform",
    "beta": "Beta",  # arXiv:2407.12173.
    "ays": "Align Your Steps",  # arXiv:2404.14507, for Stable Diffusion 1.
    "ays_xl": "Align Your Steps XL",
}
KARRAS_RHO = 7.0
BETA = 0.6  # Both parameters of the beta distribution.
# The published levels of ten steps; the last one only leads the interpolation to other numbers of steps.
ALIGN_YOUR_STEPS = {
    "ays": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays_xl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}
Column = Float[np.ndarray, " S"]
Table = Float[np.ndarray, " T"]  # The noise level of every timestep.


def fractional_levels(spacing: str, schedule: NoiseSchedule, num_steps: int) -> tuple[Column, Column]:
    """Returns timesteps, which may be fractions, and noise levels for the solvers of the Euler family."""
    table = schedule.sigmas
    # Timesteps are rounded before their noise levels are looked up, so that both belong together for the network.
    timesteps = spaced(schedule.timestep_spacing or "linspace", schedule, num_steps).astype(np.float32)
    sigmas = np.interp(timesteps, np.arange(len(table)), table)
    if not spacing:
        return timesteps, sigmas
    sigmas = named_levels(spacing, sigmas[-1], sigmas[0], num_steps, table)
    return timesteps_of(sigmas, table), sigmas


def whole_levels(spacing: str, schedule: NoiseSchedule, num_steps: int) -> tuple[Column, Column]:
    """Returns whole timesteps, which may repeat, and noise levels for DPM-Solver++ and its relatives.

    A named spacing spans the whole table, whatever the schedule's own spacing.
    """
    table = schedule.sigmas
    if not spacing:
        timesteps = _whole_timesteps(schedule, num_steps)
        return timesteps, np.interp(timesteps, np.arange(len(table)), table)
    sigmas = named_levels(spacing, table[0], table[-1], num_steps, table)
    timesteps = timesteps_of(sigmas, table)
    # diffusers rounds these timesteps down. The 1e-6 makes 998.9999999, an error of rounding, 999.
    down = spacing in ("exponential", "beta") or spacing == "karras" and schedule.beta_schedule == "squaredcos_cap_v2"
    return np.floor(timesteps + 1e-6) if down else np.round(timesteps), sigmas


def _whole_timesteps(schedule, num_steps) -> Column:
    """Spaces one step more than the solver takes and drops the last, except for "trailing"."""
    spacing = schedule.timestep_spacing or "linspace"
    if spacing == "trailing":
        timesteps = spaced(spacing, schedule, num_steps)
    else:
        timesteps = np.round(spaced(spacing, schedule, num_steps + 1))[:-1]
    if np.any(np.diff(timesteps) >= 0.0):
        raise UserError(f"this solver has no {num_steps} different timesteps on this schedule: take fewer steps.")
    return timesteps


def named_levels(spacing: str, low: float, high: float, num_steps: int, table: Table) -> Column:
    """Returns descending noise levels from `high` to `low`.

    SGM uniform and Align Your Steps have levels of their own: they end before the lowest one, since 0 follows.
    """
    steps = np.linspace(0.0, 1.0, num_steps)
    if spacing == "karras":
        low, high = low ** (1.0 / KARRAS_RHO), high ** (1.0 / KARRAS_RHO)
        return (high + steps * (low - high)) ** KARRAS_RHO
    if spacing == "exponential":
        return np.exp(np.linspace(np.log(high), np.log(low), num_steps))
    if spacing == "beta":
        return low + betaincinv(BETA, BETA, 1.0 - steps) * (high - low)
    if spacing == "sgm_uniform":
        timesteps = np.linspace(len(table) - 1, 0, num_steps + 1)[:-1]
        return np.exp(np.interp(timesteps, np.arange(len(table)), np.log(table)))
    published = np.log(ALIGN_YOUR_STEPS[spacing])
    places = np.linspace(0, len(published) - 1, num_steps + 1)[:-1]
    return np.exp(np.interp(places, np.arange(len(published)), published))


def spaced(spacing: str, schedule: NoiseSchedule, num_steps: int) -> Column:
    """Returns descending timesteps (arXiv:2305.08891, table 2); a single one is the last, where all is noise."""
    n = schedule.num_train_timesteps
    if num_steps == 1:
        return np.array([n - 1.0])
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


def timesteps_of(sigmas: Column, table: Table) -> Column:
    """Returns the fractional timesteps of noise levels, linear in the logarithm of sigma."""
    return np.interp(np.log(sigmas), np.log(table), np.arange(len(table)))
