"""Pictures at the size in which a report shows them."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image

DIFFERENCE_GAIN = 4  # Times the difference of two pictures, so that it can be seen.
_SIDE = 192  # Pixels.


def tile(image: UInt8[np.ndarray, "H W 3"]) -> Image.Image:
    """Returns a picture of about 192 pixels: a whole factor enlarges it, or it is reduced to at most 384 pixels."""
    picture = Image.fromarray(image)
    factor = max(_SIDE // max(picture.size), 1)
    if factor > 1:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((2 * _SIDE, 2 * _SIDE), Image.Resampling.LANCZOS)
    return picture


def difference_strip(teacher: UInt8[np.ndarray, "H W 3"], student: UInt8[np.ndarray, "H W 3"]) -> Image.Image:
    """Returns teacher, student and their amplified absolute difference side by side, with transparent gaps."""
    difference = np.abs(teacher.astype(np.int16) - student.astype(np.int16)) * DIFFERENCE_GAIN
    tiles = [tile(image) for image in (teacher, student, difference.clip(0, 255).astype(np.uint8))]
    width, height = tiles[0].size
    gap = max(width // 32, 1)
    strip = Image.new("RGBA", (3 * width + 2 * gap, height))
    for place, picture in enumerate(tiles):
        strip.paste(picture, (place * (width + gap), 0))
    return strip
