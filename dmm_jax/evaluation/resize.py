"""The two ways in which published FIDs bring pictures to Inception's 299 x 299: TensorFlow 1's, and clean-fid's.

They differ by whole units of the distance, so a number says which one it was (arXiv:2104.11222).
"""

import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image


def resize_tf1(images: Float[Array, "B H W C"], size: int) -> Float[Array, "B size size C"]:
    """Resizes as `tf.image.resize_bilinear` of TensorFlow 1 and torch-fidelity do: no half pixel, no antialiasing.

    Output row r reads from row r H / size. `jax.image.resize` counts half pixels instead, which changes a value by 3 of
    255 in the mean.
    """
    top, bottom, down = _neighbours(images.shape[1], size)
    left, right, across = _neighbours(images.shape[2], size)

    def rows(index):
        found = images[:, index]
        before = found[:, :, left]
        return before + (found[:, :, right] - before) * across[None, None, :, None]  # (B, size, size, C)

    above = rows(top)
    return above + (rows(bottom) - above) * down[None, :, None, None]


def _neighbours(length: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the pixel before each output, the one after, and the way between them, in float32 as the others have."""
    place = np.arange(size, dtype=np.float32) * np.float32(length / size)
    before = place.astype(np.int32)
    return before, np.minimum(before + 1, length - 1), place - before.astype(np.float32)


def resize_clean(images: UInt8[np.ndarray, "B H W 3"], size: int) -> Float[np.ndarray, "B size size 3"]:
    """Resizes as clean-fid does: Pillow's antialiased bicubic on each channel in float, clipped to [0, 255]."""
    resized = np.empty((len(images), size, size, 3), np.float32)
    for image, out in zip(images, resized, strict=True):
        for channel in range(3):
            plane = Image.fromarray(image[:, :, channel].astype(np.float32))
            out[:, :, channel] = plane.resize((size, size), Image.Resampling.BICUBIC)
    return resized.clip(0.0, 255.0)
