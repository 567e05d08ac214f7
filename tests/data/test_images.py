"""Laws of opening and fitting images."""

import numpy as np
import pytest
from PIL import Image

from dmm_jax.data.images import UnreadableImage, fit_square, load_rgb


def test_an_image_of_the_right_size_stays_unchanged():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    np.testing.assert_array_equal(fit_square(image, 16), image)


@pytest.mark.parametrize("size", [(48, 32), (32, 48), (7, 31), (33, 32)])
def test_the_centre_stays_in_the_centre(size):
    """A ramp keeps its central value in the centre, and its slope grows by the factor of the scaling."""
    width, height = size
    ramp_x, ramp_y = np.meshgrid(np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2)
    image = np.stack([128 + ramp_x, 128 + ramp_y, 0 * ramp_x], axis=-1).astype(np.uint8)
    fitted = fit_square(image, 16).astype(float)
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
    assert load_rgb(tmp_path / "a.jpg").size == (4, 8)


@pytest.mark.parametrize("mode, white", [("RGBA", (0, 0, 0, 0)), ("LA", (0, 0)), ("L", 255), ("1", 1)])
def test_every_mode_becomes_rgb_on_white(tmp_path, mode, white):
    Image.new(mode, (3, 3), white).save(tmp_path / "a.png")
    image = load_rgb(tmp_path / "a.png")
    assert image.mode == "RGB" and np.asarray(image).min() == 255


def test_files_that_are_not_images_are_refused(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "complete.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "complete.png").read_bytes()[:1000])
    for name in ("text.png", "half.png", "missing.png"):
        with pytest.raises(UnreadableImage, match=name):
            load_rgb(tmp_path / name)


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    for limit in (1000, 500):  # Pillow raises above twice its limit, and only warns below.
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UnreadableImage, match="bomb"):
            load_rgb(tmp_path / "a.png")
