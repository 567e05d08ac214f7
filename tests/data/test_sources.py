"""Laws of the sources of images with captions."""

import json

import numpy as np
import pytest
from PIL import Image

from dmm_jax.data import sources
from dmm_jax.data.sources import FolderSource
from dmm_jax.runtime.errors import UserError
from dmm_jax.world.scenes import parse_all
from dmm_jax.world.source import ShapesSource
from dmm_jax.world.styles import STYLES


def _image(path, value=0, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)


def _listing(folder, *rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / "captions.jsonl").write_text(text, encoding="utf-8")


def test_a_listing_gives_files_and_captions_in_its_order(tmp_path):
    _image(tmp_path / "b.png", 7)
    _image(tmp_path / "deep" / "a.png", 9)
    _listing(tmp_path, {"file": "b.png", "caption": "bé"}, "", {"file": "deep/a.png", "caption": "a", "more": 1})
    source = FolderSource(tmp_path)
    assert [(source[i]["caption"], source[i]["image"][0, 0, 0], source[i]["id"]) for i in range(len(source))] == [
        ("bé", 7, 0),
        ("a", 9, 1),
    ]
    assert source[0]["image"].shape == (4, 6, 3)
    assert FolderSource(tmp_path, resolution=8)[0]["image"].shape == (8, 8, 3)


def test_side_files_caption_their_image(tmp_path):
    for name in ("b.png", "sub/a.jpg", "no_caption.png"):
        _image(tmp_path / name)
    (tmp_path / "b.txt").write_text("tall b\n")
    (tmp_path / "sub" / "a.txt").write_text("small a")
    (tmp_path / "notes.txt").write_text("no image")
    source = FolderSource(tmp_path)
    assert [source[i]["caption"] for i in range(len(source))] == ["tall b", "small a"]


@pytest.mark.parametrize("name", ["../outside.png", "link.png", "/etc/hostname", "linked/outside.png"])
def test_captions_cannot_lead_out_of_the_folder(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    _image(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "linked").symlink_to(tmp_path)
    _listing(folder, {"file": name, "caption": "x"})
    with pytest.raises(ValueError, match="outside"):
        FolderSource(folder)


def test_side_files_cannot_lead_out_of_the_folder(tmp_path):
    folder = tmp_path / "folder"
    _image(folder / "a.png")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "a.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match="outside"):
        FolderSource(folder)


@pytest.mark.parametrize(
    "row, message",
    [
        ("{not json", "line 1: not JSON"),
        ({"file": "a.png"}, "line 1: expected"),
        ({"file": "a.png", "caption": None}, "line 1: expected"),
        ("[1, 2]", "line 1: expected"),
        ({"file": "b.png", "caption": "x"}, "does not exist"),
        ({"file": "a.png", "caption": "x" * sources.MAX_LINE_CHARS}, "characters"),
        ("", "no captioned images"),
    ],
)
def test_errors_in_a_listing_name_the_line(tmp_path, row, message):
    _image(tmp_path / "a.png")
    _listing(tmp_path, row)
    with pytest.raises(ValueError, match=message):
        FolderSource(tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "captions.jsonl"])
def test_captions_that_are_not_utf8_are_refused(tmp_path, name):
    _image(tmp_path / "a.png")
    (tmp_path / name).write_bytes('{"file": "a.png", "caption": "grün"}'.encode("latin-1"))
    with pytest.raises(UserError, match=f"{name} is not UTF-8 text"):
        FolderSource(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        FolderSource(tmp_path / "none")


def test_a_folders_digest_depends_on_captions_and_files(tmp_path):
    _image(tmp_path / "a.png")
    digests = []
    for caption in ("x", "y", "x"):
        _listing(tmp_path, {"file": "a.png", "caption": caption})
        digests.append(FolderSource(tmp_path).digest)
    _image(tmp_path / "a.png", size=(50, 50))
    digests.append(FolderSource(tmp_path).digest)
    assert digests[0] == digests[2] and len(set(digests)) == 3


def test_pictures_match_their_captions_in_any_reading_order():
    source = ShapesSource(70, style="comic", seed=3)
    assert len(source) == 70
    late, early = source[69], source[2]
    content = parse_all([early["caption"]])
    np.testing.assert_array_equal(content.shape_ids[0], source.scenes.content.shape_ids[2])
    second = ShapesSource(70, style="comic", seed=3)
    np.testing.assert_array_equal(second[2]["image"], early["image"])
    np.testing.assert_array_equal(second[69]["image"], late["image"])
    assert early["image"].dtype == np.uint8 and early["image"].shape == (64, 64, 3) and early["id"] == 2
    sky = np.round(np.array(STYLES["comic"].background) * 255)
    np.testing.assert_array_equal(early["image"][0, 0], sky)
    with pytest.raises(IndexError):
        source[70]


def test_the_shuffled_world_holds_the_same_pictures_in_another_order():
    """The first ids are those that TensorFlow Datasets 4.9.10 gives a split of 24 examples."""
    plain, shuffled = ShapesSource(24, seed=2), ShapesSource(24, seed=2, shuffled=True)
    examples = [shuffled[index] for index in range(24)]
    assert [example["id"] for example in examples[:8]] == [6, 16, 19, 12, 14, 18, 5, 13]
    assert sorted(example["id"] for example in examples) == list(range(24)) and shuffled.digest == plain.digest
    for example in examples:
        assert example["caption"] == plain[example["id"]]["caption"]
        np.testing.assert_array_equal(example["image"], plain[example["id"]]["image"])


def test_the_worlds_digest_depends_on_seed_and_style():
    digests = {ShapesSource(4, style, seed).digest for style in (None, "comic", "ink") for seed in (0, 1)}
    assert len(digests) == 6
    assert ShapesSource(4, "ink", 1).digest in digests


@pytest.mark.parametrize("arguments", [(0,), (4, "no such style")])
def test_the_world_refuses_unknown_styles_and_an_empty_count(arguments):
    with pytest.raises(ValueError, match="got"):
        ShapesSource(*arguments)
