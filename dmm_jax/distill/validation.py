"""The fixed validation set: the same images, prompts, noise and timesteps for every teacher, at every step of a run."""

from collections.abc import Sequence

import numpy as np

from dmm_jax.data.batches import buckets_of
from dmm_jax.distill.objective import Inputs
from dmm_jax.distill.teachers import BatchRow

NUM_TIMESTEP_BINS = 4  # 0-249, 250-499, 500-749, 750-999.


def fixed_inputs(source, rows: Sequence[BatchRow], seed: int, num_timesteps: int) -> list[Inputs]:
    """Returns host inputs (N, V, ...) for each bucket, with timesteps that are evenly spread over all images.

    If a row has several styles, the images take turns through them.

    Args:
      source: the examples of a latent cache that are held out.
    """
    buckets = buckets_of(source)
    turns = np.arange(len(source))
    if len(buckets) > 1:  # Every bucket has low and high noise.
        turns = np.random.default_rng(seed).permutation(turns)
    ends = np.cumsum([len(bucket) for bucket in buckets])
    rngs = [np.random.default_rng([seed, number] if number else seed) for number in range(len(buckets))]
    parts = zip(buckets, np.split(turns, ends[:-1]), rngs, strict=True)
    return [_inputs(*part, rows, num_timesteps / len(source)) for part in parts]


def _inputs(source, turns: np.ndarray, rng: np.random.Generator, rows: Sequence[BatchRow], spacing: float) -> Inputs:
    """Returns the inputs of one bucket; image k has the timestep in the middle of its turn."""
    examples = source.gather(np.arange(len(source)))

    def every_row(leaf):
        return np.repeat(leaf[None], len(rows), 0)

    def rows_of(name, dtype):
        return every_row(examples[name].astype(dtype))

    latents = rows_of("latents", np.float32)
    return Inputs(
        latents=latents,
        input_ids=rows_of("input_ids", np.int32),
        time_ids=rows_of("time_ids", np.int32),
        noise=every_row(rng.standard_normal(latents.shape[1:], np.float32)),
        timesteps=every_row(((turns + 0.5) * spacing).astype(np.int32)),
        style_ids=np.stack([row.first_style + turns % row.num_styles for row in rows]).astype(np.int32),
    )


def by_bin(
    errors: np.ndarray, names: Sequence[str], timesteps: np.ndarray, num_timesteps: int
) -> dict[str, list[float | None]]:
    """Returns each row's mean error per bin of timesteps, from low noise to high; None for a bin without an image.

    Args:
      errors: (N, V).
      timesteps: (V,).
    """
    bins = timesteps * NUM_TIMESTEP_BINS // num_timesteps
    members = [bins == number for number in range(NUM_TIMESTEP_BINS)]
    return {
        name: [float(np.mean(row[member])) if member.any() else None for member in members]
        for name, row in zip(names, errors, strict=True)
    }
