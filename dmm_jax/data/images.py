"""Opens image files safely and fits images to the size that the VAE encodes."""

import io
import logging
import warnings

import numpy as np
from jaxtyping import UInt8, UInt32
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from dmm_jax.data.files import DataFile
from dmm_jax.runtime.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")  # Pillow starts Ghostscript for EPS.
WHITE_IS_ZERO = 0  # A value of TIFF's PhotometricInterpretation.
MAX_FILE_BYTES, MAX_PIXELS, MAX_ASPECT_RATIO = 2**28, 90_000_000, 20
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # By the EXIF orientation.
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # Its lines name no file; `UnreadableImage` does.


class UnreadableImage(UserError):
    """One image cannot be used. A reader of many images may drop it, and must count it under its `reason`."""

    def __init__(self, name: str, reason: str, detail: str = ""):
        """Describes the image by its name, the reason by a short phrase."""
        detail = f" ({' '.join(detail.split())[:200]})" if detail else ""
        super().__init__(f"{name!r} cannot be read as an image: {reason}{detail}. Remove or replace the file.")
        self.name, self.reason = name, reason


def load_rgb(file: DataFile) -> Image.Image:
    """Opens an image (the first frame), upright (EXIF) and as RGB.

    Raises:
        UnreadableImage: the file is missing, damaged, not an image, too large or too long, or `to_rgb` refuses it.
    """
    if file.size > MAX_FILE_BYTES:
        raise UnreadableImage(file.name, f"more than {MAX_FILE_BYTES} bytes")
    try:
        data = io.BytesIO(file.read())
        with warnings.catch_warnings():  # Other threads may restore the filters in another order: ignore only Pillow's.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            with Image.open(data, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise UnreadableImage(file.name, f"more than {MAX_PIXELS} pixels")
                if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                    raise UnreadableImage(file.name, f"one side is more than {MAX_ASPECT_RATIO} times the other")
                image.load()
                return to_rgb(_upright(image), file.name)
    except UnreadableImage:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImage(file.name, f"more than {MAX_PIXELS} pixels") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(file.name, "damaged or not an image") from error
    except Exception as error:  # On damaged files, Pillow's decoders raise errors of every kind.
        raise UnreadableImage(file.name, "damaged or not an image", str(error)) from error


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Converts an image of any Pillow mode to RGB; transparent pixels become white, 16-bit grey is rounded to 8 bits.

    Raises:
        UnreadableImage: the mode does not define which value is white (32-bit integers and floats).
    """
    if image.mode in ("I", "F"):
        raise UnreadableImage(name, f"pixels of mode {image.mode}, whose white is not defined")
    if image.mode.startswith("I;16"):
        grey = _grey_of_16_bits(image)
        grey[grey == image.info.get("transparency", -1)] = 65535
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _grey_of_16_bits(image: Image.Image) -> UInt32[np.ndarray, "H W"]:
    """Returns grey levels from 0 to 65535. Pillow leaves TIFF's 12 bits and white zeros to its callers."""
    grey, tags = np.asarray(image).astype(np.uint32), getattr(image, "tag_v2", {})
    if tags.get(TiffImagePlugin.BITSPERSAMPLE) == (12,):
        grey = (grey * 65535 + 2047) // 4095
    return 65535 - grey if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO else grey


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; without one that can be read, returns the image as it is."""
    try:
        transpose = TRANSPOSES.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # On damaged EXIF, Pillow raises errors of every kind.
        transpose = None
    return image if transpose is None else image.transpose(transpose)


def crop_of(height: int, width: int, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns (height, width) after scaling an image until it covers `size`, and (top, left) of the central crop."""
    scale = max(size[0] / height, size[1] / width)
    scaled = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    return scaled, ((scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2)


def fit(image: Image.Image | UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Scales an image until it covers `size`, height and width in pixels, and crops the centre.

    An image of this size stays unchanged.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    width, height = image.size
    if (height, width) != size:
        scaled, (y, x) = crop_of(height, width, size)
        image = image.resize(scaled[::-1], Image.Resampling.LANCZOS)
        image = image.crop((x, y, x + size[1], y + size[0]))
    return np.asarray(image, np.uint8)
