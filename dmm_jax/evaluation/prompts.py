"""The prompts of an evaluation, and how many of them the student was trained on; held-out prompts show more."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dmm_jax.config.options import PROMPTS, SHAPES_WORLD
from dmm_jax.data.prompts import read_prompts
from dmm_jax.data.sources import FolderSource
from dmm_jax.runtime.errors import UserError
from dmm_jax.world import scenes
from dmm_jax.world.source import ShapesSource

PROMPT_SEED = 20_000  # For new captions of the embedded world and for the order of the training prompts.


class Prompts(NamedTuple):
    """One prompt per picture of a model, and their description for the report."""

    lines: list[str]
    settings: dict[str, str]
    are_captions: bool = False  # Plain text of the training images, written without the grammar of prompts.


def choose_prompts(config, count: int, file: str = "") -> Prompts:
    """Returns `count` prompts; a shorter list starts again from its beginning.

    The source is `file`, in its order; else the run's own data: new captions of the embedded world, or the training
    prompts in random order.

    Raises:
      ValueError: the file cannot be used, or the training prompts are missing.
    """
    rng = np.random.default_rng(PROMPT_SEED)
    if file:
        lines, source = read_prompts(file), str(file)
    elif config.data.kind == SHAPES_WORLD:
        lines, source = scenes.sample_scenes(rng, count)[1], f"the embedded world's captions, seed {PROMPT_SEED}"
    else:
        try:
            lines = _training_prompts(config)
        except (ValueError, OSError) as error:
            raise UserError(
                f"{error} Or give other prompts: --prompts FILE, a text file with one prompt per line."
            ) from error
        lines = [lines[k] for k in rng.permutation(len(lines))]
        source = f"{config.data.source}, seed {PROMPT_SEED}"
    used = lines[:count]
    repeats = f", again and again for {count} pictures" if len(used) < count else ""
    settings = {"prompts": f"{len(used)} of {source}{repeats}", "prompts trained on": _overlap(config, used)}
    are_captions = not file and config.data.kind != PROMPTS
    return Prompts([used[k % len(used)] for k in range(count)], settings, are_captions)


def _overlap(config, prompts: Sequence[str]) -> str:
    """Returns how many of the prompts are in the run's training data, as text."""
    try:
        trained = set(_training_prompts(config))
    except (ValueError, OSError):
        return "unknown: the run's own prompts are missing"
    return f"{sum(prompt in trained for prompt in prompts)} of {len(prompts)}"


def _training_prompts(config) -> list[str]:
    """Returns the prompts of the run's training data.

    Raises:
      ValueError: its file or folder cannot be read.
    """
    data = config.data
    if data.kind == SHAPES_WORLD:
        return list(ShapesSource(data.num_examples, seed=config.seed).captions)
    if data.kind == PROMPTS:
        return read_prompts(data.source)[: data.num_examples or None]
    return [caption for _, caption in FolderSource(data.source, where=data.where).rows][: data.num_examples or None]
