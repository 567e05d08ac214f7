"""Laws of `prepare` for images: it reports every file."""

import pytest
from PIL import Image

from dmm_jax.data import prepare
from dmm_jax.runtime.errors import UserError
from dmm_jax.world import demo_config


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A config whose folder holds three captioned images, one damaged, and two other files; the VAE is a stub."""
    monkeypatch.setattr(
        prepare, "build_encoder", lambda base, dtype: (1.0, lambda images, keys: images[:, ::8, ::8] / 255)
    )
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a", "b", "c"):
        Image.new("RGB", (64, 64)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    (folder / "b.png").write_bytes(b"damaged")
    for name in ("d.heic", "._a.png"):
        (folder / name).write_bytes(b"x")
    config = demo_config.get_config()
    config.data.kind, config.data.source = "images", str(folder)
    config.data.cache, config.data.num_examples = str(tmp_path / "cache"), 0
    return config


def test_prepare_reports_its_stages_and_every_file(config, capsys):
    for _ in range(2):  # The second call opens the finished cache.
        prepare.prepare_images(config)
        *stages, used, first, second, third = capsys.readouterr().err.splitlines()
        assert stages[0] == f"reading {config.data.source}" and used == "        2 images used"
        assert {first.split(", for")[0], second.split(", for")[0]} == {
            "        1 not used: files ending in '.heic'", "        1 not used: ignored by name",
        }  # fmt: skip
        assert third in (
            "        1 not used: damaged or not an image, for example 'b.png'",
            "        1 not used: unreadable, found by an earlier call or another process",
        )


def test_images_beyond_the_first_examples_are_counted(config, capsys):
    config.data.num_examples = 1
    prepare.prepare_images(config)
    assert "        2 not used: beyond data.num_examples, for example 'c.png'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "unused, message", [("d.heic", "--strict: .*\n.*'.heic'"), ("b.png", "'b.png' cannot be read")]
)
def test_strict_makes_an_unused_file_an_error(config, tmp_path, unused, message):
    for name in {"d.heic", "b.png", "b.txt"} - {unused, unused.replace("png", "txt")}:
        (tmp_path / "images" / name).unlink()
    with pytest.raises(UserError, match=message):
        prepare.prepare_images(config, strict=True)
    (tmp_path / "images" / unused).unlink()
    (tmp_path / "images" / "b.txt").unlink(missing_ok=True)
    prepare.prepare_images(config, strict=True)
