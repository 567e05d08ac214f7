"""Laws of opening and fitting images."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from dmm_jax.data import images
from dmm_jax.data.files import DataFile
from dmm_jax.data.images import UnreadableImage, fit, load_rgb, to_rgb


def _load(path):
    return load_rgb(DataFile(path, path.name, 2**20))


def test_an_image_of_the_right_size_stays_unchanged():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    np.testing.assert_array_equal(fit(image, (16, 16)), image)


@pytest.mark.parametrize("size", [(48, 32), (32, 48), (7, 31), (33, 32)])
def test_the_centre_stays_in_the_centre(size):
    """A ramp keeps its central value in the centre, and its slope grows by the factor of the scaling."""
    width, height = size
    ramp_x, ramp_y = np.meshgrid(np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2)
    image = np.stack([128 + ramp_x, 128 + ramp_y, 0 * ramp_x], axis=-1).astype(np.uint8)
    fitted = fit(image, (16, 16)).astype(float)
    assert fitted.shape == (16, 16, 3)
    short = min(size)
    middle = fitted[7:9, 7:9, :2].mean()
    assert abs(middle - 127.5) < 0.2 * short / 16 + 1.0
    slope = (fitted[:, 12, 0] - fitted[:, 4, 0]).mean() / 8.0
    assert slope == pytest.approx(short / 16, rel=0.15)


def test_photographs_are_turned_upright(tmp_path):
    image = Image.fromarray(np.zeros((4, 8, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # Turn a quarter clockwise.
    image.save(tmp_path / "a.jpg", exif=exif)
    assert _load(tmp_path / "a.jpg").size == (4, 8)


def test_all_orientations_agree_with_pillow():
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    for orientation in range(10):
        image.getexif()[0x0112] = orientation
        np.testing.assert_array_equal(images._upright(image), ImageOps.exif_transpose(image))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x01ab", b"Exif\0\0", b"Exif\0\0II*\0"]
)
def test_damaged_exif_does_not_turn(tmp_path, exif):
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert _load(tmp_path / "a.jpg").size == (8, 4)


def test_wrong_types_next_to_an_orientation_do_not_matter(tmp_path):
    """Tag 0x0100, the width, is text: Pillow's own exif_transpose raises an error."""
    entries = b"\x01\x00\0\x02\0\0\0\x02a\0\0\0" + b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + entries + b"\0" * 4)
    with Image.open(tmp_path / "a.jpg") as image, pytest.raises(Exception):  # noqa: B017
        ImageOps.exif_transpose(image)
    assert _load(tmp_path / "a.jpg").size == (4, 8)


@pytest.mark.parametrize(
    "mode, pixel, rgb",
    [
        ("1", 1, 255), ("L", 7, 7), ("P", 7, (3, 4, 5)), ("RGB", (1, 2, 3), (1, 2, 3)), ("CMYK", (0, 0, 0, 0), 255),
        ("YCbCr", (9, 128, 128), 9), ("HSV", (0, 0, 9), 9), ("LAB", (255, 128, 128), 255),
        ("RGBX", (1, 2, 3, 4), (1, 2, 3)), ("LA", (0, 0), 255), ("PA", (7, 0), 255), ("RGBA", (0, 0, 0, 0), 255),
        ("RGBA", (0, 0, 0, 51), 204), ("RGBa", (0, 0, 0, 51), 204), ("La", (0, 51), 204),
        ("I;16", 65535, 255), ("I;16", 0x1234, 0x12),
        ("I;16B", 0x1234, 0x12), ("I;16L", 0x12F4, 0x13), ("I;16N", 0x1234, 0x12),
        ("I", 255, None), ("F", 1.0, None),
    ],
)  # fmt: skip
def test_every_mode_becomes_rgb_on_white_or_is_refused(mode, pixel, rgb):
    image = Image.new(mode, (3, 2), pixel)
    if mode in ("P", "PA"):
        image.putpalette([channel for index in range(256) for channel in (3, 4, 5)])
        image.putdata([pixel] * 6)
    if rgb is None:
        with pytest.raises(UnreadableImage, match=f"mode {mode}"):
            to_rgb(image, "a.tif")
    else:
        error = np.subtract(to_rgb(image, "a.png").getpixel((1, 1)), rgb)
        assert np.abs(error).max() <= (mode == "LAB")  # Converted by way of a colour profile.


def test_grey_of_16_bits_keeps_its_levels_and_transparency(tmp_path):
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(levels).save(tmp_path / "a.png")
    Image.fromarray(levels).save(tmp_path / "b.png", transparency=0)
    expected = np.round(levels / 257)
    np.testing.assert_array_equal(np.asarray(_load(tmp_path / "a.png"))[..., 1], expected)
    assert _load(tmp_path / "b.png").getpixel((0, 0)) == (255, 255, 255)
    np.testing.assert_array_equal(np.asarray(_load(tmp_path / "b.png"))[1:, :, 1], expected[1:])


def _tiff(bits, white_is_zero, data):
    """Returns a grey TIFF of two pixels in a row, upside down."""
    tags = [(256, 3, 2), (257, 3, 1), (258, 3, bits), (262, 3, 0 if white_is_zero else 1), (273, 4, 8), (274, 3, 3),
            (277, 3, 1), (278, 3, 1), (279, 4, len(data))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + b"\0" * 4


@pytest.mark.parametrize(
    "bits, white_is_zero, data, expected",
    [
        (8, False, b"\x12\xff", (255, 18)), (8, True, b"\xed\0", (255, 18)),
        (16, False, b"\x34\x12\xff\xff", (255, 18)), (16, True, b"\xcb\xed\0\0", (255, 18)),
        (12, False, b"\x12\x3f\xff", (255, 18)),
    ],
)  # fmt: skip
def test_grey_tiffs_of_12_bits_or_white_zeros_are_read_right(tmp_path, bits, white_is_zero, data, expected):
    (tmp_path / "a.tif").write_bytes(_tiff(bits, white_is_zero, data))
    image = _load(tmp_path / "a.tif")
    assert tuple(image.getpixel((x, 0))[1] for x in range(2)) == expected


@pytest.mark.parametrize("suffix", images.IMAGE_SUFFIXES)
def test_every_ending_is_read(tmp_path, suffix):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    options = {"save_all": True, "append_images": frames[1:]} if suffix in (".gif", ".tif", ".webp", ".avif") else {}
    frames[0].save(tmp_path / f"a{suffix}", **options)
    red, green, blue = _load(tmp_path / f"a{suffix}").getpixel((8, 8))
    assert red > 240 and green < 20 and blue < 20


def test_files_that_are_not_images_are_refused(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    for suffix in ("png", "avif", "webp", "tif"):
        noise.save(tmp_path / f"complete.{suffix}")
        data = (tmp_path / f"complete.{suffix}").read_bytes()
        (tmp_path / f"half.{suffix}").write_bytes(data[: len(data) // 3])
    for name in ("text.png", "half.png", "half.avif", "half.webp", "half.tif", "missing.png"):
        with pytest.raises(UnreadableImage, match=f"^'{name}' cannot be read as an image: damaged[^\n]*$"):
            _load(tmp_path / name)


def test_postscript_under_another_name_starts_no_program(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    calls = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args: calls.append(args))
    with pytest.raises(UnreadableImage):
        _load(tmp_path / "a.png")
    assert calls == []


@pytest.mark.parametrize("limit", ["MAX_FILE_BYTES", "MAX_PIXELS", "Image.MAX_IMAGE_PIXELS"])
def test_too_large_images_are_refused(tmp_path, monkeypatch, limit):
    Image.new("RGB", (400, 400)).save(tmp_path / "a.png")
    monkeypatch.setattr(f"dmm_jax.data.images.{limit}", 70_000)
    with pytest.raises(UnreadableImage, match="more than"):
        _load(tmp_path / "a.png")


@pytest.mark.parametrize("size", [(1, 21), (21, 1), (100_000, 1)])
def test_too_long_images_are_refused(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.png")
    with pytest.raises(UnreadableImage, match="20 times"):
        _load(tmp_path / "a.png")
