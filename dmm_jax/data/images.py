"""Opens image files safely and fits images to the square that the VAE encodes."""

import pathlib
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from dmm_jax.runtime.errors import UserError


class UnreadableImage(UserError):
    """One image cannot be read. A reader of many images may drop it, and must count it."""


def load_rgb(path: pathlib.Path) -> Image.Image:
    """Opens an image file, upright (EXIF) and as RGB; transparent pixels become white.

    Raises:
        UnreadableImage: the file is not an image, is truncated, or has as many pixels as a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                upright = ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError,
            Image.DecompressionBombWarning) as error:  # fmt: skip
        raise UnreadableImage(f"{path} cannot be read as an image ({error}). Remove or replace the file.") from error
    if "A" in upright.getbands() or "transparency" in upright.info:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    return upright.convert("RGB")


def crop_of(height: int, width: int, resolution: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns (height, width) after scaling the short side to `resolution`, and (top, left) of the central square."""
    scale = resolution / min(width, height)
    height, width = (max(resolution, round(side * scale)) for side in (height, width))
    return (height, width), ((height - resolution) // 2, (width - resolution) // 2)


def fit_square(image: Image.Image | UInt8[np.ndarray, "H W 3"], resolution: int) -> UInt8[np.ndarray, "R R 3"]:
    """Scales the short side to `resolution` pixels and crops the centre; an image of this size stays unchanged."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    width, height = image.size
    if (width, height) != (resolution, resolution):
        scaled, (y, x) = crop_of(height, width, resolution)
        image = image.resize(scaled[::-1], Image.Resampling.LANCZOS)
        image = image.crop((x, y, x + resolution, y + resolution))
    return np.asarray(image, np.uint8)
