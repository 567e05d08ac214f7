"""Training batches from a cache: batch k is a pure function of (seed, k), whatever was read before it."""

from collections.abc import Iterator
from typing import Any, TypedDict

import grain
import numpy as np

from dmm_jax.runtime.errors import UserError

MAX_STEPS = 2**31


class Batch(TypedDict):
    """One step's examples, or the rows and columns of them that this process reads."""

    latents: np.ndarray  # float32 (N, B/N, h, w, C), scaled
    input_ids: np.ndarray  # int32 (N, B/N, L)
    time_ids: np.ndarray  # int32 (N, B/N, 6), for Stable Diffusion XL; see `data.cache.CachedExample`


def batches(
    source: Any,
    seed: int,
    num_teachers: int,
    batch_size: int,
    share: tuple[np.ndarray, np.ndarray] | None = None,
    offset: int = 0,
) -> grain.MapDataset:
    """Returns the batches of all steps: `dataset[k]` is a `Batch`, and `iterate` reads them ahead.

    The examples come in an endless row of epochs, each shuffled anew. Batch k of the whole run takes the next
    `batch_size` of them, teacher by teacher, so it does not depend on the number of processes.

    Args:
        source: `LatentCache` or `CacheSlice`.
        batch_size: examples a step over all teachers and processes.
        share: the rows and columns of the batch [N, B/N] that this process reads; None: all.
        offset: batch k begins so many examples later (or, negative, earlier) than k * `batch_size`: a run whose batch
            size has changed at a step has seen more, or fewer, than that.

    Raises:
        ValueError: the source is empty, or teachers do not divide the examples.
    """
    _check(source, num_teachers, batch_size)
    stream = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    places = np.arange(batch_size).reshape(num_teachers, -1)
    if share is not None:
        places = places[np.ix_(*share)]
    return grain.MapDataset.range(MAX_STEPS).map(_Gather(stream, places + offset, batch_size))


def iterate(dataset: grain.MapDataset, start_step: int = 0, num_threads: int = 4) -> Iterator[Batch]:
    """Yields the batches of steps `start_step`, `start_step + 1`, ...; reads ahead in threads."""
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return iter(dataset[start_step:].to_iter_dataset(options))


class _Gather:
    """Collects batch k from the endless row of shuffled examples."""

    def __init__(self, stream: grain.MapDataset, places: np.ndarray, batch_size: int):
        self.stream, self.places, self.batch_size = stream, places, batch_size

    def __call__(self, step: int) -> Batch:
        first = int(step) * self.batch_size
        examples = [self.stream[first + place] for place in self.places.ravel().tolist()]
        return {
            "latents": self._stack(examples, "latents", np.float32),
            "input_ids": self._stack(examples, "input_ids", np.int32),
            "time_ids": self._stack(examples, "time_ids", np.int32),
        }

    def _stack(self, examples: list, name: str, dtype: type) -> np.ndarray:
        rows = np.stack([example[name] for example in examples]).astype(dtype)
        return rows.reshape(*self.places.shape, *rows.shape[1:])  # (N, B/N, ...)


def _check(source, num_teachers, batch_size) -> None:
    if len(source) == 0:
        raise UserError("the source of examples is empty. Prepare a cache with more images.")
    if min(num_teachers, batch_size) < 1:
        raise UserError(f"expected positive numbers of teachers and examples; got {num_teachers=}, {batch_size=}.")
    if batch_size % num_teachers:
        raise UserError(
            f"batch_size must be a multiple of the {num_teachers} teachers; got {batch_size}. "
            f"Use {max(batch_size - batch_size % num_teachers, num_teachers)}."
        )
