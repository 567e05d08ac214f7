"""Training batches from a cache: batch k is a pure function of (seed, k)."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
import numpy as np

from dmm_jax.runtime.errors import UserError

MAX_STEPS = 2**31


class Batch(NamedTuple):
    """The examples of one step, or this process's share of them."""

    latents: np.ndarray  # float32 (N, B/N, h, w, C), scaled; row n is for teacher n.
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
    """Returns the batches of all steps: `dataset[k]` is a `Batch`; `iterate` reads them ahead.

    The examples form an endless sequence of epochs, each in a random order of its own. Batch k holds the examples
    k * `batch_size` to (k + 1) * `batch_size` - 1 of the sequence, teacher by teacher, for any number of processes.

    Args:
        source: `LatentCache` or `CacheSlice`.
        batch_size: examples per step, over all teachers and processes.
        share: the rows and columns of the batch [N, B/N] that this process reads; None: all.
        offset: added to the first example of each batch. A run that changes its batch size at some step sets it, since
            it has seen more or fewer examples than steps * `batch_size`.

    Raises:
        ValueError: the source is empty, or `batch_size` is not a multiple of `num_teachers`.
    """
    if len(source) == 0:
        raise UserError("the source of examples is empty. Prepare a cache with more images.")
    if min(num_teachers, batch_size) < 1:
        raise UserError(f"expected positive numbers of teachers and examples; got {num_teachers=}, {batch_size=}.")
    if batch_size % num_teachers:
        raise UserError(
            f"batch_size must be a multiple of the {num_teachers} teachers; got {batch_size}. "
            f"Use {max(batch_size - batch_size % num_teachers, num_teachers)}."
        )
    stream = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    places = np.arange(batch_size).reshape(num_teachers, -1)
    if share is not None:
        places = places[np.ix_(*share)]
    return grain.MapDataset.range(MAX_STEPS).map(_Gather(stream, places + offset, batch_size))


def iterate(dataset: grain.MapDataset, start_step: int = 0, num_threads: int = 4) -> Iterator[Batch]:
    """Yields the batches of steps `start_step`, `start_step + 1`, ...; threads read ahead."""
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return iter(dataset[start_step:].to_iter_dataset(options))


class _Gather:
    """Collects batch k from the endless sequence of shuffled examples."""

    def __init__(self, stream: grain.MapDataset, places: np.ndarray, batch_size: int):
        self.stream, self.places, self.batch_size = stream, places, batch_size

    def __call__(self, step: int) -> Batch:
        first = int(step) * self.batch_size
        examples = [self.stream[first + place] for place in self.places.ravel().tolist()]
        return Batch(
            latents=self._stack(examples, "latents", np.float32),
            input_ids=self._stack(examples, "input_ids", np.int32),
            time_ids=self._stack(examples, "time_ids", np.int32),
        )

    def _stack(self, examples: list, name: str, dtype: type) -> np.ndarray:
        rows = np.stack([example[name] for example in examples]).astype(dtype)
        return rows.reshape(*self.places.shape, *rows.shape[1:])  # (N, B/N, ...)
