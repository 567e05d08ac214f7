"""Aspect-ratio buckets: the image sizes of a run, each with about the same number of pixels."""

import math

from dmm_jax.runtime.errors import UserError

LEAST_AREA = 0.9  # A bucket's share of the square's pixels; with 64 pixels per unit, SDXL's published list follows.
MAX_RATIO = 4.0
Size = tuple[int, int]  # Height and width in pixels.


def bucket_sizes(resolution: int, max_ratio: float, unit: int) -> tuple[Size, ...]:
    """Returns the sizes of the buckets, the square first, then from tall to wide.

    A side is a multiple of `unit`, the ratio of the sides at most `max_ratio`, and the number of pixels 90 to 100 % of
    the square's. For 1024 pixels, a unit of 64 and a ratio of 4 these are the sizes of SDXL (arXiv:2307.01952, app. I).

    Args:
      resolution: pixels per side of the square.
      unit: pixels that the UNet's coarsest level has as one cell.

    Raises:
      UserError: the ratio is not from 1 to 4, or the square is no multiple of the unit although others are wanted.
    """
    if not 1.0 <= max_ratio <= MAX_RATIO:
        raise UserError(f"data.max_aspect_ratio must be from 1 to {MAX_RATIO:g}; got {max_ratio}.")
    square = (resolution, resolution)
    if max_ratio == 1.0:
        return (square,)
    if resolution % unit:
        nearest = max(round(resolution / unit), 1) * unit
        raise UserError(
            f"data.resolution must be a multiple of {unit} pixels for buckets; got {resolution}. Use {nearest}, or "
            "data.max_aspect_ratio=1."
        )
    area, sides = resolution**2, range(unit, int(resolution * math.sqrt(max_ratio)) + 1, unit)
    sizes = [
        (height, width)
        for height in sides
        for width in sides
        if LEAST_AREA * area <= height * width <= area and max(height, width) <= max_ratio * min(height, width)
    ]
    return (square, *sorted({*sizes} - {square}, key=lambda size: (size[1] / size[0], size[0])))


def nearest_bucket(height: int, width: int, sizes: tuple[Size, ...]) -> int:
    """Returns the number of the bucket whose ratio of sides is nearest to an image's; of equals, the first."""
    ratio = math.log(width / height)
    return min(range(len(sizes)), key=lambda number: abs(math.log(sizes[number][1] / sizes[number][0]) - ratio))
