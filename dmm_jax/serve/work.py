"""Checks a request and turns it into arrays: the tokens of its prompts, and a row of numbers per evaluation.

A slot of the engine computes whatever its row says, so that a batch mixes solvers, steps, styles and guidance.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dmm_jax.config import arguments
from dmm_jax.diffusion import solvers
from dmm_jax.diffusion.solvers import Previous
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime.errors import UserError
from dmm_jax.text.prompt_chunks import PromptTokens

MAX_CHARACTERS = 2**14  # A prompt has at most so many, so that it is read in a moment.
# A row holds these columns, then the weights of the styles.
REQUEST_COLUMNS = ("number", "guidance_scale", "guidance_rescale", "num_states")
COLUMNS = (*solvers.COLUMNS, *Previous._fields, *REQUEST_COLUMNS)
Size = tuple[int, int]  # Height and width in pixels.


class Work(NamedTuple):
    """The arrays of one request."""

    size: Size
    seed: int
    tokens: PromptTokens  # (2, K, EL), the negative prompt and the prompt; without guidance (1, K, EL), the prompt.
    init_noise_sigma: float
    table: Float[np.ndarray, "n columns"]  # One row per evaluation.

    @property
    def guided(self) -> bool:
        """Whether each evaluation asks the network about two prompts."""
        return len(self.tokens.input_ids) == 2

    @property
    def num_chunks(self) -> int:
        """The number of chunks of its prompts."""
        return self.tokens.input_ids.shape[1]


class Limits(NamedTuple):
    """What an engine accepts."""

    sizes: tuple[Size, ...]
    max_steps: int
    max_chunks: int


def check(fields: Mapping, pipeline: Pipeline, limits: Limits, plan: Callable) -> tuple[dict, Work]:
    """Returns the fields of an `ImageRequest` with every default filled in, and its arrays.

    Args:
      plan: returns the plan of a solver and a number of steps, as `plans` does.

    Raises:
      UserError: a field does not fit the pipeline or the limits; the message names it and what would fit.
    """
    fields = dict(fields)
    num_steps = min(pipeline.sampling["num_inference_steps"], limits.max_steps)
    of_model = pipeline.sampling | {"num_inference_steps": num_steps}
    fields |= {name: value for name, value in of_model.items() if fields[name] is None}
    for name in ("prompt", "negative_prompt"):
        _check_text(name, fields[name])
    fields["seed"] = arguments.whole_number("seed", fields["seed"], 0, arguments.MAX_SEED)
    fields["height"], fields["width"] = size = _size(fields["height"], fields["width"], limits.sizes)
    steps = arguments.whole_number("num_inference_steps", fields["num_inference_steps"], 1, limits.max_steps)
    scale = arguments.number("guidance_scale", fields["guidance_scale"])
    rescale = arguments.number("guidance_rescale", fields["guidance_rescale"], 0.0, 1.0)
    fields |= {"num_inference_steps": steps, "guidance_scale": scale, "guidance_rescale": rescale}
    fields["solver"] = solvers.canonical(str(fields["solver"]))
    solver = plan(fields["solver"], steps)
    weights = pipeline.style_weights([fields["style"]], 1, solver.timesteps)  # (1, n, N)
    tokens = pipeline.tokenize([fields["prompt"]] if scale == 1.0 else [fields["negative_prompt"], fields["prompt"]])
    _, num_chunks, num_ids = tokens.input_ids.shape
    if num_chunks > limits.max_chunks:
        raise UserError(f"a prompt may fill {limits.max_chunks} chunks of tokens here; this one fills {num_chunks}.")
    num_states = num_chunks * num_ids // len(pipeline.tokenizers.tokenizers)
    numbers = np.arange(len(solver.timesteps))
    constants = [np.full(len(numbers), value) for value in (scale, rescale, num_states)]
    zeros = Previous(*[np.zeros(len(numbers))] * len(Previous._fields))
    columns = [*(getattr(solver, name) for name in solvers.COLUMNS), *(solver.previous or zeros), numbers, *constants]
    table = np.stack(columns, axis=1)
    if weights is not None:
        table = np.concatenate([table, weights[0]], axis=1)
    return fields, Work(size, fields["seed"], tokens, float(solver.init_noise_sigma), table.astype(np.float32))


def plans(pipeline: Pipeline) -> Callable:
    """Returns a function that makes the plan of a solver and a number of steps, and remembers the latest."""
    return functools.lru_cache(256)(lambda solver, steps: solvers.plan(solver, pipeline.schedule, steps))


def unpack(rows: Float[Array, "S columns"]) -> tuple[dict[str, Array], Previous, dict[str, Array], Array]:
    """Returns the solver's row and correction (S, 1, 1, 1), the request's columns (S,), and style weights (S, N)."""
    columns = {name: rows[:, k] for k, name in enumerate(COLUMNS)}
    images = {name: column[:, None, None, None] for name, column in columns.items()}
    row = {name: images[name] for name in solvers.COLUMNS} | {"timesteps": columns["timesteps"]}
    request = {name: columns[name] for name in REQUEST_COLUMNS}
    request |= {name: request[name].astype(jnp.int32) for name in ("number", "num_states")}
    return row, Previous(*(images[name] for name in Previous._fields)), request, rows[:, len(COLUMNS) :]


def _check_text(name, text):
    if not isinstance(text, str) and not (text is None and name == "negative_prompt"):
        raise UserError(f"{name} must be a text; got {text!r}.")
    if len(text or "") > MAX_CHARACTERS:
        raise UserError(f"{name} may have {MAX_CHARACTERS:,} characters; this one has {len(text):,}.")


def _size(height, width, sizes: Sequence[Size]) -> Size:
    """Returns height and width; a 0 takes the first size's side."""
    sides = arguments.whole_number("height", height, 0), arguments.whole_number("width", width, 0)
    size = sides[0] or sizes[0][0], sides[1] or sizes[0][1]
    if size not in sizes:
        offered = ", ".join(f"{width} x {height}" for height, width in sizes)
        raise UserError(f"there is no size {size[1]} x {size[0]} here (width x height); there are: {offered}.")
    return size
