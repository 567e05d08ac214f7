"""Solvers of the sampling equation, all as one linear recurrence whose coefficients are tables.

Every solver here is linear in the latents x, the clean latents x0 that the network's output F implies, one array m of
memory, and fresh noise n. One evaluation of the network (c_... as in arXiv:2206.00364, eq. 7) is

    x0 = c_skip x + c_out F(c_in x)
    x' = keep x + pull x0 + recall m + fresh n
    m' = store_latents x + store_x0 x0

so a solver is a few columns of numbers, computed in float64 before sampling, and all solvers share a compiled program.
A predictor-corrector also remembers the last x0 (`Previous`), and has a program of its own. Timesteps and noise levels
are those of `spacing`. No coefficient is infinite: the step to sigma 0 is x' = x0.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Shaped

from dmm_jax.diffusion import solver_tables
from dmm_jax.diffusion import spacing as spacing_lib
from dmm_jax.diffusion.schedule import NoiseSchedule
from dmm_jax.runtime.errors import UserError, meant

# {solver: its name in AUTOMATIC1111's web UI}
NAMES = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
}
UNSPACED = ("lcm",)  # Distilled for its own timesteps.
# The methods whose schedulers in diffusers have fields such as use_karras_sigmas.
SPACED_BY_CONFIG = ("euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "unipc")
# {solver: (its method, its spacing)}
SOLVERS = {
    "_".join(filter(None, pair)): pair
    for pair in itertools.product(NAMES, spacing_lib.SPACINGS)
    if pair[0] not in UNSPACED or not pair[1]
}
MIN_LIKENESS = 0.8  # A name is suggested if it is so similar to the unknown one, from 0 to 1.
STOCHASTIC = ("euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde", "lcm")
Column = Any  # Float[Array, " num_evaluations"], except that tree functions put shapes or shardings here.


class Previous(NamedTuple):
    """The columns of a predictor-corrector, which also remembers the last evaluation's x0 as p.

    x' has recall_previous p more, and m' has store_memory m + store_previous p more.
    """

    recall_previous: Column
    store_memory: Column
    store_previous: Column


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """The tables of one solver on one schedule: one row per evaluation, for the recurrence at the top of this file.

    A pytree: pass it to `jit` as an argument. Plans of equally many evaluations share a compilation, whatever the
    solver; stochastic solvers have a second one, and predictor-correctors a third.
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
    previous: Previous | None  # None for most solvers: their program has no further memory.
    stochastic: bool = dataclasses.field(metadata={"static": True})


COLUMNS = tuple(
    field.name
    for field in dataclasses.fields(SamplingPlan)
    if field.name not in ("init_noise_sigma", "previous", "stochastic")
)


def canonical(name: str) -> str:
    """Returns the solver that a name says: one of SOLVERS, or A1111's, as "DPM++ 2M Karras"; case does not matter.

    Raises:
      UserError: an unknown name; a similar one is suggested, and all are listed.
    """
    spellings = {_letters(spelling): solver for solver in SOLVERS for spelling in (solver, a1111_name(solver))}
    letters = _letters(name).removesuffix("automatic")
    if letters not in spellings:
        end = meant(letters, spellings, lambda near: repr(spellings[near]), MIN_LIKENESS)
        methods = ", ".join(f"{method} ({title})" for method, title in NAMES.items())
        spacings = ", ".join(f"_{spacing} ({title})" for spacing, title in spacing_lib.SPACINGS.items() if spacing)
        raise UserError(
            f"there is no solver {name!r}{end} There are, with A1111's names in brackets: {methods}; all except "
            f"{', '.join(UNSPACED)} also with {spacings}."
        )
    return spellings[letters]


def _letters(name: str) -> str:
    return name.lower().replace("+", "p").translate(str.maketrans("", "", " _-"))


def a1111_name(solver: str) -> str:
    """Returns the name that AUTOMATIC1111's web UI has for one of SOLVERS."""
    method, spacing = SOLVERS[solver]
    return " ".join(filter(None, (NAMES[method], spacing_lib.SPACINGS[spacing])))


def plan(solver: str, schedule: NoiseSchedule, num_inference_steps: int) -> SamplingPlan:
    """Makes the tables of `num_inference_steps` steps.

    A step is one evaluation; heun and dpmpp_sde take two, and one for the last step.

    Args:
      solver: ddim (arXiv:2010.02502), euler and heun (arXiv:2206.00364, alg. 1), euler_ancestral, dpmpp_2m
        (arXiv:2211.01095, alg. 2), dpmpp_2m_sde, dpmpp_sde (of k-diffusion), unipc (arXiv:2302.04867, order 2, B2),
        lcm (arXiv:2310.04378); all except lcm also with one of `spacing.SPACINGS`: "dpmpp_2m_karras". Without one,
        most follow the spacing that the schedule's config names.

    Raises:
      UserError: an unknown solver (the nearest is named), more steps than noise levels, or a schedule that the solver
        cannot run on.
    """
    method, spacing = SOLVERS[canonical(solver)]
    if method in SPACED_BY_CONFIG:
        spacing = spacing or schedule.named_spacing
    table = solver_tables.columns(method, spacing, schedule, num_inference_steps)
    zeros = np.zeros(len(table["timesteps"]))
    columns = {name: np.asarray(table.get(name, zeros), np.float32) for name in COLUMNS}
    previous = None
    if "store_memory" in table:
        previous = Previous(*(np.asarray(table[name], np.float32) for name in Previous._fields))
    scale = np.asarray(table["init_noise_sigma"], np.float32)
    return SamplingPlan(**columns, init_noise_sigma=scale, previous=previous, stochastic=method in STOCHASTIC)


def sample(
    plan: SamplingPlan,
    predict: Callable[..., Array],
    noise: Float[Array, "B h w C"],
    keys: Key[Array, " B"] | None = None,
    *extra_inputs: Shaped[Array | np.ndarray, "S ..."],
) -> Float[Array, "B h w C"]:
    """Runs a solver from unit noise to clean latents: one `lax.scan`, one iteration per evaluation.

    Args:
      predict: maps (latents scaled as the network expects them, timestep (), one row of each extra input) to the
        network's prediction.
      noise: unit normal.
      keys: one PRNG key per image, for the stochastic solvers; an image's noise does not depend on its batch.
      extra_inputs: further arguments of `predict`, one row per evaluation.

    Raises:
      UserError: a stochastic solver without keys.
    """
    return advance(plan, predict, start(plan, noise), 0, keys, *extra_inputs)[0]


def start(plan: SamplingPlan, noise: Float[Array, "B h w C"]) -> tuple[Array, Array, Array | None]:
    """Returns the state before the first evaluation: latents, memory, and the last x0 of a predictor-corrector."""
    latents = noise.astype(jnp.float32) * plan.init_noise_sigma
    memory = jnp.zeros_like(latents)
    return latents, memory, None if plan.previous is None else memory


def advance(
    plan: SamplingPlan,
    predict: Callable[..., Array],
    state: tuple[Array, Array, Array | None],
    first: Int[Array, ""] | int,
    keys: Key[Array, " B"] | None = None,
    *extra_inputs: Shaped[Array | np.ndarray, "S ..."],
) -> tuple[Array, Array, Array | None]:
    """Returns the state after the evaluations of a plan, or of a part of one that begins at evaluation `first`."""
    if plan.stochastic and keys is None:
        raise UserError("this solver draws noise at every step: give `keys`, one per image.")

    def evaluate(state, numbered_row):
        number, row, correction, others = numbered_row
        latents = state[0]
        prediction = predict(latents * row["c_in"], row["timesteps"], *others)
        noise = step_noise(keys, number, latents.shape[1:]) if plan.stochastic else None
        return update(row, correction, state, prediction, noise), None

    rows = {name: jnp.asarray(getattr(plan, name)) for name in COLUMNS}
    numbers = first + jnp.arange(len(plan.timesteps))
    return jax.lax.scan(evaluate, state, (numbers, rows, plan.previous, extra_inputs))[0]


def update(
    row: Mapping[str, Array],
    correction: Previous | None,
    state: tuple[Array, Array, Array | None],
    prediction: Float[Array, "B h w C"],
    noise: Float[Array, "B h w C"] | None = None,
) -> tuple[Array, Array, Array | None]:
    """Returns the state after one evaluation; with a correction, its last entry is this evaluation's x0.

    Args:
      row: the plan's columns at this evaluation: numbers, or one per image (B, 1, 1, 1).
      correction: the columns of a predictor-corrector; with zeros it is another solver.
      noise: fresh unit noise; None for a plan that is not stochastic.
    """
    latents, memory, previous = state
    x0 = row["c_skip"] * latents + row["c_out"] * prediction
    stepped = row["keep"] * latents + row["pull"] * x0 + row["recall"] * memory
    if noise is not None:
        stepped += row["fresh"] * noise
    stored = row["store_latents"] * latents + row["store_x0"] * x0
    if correction is not None:
        stepped += correction.recall_previous * previous
        stored += correction.store_memory * memory + correction.store_previous * previous
        previous = x0
    return stepped, stored, previous


def step_noise(
    keys: Key[Array, " B"], numbers: Int[Array, " B"] | Int[Array, ""] | int, shape: tuple[int, int, int]
) -> Float[Array, "B h w C"]:
    """Draws the fresh unit noise of an evaluation, for each image from its own key and the evaluation's number."""
    numbers = jnp.broadcast_to(numbers, keys.shape)
    return jax.vmap(lambda key, number: jax.random.normal(jax.random.fold_in(key, number), shape))(keys, numbers)
