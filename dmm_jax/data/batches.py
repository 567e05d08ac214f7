"""Training batches from a cache: batch k is a pure function of (seed, k), and all its examples are of one bucket."""

import functools
from collections.abc import Iterator, Mapping, Sequence
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

    The examples of a bucket form an endless sequence of epochs, each in a random order of its own. A batch holds the
    next `batch_size` examples of its bucket's sequence, teacher by teacher, for any number of processes. Buckets take
    turns in a random order, as often as they have examples (`Turns`).

    Args:
        source: `LatentCache`, `CacheSlice`, or another source with their `gather`. Without a `bucket_of`, its examples
            are of one bucket.
        batch_size: examples per step, over all teachers and processes.
        share: the rows and columns of the batch [N, B/N] that this process reads; None: all.
        offset: added to the first example of each batch. A run that changes its batch size at some step sets it, since
            it has seen more or fewer examples than steps * `batch_size`.

    Raises:
        ValueError: the source is empty, `batch_size` is not a multiple of `num_teachers`, or has changed in a run of
            several buckets.
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
    groups = buckets_of(source)
    if offset and len(groups) > 1:
        raise UserError("batch_size has changed: a run with several buckets keeps it. Set the batch_size of its start.")
    orders = [grain.MapDataset.range(len(group)).seed(seed + k).shuffle().repeat() for k, group in enumerate(groups)]
    places = np.arange(batch_size).reshape(num_teachers, -1)
    if share is not None:
        places = places[np.ix_(*share)]
    turns = Turns([len(group) for group in groups], batch_size, seed)
    return grain.MapDataset.range(MAX_STEPS).map(_Gather(groups, orders, turns, places + offset))


def buckets_of(source: Any) -> list:
    """Returns the examples of each bucket that has some, as sources."""
    numbers = getattr(source, "bucket_of", np.zeros(1, np.uint8))
    present = np.unique(numbers)
    if len(present) == 1:
        return [source]
    return [_Members(source, np.flatnonzero(numbers == bucket)) for bucket in present]


class _Members:
    """Some examples of a source."""

    def __init__(self, source: Any, indices: np.ndarray):
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def gather(self, indices: np.ndarray) -> Mapping[str, np.ndarray]:
        return self.source.gather(self.indices[indices])


class Turns:
    """Which bucket a batch is of, and where the batch begins in its bucket's sequence: functions of (seed, k).

    An epoch is about as many batches as the examples fill. A bucket with n examples has had floor((e n + r) / B)
    batches after e epochs, where r is a fixed number below B: so every example is seen equally often, though n is no
    multiple of B. The batches of an epoch are in random order.
    """

    def __init__(self, sizes: Sequence[int], batch_size: int, seed: int):
        """Takes the number of examples of each bucket."""
        self.sizes, self.batch_size, self.seed = np.asarray(sizes, np.int64), batch_size, seed
        several = len(sizes) > 1  # A lone bucket begins at once.
        self.starts = np.random.default_rng(seed).integers(batch_size, size=len(sizes)) if several else np.zeros(1, int)
        self._order = functools.lru_cache(maxsize=4)(self._shuffled)

    def __call__(self, step: int) -> tuple[int, int]:
        """Returns the bucket of a batch, and the place of the batch's first example in its bucket's sequence."""
        epoch = max(step - len(self.sizes), 0) * self.batch_size // int(self.sizes.sum())
        while self._batches_before(epoch + 1).sum() <= step:
            epoch += 1
        before = self._batches_before(epoch)
        order = self._order(epoch)
        place = step - int(before.sum())
        bucket = int(order[place])
        return bucket, (int(before[bucket]) + int((order[:place] == bucket).sum())) * self.batch_size

    def _batches_before(self, epoch: int) -> np.ndarray:
        return (epoch * self.sizes + self.starts) // self.batch_size

    def _shuffled(self, epoch: int) -> np.ndarray:
        counts = self._batches_before(epoch + 1) - self._batches_before(epoch)
        return np.random.default_rng([self.seed, epoch]).permutation(np.repeat(np.arange(len(counts)), counts))


def iterate(dataset: grain.MapDataset, start_step: int = 0, num_threads: int = 4) -> Iterator[Batch]:
    """Yields the batches of steps `start_step`, `start_step + 1`, ...; threads read ahead."""
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return iter(dataset[start_step:].to_iter_dataset(options))


class _Gather:
    """Collects batch k from the endless sequences of shuffled examples."""

    def __init__(self, groups: Sequence[Any], orders: Sequence[grain.MapDataset], turns: Turns, places: np.ndarray):
        self.groups, self.orders, self.turns, self.places = groups, orders, turns, places

    def __call__(self, step: int) -> Batch:
        bucket, first = self.turns(int(step))
        order = self.orders[bucket]
        numbers = np.array([order[first + place] for place in self.places.ravel().tolist()])
        examples = self.groups[bucket].gather(numbers)
        return Batch(
            latents=self._shaped(examples["latents"], np.float32),
            input_ids=self._shaped(examples["input_ids"], np.int32),
            time_ids=self._shaped(examples["time_ids"], np.int32),
        )

    def _shaped(self, rows: np.ndarray, dtype: type) -> np.ndarray:
        return rows.reshape(*self.places.shape, *rows.shape[1:]).astype(dtype)  # (N, B/N, ...)
