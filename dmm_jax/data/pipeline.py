"""Training batches from a cache: batch k is a pure function of (seed, k), whatever was read before it."""

from collections.abc import Iterator
from typing import Any, TypedDict

import grain
import numpy as np

MAX_STEPS = 2**31


class Batch(TypedDict):
    """One step's examples of this process: N teachers, B/N examples for each."""

    latents: np.ndarray  # float32 (N, B/N, h, w, C), scaled
    input_ids: np.ndarray  # int32 (N, B/N, L)


def batches(
    source: Any,
    seed: int,
    num_teachers: int,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    teacher_processes: int = 1,
) -> grain.MapDataset:
    """Returns the batches of all steps: `dataset[k]` is a `Batch`, and `iterate` reads them ahead.

    The examples come in an endless row of epochs, each shuffled anew. Batch k of the whole run takes the next
    `batch_size` of them, teacher by teacher, so it does not depend on the number of processes. Process p holds the
    block of it that lies on its devices when the mesh has the processes in order, teachers first.

    Args:
        source: `LatentCache` or `CacheSlice`.
        batch_size: examples a step over all teachers and processes.
        teacher_processes: into how many process groups the teachers are divided; each group divides the examples.

    Raises:
        ValueError: teachers or examples do not divide evenly.
    """
    _check(source, num_teachers, batch_size, process_index, process_count, teacher_processes)
    stream = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    per_teacher = np.arange(batch_size).reshape(num_teachers, -1)
    group, member = divmod(process_index, process_count // teacher_processes)
    teachers = np.split(per_teacher, teacher_processes, axis=0)[group]
    places = np.split(teachers, process_count // teacher_processes, axis=1)[member]
    return grain.MapDataset.range(MAX_STEPS).map(_Gather(stream, places, batch_size))


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
        }

    def _stack(self, examples: list, name: str, dtype: type) -> np.ndarray:
        rows = np.stack([example[name] for example in examples]).astype(dtype)
        return rows.reshape(*self.places.shape, *rows.shape[1:])  # (N, B/N, ...)


def _check(source, num_teachers, batch_size, process_index, process_count, teacher_processes) -> None:
    if len(source) == 0:
        raise ValueError("the source of examples is empty. Prepare a cache with more images.")
    if min(num_teachers, batch_size, process_count, teacher_processes) < 1:
        raise ValueError(
            f"expected positive numbers of teachers, examples and processes; got num_teachers={num_teachers}, "
            f"batch_size={batch_size}, process_count={process_count}, teacher_processes={teacher_processes}."
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must lie in 0 to {process_count - 1}; got {process_index}.")
    if process_count % teacher_processes or num_teachers % teacher_processes:
        raise ValueError(
            f"teacher_processes must divide the {process_count} processes and the {num_teachers} teachers; "
            f"got {teacher_processes}. Use 1."
        )
    parts = num_teachers * (process_count // teacher_processes)
    if batch_size % parts:
        raise ValueError(
            f"batch_size must be a multiple of {parts} ({num_teachers} teachers, {process_count // teacher_processes} "
            f"processes a teacher); got {batch_size}. Use {max(batch_size - batch_size % parts, parts)}."
        )
