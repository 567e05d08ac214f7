"""Two resizes to Inception's 299 x 299, as published FIDs use them: TensorFlow 1's and clean-fid's.

Their FIDs differ by whole units (arXiv:2104.11222), so a number must name its resize.
"""

import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image


def resize_tf1(images: Float[Array, "B H W C"], size: int) -> Float[Array, "B size size C"]:
    """Resizes as `tf.image.resize_bilinear` of TensorFlow 1 and torch-fidelity do: no half pixel, no antialiasing.

    Output row r reads input row r H / size. `jax.image.resize` would shift by half a pixel, which changes a value by 3
    of 255 on average.
    """
    first_row, second_row, row_weight = _neighbours(images.shape[1], size)
    first_column, second_column, column_weight = _neighbours(images.shape[2], size)

    def interpolate_columns(rows):
        chosen = images[:, rows]
        first, second = chosen[:, :, first_column], chosen[:, :, second_column]
        return first + (second - first) * column_weight[None, None, :, None]  # (B, size, size, C)

    above = interpolate_columns(first_row)
    return above + (interpolate_columns(second_row) - above) * row_weight[None, :, None, None]


def _neighbours(length: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the two input pixels that each output lies between, and the second one's weight, in float32."""
    position = np.arange(size, dtype=np.float32) * np.float32(length / size)
    first = position.astype(np.int32)
    return first, np.minimum(first + 1, length - 1), position - first.astype(np.float32)


def resize_clean(images: UInt8[np.ndarray, "B H W 3"], size: int) -> Float[np.ndarray, "B size size 3"]:
    """Resizes as clean-fid does: Pillow's antialiased bicubic on each channel in float, clipped to [0, 255]."""
    resized = np.empty((len(images), size, size, 3), np.float32)
    for image, out in zip(images, resized, strict=True):
        for channel in range(3):
            plane = Image.fromarray(image[:, :, channel].astype(np.float32))
            out[:, :, channel] = plane.resize((size, size), Image.Resampling.BICUBIC)
    return resized.clip(0.0, 255.0)
