"""Batches of any size through a compiled program of one size."""

from collections.abc import Callable

import numpy as np


def in_chunks(compute: Callable, chunk_size: int, row_shape: tuple[int, ...], *batches: np.ndarray) -> np.ndarray:
    """Returns `compute(*batches)` on the host in float32, computed `chunk_size` rows at a time.

    Zeros fill up the last chunk, so that all chunks share one compiled program.

    Args:
      compute: maps arrays of `chunk_size` rows to an array (chunk_size, *row_shape), each row by itself.
    """
    rows = np.empty((len(batches[0]), *row_shape), np.float32)
    for start in range(0, len(rows), chunk_size):
        chunk = [batch[start : start + chunk_size] for batch in batches]
        count = len(chunk[0])
        padded = [np.pad(part, ((0, chunk_size - count), *((0, 0),) * (part.ndim - 1))) for part in chunk]
        rows[start : start + count] = compute(*padded)[:count]
    return rows
