"""Which prompts an evaluation draws, and how many of them the student was trained on: held-out ones tell more."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dmm_jax.data.prompts import read_prompts
from dmm_jax.data.sources import SHAPES_WORLD, TEACHERS, FolderSource
from dmm_jax.runtime.errors import UserError
from dmm_jax.world import scenes
from dmm_jax.world.source import ShapesSource

PROMPT_SEED = 20_000  # Of the embedded world's captions, and of the order of all that were trained on.


class Prompts(NamedTuple):
    """A prompt for every picture of a model, and what a report says of them."""

    lines: list[str]
    facts: dict[str, str]


def choose(config, count: int, file: str = "") -> Prompts:
    """Returns prompts for `count` pictures; where there are fewer they come again.

    Those of `file` or else of `config.evaluation.prompts`, in their order; else those that the run was trained on,
    shuffled; of the embedded world new ones.

    Raises:
      ValueError: the file cannot be used, or what the run was trained on is not there.
    """
    given = file or config.evaluation.prompts
    rng = np.random.default_rng(PROMPT_SEED)
    if given:
        lines, where = read_prompts(given), str(given)
    elif config.data.source == SHAPES_WORLD:
        lines, where = scenes.sample_scenes(rng, count)[1], f"the embedded world's captions, seed {PROMPT_SEED}"
    else:
        try:
            lines = _trained_on(config)
        except (ValueError, OSError) as error:
            raise UserError(f"{error} Or give other prompts: --prompts FILE, a text file with one a line.") from error
        lines = [lines[k] for k in rng.permutation(len(lines))]
        where = f"{config.data.prompts if config.data.source == TEACHERS else config.data.source}, seed {PROMPT_SEED}"
    used = lines[:count]
    again = f", again and again for {count} pictures" if len(used) < count else ""
    facts = {"prompts": f"{len(used)} of {where}{again}", "prompts trained on": _overlap(config, used)}
    return Prompts([used[k % len(used)] for k in range(count)], facts)


def _overlap(config, used: Sequence[str]) -> str:
    """Says how many of the prompts the run's own data holds."""
    try:
        trained = set(_trained_on(config))
    except (ValueError, OSError):
        return "unknown: the run's own prompts are not there any more"
    return f"{sum(line in trained for line in used)} of {len(used)}"


def _trained_on(config) -> list[str]:
    """Returns the prompts of the run's data.

    Raises:
      ValueError: its file or folder cannot be read.
    """
    data = config.data
    if data.source == SHAPES_WORLD:
        return list(ShapesSource(data.num_examples, seed=config.seed).captions)
    if data.source == TEACHERS:
        return read_prompts(data.prompts)[: data.num_examples or None]
    return [caption for _, caption in FolderSource(data.source).rows][: data.num_examples or None]
